"""Pascal VOC XML annotations -> YOLO labels: VOC 2007 and 2012 as distributed, and any folder laid out like them.

A data set's folder holds `Annotations/*.xml`, `JPEGImages/` and `ImageSets/Main/{train,val,test}.txt`; VOCdevkit holds such
folders. Annotations and images may also lie in `annotations` and `images`, or all in one folder; without ImageSets every
annotation belongs to the one split `train`.

VOC counts pixels from 1. As in Darknet's and YOLOv5's labels, a box runs from (xmin - 1, ymin - 1) to (xmax - 1, ymax - 1).
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from tqdm import tqdm

from data.layout import Corners, Item, Row, Skips, Split, image_size, images_by_stem, listed, normalised
from utils.errors import InputError
from utils.labels import IMAGE_SUFFIXES
from utils.log import LOGGER

SETS = ("train", "val", "test")


@dataclass(frozen=True)
class VocOptions:
    """`names`: the classes to keep, in the order of their numbers. `difficult`: keep objects that are marked so."""

    names: tuple[str, ...]
    difficult: bool = False


@dataclass(frozen=True)
class _Object:
    """One `<object>`; `corners` as written, None where they are missing or no numbers."""

    name: str
    corners: Corners | None
    difficult: bool


@dataclass(frozen=True)
class _Annotation:
    """One XML file; `size` is (0, 0) where it does not say."""

    filename: str
    size: tuple[int, int]
    objects: tuple[_Object, ...]


def read_voc(source: Path, options: VocOptions, skips: Skips) -> list[Split]:
    """Read the VOC data sets in `source`; raises InputError if there is none, or if no box has a class of `names`."""
    source = Path(os.path.abspath(source))
    if not source.is_dir():
        raise InputError(f"{source}: no such folder; give VOCdevkit, or a folder that holds Annotations and JPEGImages")
    unknown: dict[str, int] = {}
    folders = sorted(path for path in source.iterdir() if (path / "Annotations").is_dir()) or [source]
    splits = [split for folder in folders for split in _read_folder(folder, options, skips, unknown)]
    if unknown and not any(item.rows for split in splits for item in split.items):
        counts = listed(f"{name} {count}" for name, count in unknown.items())
        raise InputError(
            f"{source}: no box has one of the classes {listed(options.names, 3)}; found: {counts}. "
            f"Name yours, in the order of their numbers: --names {','.join(unknown)}"
        )
    return splits


def _read_folder(folder: Path, options: VocOptions, skips: Skips, unknown: dict[str, int]) -> list[Split]:
    annotations, images = _folder(folder, "Annotations", "annotations"), _folder(folder, "JPEGImages", "images")
    pictures = images_by_stem(images)
    year = re.fullmatch(r"VOC(\d{4})", folder.name)
    splits = []
    for name, stems in _sets(folder, annotations).items():
        items = []
        for stem in tqdm(stems, desc=f"reading {folder.name} {name}", unit="file", disable=None, leave=False):
            try:
                items.append(_item(annotations / f"{stem}.xml", images, pictures, options, skips, unknown))
            except ValueError as error:
                skips.add(str(error), f"{folder.name}/{name}/{stem}")
        splits.append(Split(name + (year[1] if year else ""), tuple(items)))
    return splits


def _folder(folder: Path, *names: str) -> Path:
    return next((folder / name for name in names if (folder / name).is_dir()), folder)


def _sets(folder: Path, annotations: Path) -> dict[str, list[str]]:
    """Return the image stems of each split."""
    lists = folder / "ImageSets" / "Main"
    found = [name for name in SETS if (lists / f"{name}.txt").is_file()]
    if not {"train", "val"} & set(found) and (lists / "trainval.txt").is_file():
        found.append("trainval")
    if found:
        return {name: [line.split()[0] for line in _lines(lists / f"{name}.txt")] for name in found}
    stems = sorted(path.stem for path in annotations.glob("*.xml"))
    if not stems:
        raise InputError(f"{folder}: no VOC data set: expected Annotations/*.xml and JPEGImages, or folders with them")
    LOGGER.info(f"{folder}: has no ImageSets/Main/{{{','.join(SETS)}}}.txt, so its {len(stems)} annotations are one split, `train`")
    return {"train": stems}


def _lines(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    return [line for line in text.splitlines() if line.strip()]


def _item(path: Path, images: Path, pictures: dict[str, Path], options: VocOptions, skips: Skips, unknown: dict[str, int]) -> Item:
    """Convert one annotation; ValueError with the reason if the whole image has to be left out."""
    if not path.is_file():
        raise ValueError("no annotation")
    annotation = read_annotation(path)
    image = pictures.get(path.stem) or _named(images, annotation.filename)
    if image is None:
        raise ValueError("no image")
    size = annotation.size
    if min(size) < 1:
        try:
            size = image_size(image)
        except InputError:
            raise ValueError("size neither in the annotation nor in a readable image") from None
    rows = [_row(obj, size, options, path, skips, unknown) for obj in annotation.objects]
    return Item(image, path.stem + image.suffix, tuple(row for row in rows if row))


def _named(images: Path, filename: str) -> Path | None:
    """Return the image that `<filename>` names, if it lies in the folder of images."""
    image = images / Path(filename.replace("\\", "/")).name
    return image if filename and image.suffix.lower() in IMAGE_SUFFIXES and image.is_file() else None


def _row(obj: _Object, size: tuple[int, int], options: VocOptions, path: Path, skips: Skips, unknown: dict[str, int]) -> Row | None:
    what = f"{path.name} {obj.name}"
    if obj.name not in options.names:
        unknown[obj.name] = unknown.get(obj.name, 0) + 1
        skips.add("class not among the names", what)
        return None
    if obj.difficult and not options.difficult:
        skips.add("marked difficult (--difficult keeps them)", what)
        return None
    row = obj.corners and normalised(options.names.index(obj.name), obj.corners, size)
    if not row:
        skips.add("box without area in the image", what)
    return row or None


# XML ------------------------------------------------------------------------------------------------------------------


class _Builder(ElementTree.TreeBuilder):
    """Builds the tree of a document without a DOCTYPE, the only place where entities can be declared.

    So nothing is expanded (an entity of entities of ... fills the memory) and nothing outside the file is read.
    """

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise ValueError("an XML with a DOCTYPE, which is refused")


def read_annotation(path: Path) -> _Annotation:
    """Read one annotation; ValueError with the reason if it cannot be read."""
    try:
        root = ElementTree.parse(path, ElementTree.XMLParser(target=_Builder())).getroot()
    except (ElementTree.ParseError, LookupError, UnicodeError):  # LookupError: an encoding that Python does not know
        raise ValueError("broken XML") from None
    except OSError as error:
        raise ValueError(f"unreadable annotation ({error.strerror})") from None
    size = tuple(int(_number(root.findtext(f"size/{key}")) or 0) for key in ("width", "height"))
    return _Annotation((root.findtext("filename") or "").strip(), size, tuple(map(_object, root.iterfind("object"))))


def _object(element: ElementTree.Element) -> _Object:
    values = [_number(element.findtext(f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax")]
    corners = None if None in values else tuple(value - 1 for value in values)
    return _Object((element.findtext("name") or "").strip(), corners, _number(element.findtext("difficult")) == 1)


def _number(text: str | None) -> float | None:
    """Return a finite number (VOC has some with decimals), or None."""
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if abs(value) < 1e9 else None
