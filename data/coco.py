"""COCO JSON annotations -> YOLO labels: COCO 2017 as distributed, and any file of its format.

COCO's folder holds `annotations/instances_{train,val}2017.json` and the images in `images/{train,val}2017` or, as the
archives unpack, in `{train,val}2017`. Classes are numbered by the order of the sorted category ids (COCO's 1 to 90 become
0 to 79) and named by the file. Crowds (`iscrowd`) are left out.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from data.layout import Item, Row, Skips, Split, image_size, listed, normalised
from utils.errors import InputError, did_you_mean
from utils.log import LOGGER

_PREFIX = "instances_"


@dataclass(frozen=True)
class CocoData:
    """Splits, and the class names in the order of their numbers."""

    splits: list[Split]
    names: tuple[str, ...]


@dataclass(frozen=True)
class _File:
    """One JSON: `images` and `annotations` as in the file, `categories` id -> name."""

    path: Path
    split: str
    images: list
    annotations: list
    categories: Mapping[int, str]


def read_coco(source: Path, images: Path | None, skips: Skips) -> CocoData:
    """Read the COCO files of a folder, or one JSON file; `images` is the folder of the images where it cannot be guessed.

    Raises InputError for a source without such files, one that is none, and categories that differ between files.
    """
    source = Path(os.path.abspath(source))
    files = [_read_file(path) for path in _json_files(source)]
    categories: dict[int, str] = {}
    for file in files:
        for number, name in file.categories.items():
            if categories.setdefault(number, name) != name:
                raise InputError(f"{file.path}: category {number} is {name!r} here and {categories[number]!r} in another file")
    classes = {number: k for k, number in enumerate(sorted(categories))}
    root = source if source.is_dir() else _root_of(source)
    splits = [_split(file, _images_folder(root, file, images), classes, skips) for file in files]
    return CocoData(splits, tuple(categories[number] for number in sorted(categories)))


def _json_files(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    found = [*source.glob(f"annotations/{_PREFIX}*.json"), *source.glob(f"{_PREFIX}*.json"), *source.glob("*/_annotations.coco.json")]
    if not found:
        near = did_you_mean(source.name, os.listdir(source.parent)) if source.parent.is_dir() and not source.exists() else ""
        raise InputError(f"{source}: no annotations/{_PREFIX}*.json there; give the folder that holds them, or one COCO JSON file{near}")
    return sorted(found)


def _root_of(path: Path) -> Path:
    return path.parent.parent if path.parent.name == "annotations" else path.parent


def _split_name(path: Path) -> str:
    """`train2017` of `instances_train2017.json`; of a file that only its folder tells apart, the folder."""
    return path.parent.name if path.name == "_annotations.coco.json" else path.stem.removeprefix(_PREFIX)


def _images_folder(root: Path, file: _File, images: Path | None) -> Path:
    """Return the folder that each `file_name` is relative to: the first candidate that has one of the images."""
    names = [image.get("file_name") for image in file.images if isinstance(image, dict)]
    names = [name for name in names if _is_inside(name)]
    split = file.split
    guesses = [root / "images" / split, root / split, root / "images", root, file.path.parent]
    candidates = [Path(os.path.abspath(images)) / split, Path(os.path.abspath(images))] if images else guesses
    for folder in candidates:
        if not names or any(os.path.isfile(folder / name) for name in names):
            return folder
    raise InputError(
        f"{file.path}: its images are missing: {listed(names, 1)} is in none of {listed(dict.fromkeys(candidates))}; --images names their folder"
    )


def _read_file(path: Path) -> _File:
    LOGGER.info(f"reading {path}")
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a readable JSON: {error}") from None
    lists = [content.get(key) if isinstance(content, dict) else None for key in ("images", "annotations", "categories")]
    if not all(isinstance(value, list) for value in lists):
        raise InputError(f"{path}: not a COCO file of objects: it needs the lists images, annotations and categories")
    categories: dict[int, str] = {}
    for entry in lists[2]:
        number, name = (entry.get("id"), entry.get("name")) if isinstance(entry, dict) else (None, None)
        if type(number) is not int or not isinstance(name, str) or categories.setdefault(number, name) != name:
            raise InputError(f"{path}: a category needs a whole number `id` of its own and a `name`, found {str(entry)[:80]}")
    if not categories:
        raise InputError(f"{path}: has no categories")
    return _File(path, _split_name(path), lists[0], lists[1], categories)


def _split(file: _File, folder: Path, classes: Mapping[int, int], skips: Skips) -> Split:
    boxes: dict[object, list[dict]] = defaultdict(list)
    known = {image.get("id") for image in file.images if isinstance(image, dict) and isinstance(image.get("id"), (int, str))}
    for annotation in file.annotations:
        number = annotation.get("image_id") if isinstance(annotation, dict) else None
        if not isinstance(number, (int, str)) or number not in known:
            skips.add("annotation of an unknown image", f"{file.split} {_id(annotation)}")
        else:
            boxes[number].append(annotation)
    items, seen = [], set()
    for image in tqdm(file.images, desc=f"converting {file.split}", unit="image", disable=None, leave=False):
        try:
            name, number = _checked(image)
            if number in seen:
                raise ValueError("image whose id another one has")
            seen.add(number)
            items.append(_item(image, name, folder, boxes[number], classes, f"{file.split} {name}", skips))
        except ValueError as error:
            skips.add(str(error), f"{file.split} {image.get('file_name') if isinstance(image, dict) else image}"[:200])
    return Split(file.split, tuple(items))


def _id(entry: object) -> str:
    return f"annotation {entry.get('id')}" if isinstance(entry, dict) else str(entry)[:80]


def _checked(image: object) -> tuple[str, int | str]:
    """Return file_name and id; ValueError where one is missing, or the name leads out of the folder of images."""
    name, number = (image.get("file_name"), image.get("id")) if isinstance(image, dict) else (None, None)
    if not isinstance(name, str) or not isinstance(number, (int, str)):
        raise ValueError("image without id or file_name")
    if not _is_inside(name):
        raise ValueError("file_name that leads out of the folder of images")
    return name, number


def _is_inside(name: object) -> bool:
    """Whether `name` is a path that stays below the folder it is joined to."""
    if not isinstance(name, str) or "\0" in name:
        return False
    path = PurePosixPath(name)
    return bool(path.parts) and ".." not in path.parts and not path.is_absolute()


def _item(image: dict, name: str, folder: Path, annotations: list[dict], classes: Mapping[int, int], where: str, skips: Skips) -> Item:
    """Convert one image; ValueError with the reason if it has to be left out."""
    path = folder / name
    if not os.path.isfile(path):
        raise ValueError("missing image")
    size = (image.get("width"), image.get("height"))
    if not all(_is_number(side) and side >= 1 for side in size):
        try:
            size = image_size(path)
        except InputError:
            raise ValueError("size neither in the JSON nor in a readable image") from None
    rows = [_row(annotation, classes, size, where, skips) for annotation in annotations]
    # Below a folder `images` of their own they would have their labels there, away from the others.
    inside = "/".join(part for part in PurePosixPath(name).parts if part != "images")
    return Item(path, inside, tuple(row for row in rows if row))


def _row(annotation: dict, classes: Mapping[int, int], size: tuple[int, int], where: str, skips: Skips) -> Row | None:
    what = f"{where} {_id(annotation)}"
    if annotation.get("iscrowd"):
        skips.add("a crowd", what)
        return None
    category = annotation.get("category_id")
    if type(category) is not int or category not in classes:
        skips.add("unknown category", what)
        return None
    box = annotation.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        skips.add("no bbox of four numbers", what)
        return None
    x, y, width, height = map(float, box)
    row = normalised(classes[category], (x, y, x + width, y + height), size)
    if row is None:
        skips.add("box without area in the image", what)
    return row


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e9
