"""What the converters share: a converted data set in memory, and writing it in YOLO's layout.

A converter reads annotations into `Split`s and notes in `Skips` whatever it leaves out; only then does `write` touch the
disk. It writes labels first and images, lists and `dataset.yaml` last, each file whole or not at all, and what is there
already and right is left alone: an interrupted conversion is finished by the same command.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml
from tqdm import tqdm

from utils.errors import InputError
from utils.files import atomic, write_text
from utils.labels import IMAGE_SUFFIXES, label_path, load_image
from utils.log import LOGGER

Corners = tuple[float, float, float, float]  # x1, y1, x2, y2 in pixels, x2 and y2 exclusive
Row = tuple[int, float, float, float, float]  # class, cx, cy, w, h, normalised to the image
DATASET = "dataset.yaml"
_NAMED = 3  # examples of each reason in the log; all of them are in skipped.txt


@dataclass(frozen=True)
class Item:
    """An image to convert: where it is, its path below `images/<split>/`, and its boxes."""

    image: Path
    name: str
    rows: tuple[Row, ...]

    @property
    def lines(self) -> tuple[str, ...]:
        """The lines of its label file, without exact duplicates."""
        return tuple(dict.fromkeys(" ".join(f"{value:.6g}" for value in row) for row in self.rows))


@dataclass(frozen=True)
class Split:
    """The images of one split, in the order of the annotations."""

    name: str
    items: tuple[Item, ...]


@dataclass
class Skips:
    """What was left out: reason -> the files and objects that it is true of."""

    reasons: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, what: object) -> None:
        """Note that `what` was left out for `reason`."""
        self.reasons.setdefault(reason, []).append(str(what))

    def lines(self) -> list[str]:
        """One line per object, sorted by reason."""
        return [f"{reason}: {what}" for reason in sorted(self.reasons) for what in self.reasons[reason]]

    def report(self) -> None:
        """Log each reason with its count and the first few examples."""
        for reason in sorted(self.reasons):
            found = self.reasons[reason]
            more = ", ..." if len(found) > _NAMED else ""
            LOGGER.info(f"skipped, {reason}: {len(found)} ({', '.join(found[:_NAMED])}{more})")


def normalised(cls: int, corners: Corners, size: tuple[int, int]) -> Row | None:
    """Clip corners to an image of `size` (width, height) and return its label row; None if no area is left."""
    if not all(math.isfinite(value) for value in corners):
        return None
    width, height = size
    x1, x2 = (min(max(x, 0.0), float(width)) for x in (corners[0], corners[2]))
    y1, y2 = (min(max(y, 0.0), float(height)) for y in (corners[1], corners[3]))
    if x2 <= x1 or y2 <= y1:
        return None
    return cls, (x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height


def image_size(path: Path) -> tuple[int, int]:
    """Return (width, height) of an image as it is displayed. Raises InputError for a file that is no image."""
    height, width = load_image(path).shape[:2]
    return width, height


def images_by_stem(folder: Path) -> dict[str, Path]:
    """Return the images directly in `folder` by their name without suffix (of two, the first by name)."""
    return {path.stem: path for path in sorted(folder.iterdir(), reverse=True) if path.suffix.lower() in IMAGE_SUFFIXES}


def listed(names: Iterable[object], most: int = 5) -> str:
    """Return `a, b, c`, shortened where there are more than `most`."""
    names = [str(name) for name in names]
    return ", ".join(names[:most]) + (f", ... ({len(names)})" if len(names) > most else "")


# Writing --------------------------------------------------------------------------------------------------------------


def write(out: Path, splits: Sequence[Split], names: Sequence[str], skips: Skips, *, copy: bool) -> None:
    """Write labels, images, lists, `skipped.txt` and `dataset.yaml` below `out`.

    An image that lies below a folder `images` in `out` stays where it is, with its label beside it in `labels`; any
    other is linked, or with `copy` copied, to `out/images/<split>/<name>`. Raises InputError where nothing is left to
    write, or another file stands in the way.
    """
    out = Path(os.path.abspath(out))
    planned = [(split, _plan(out, split, skips)) for split in splits]
    for split, places in planned:
        if not places:
            LOGGER.warning(f"{split.name}: none of its images can be converted, so it is left out")
    planned = [(split, places) for split, places in planned if places]
    if not planned:
        first = next(iter(skips.lines()), "no image is annotated")
        raise InputError(f"{out}: nothing to write; {first}")
    pairs = [(place, item) for _, places in planned for place, item in places.items()]
    texts = _label_texts(pairs)
    _check_free(pairs, copy)
    for path, text in tqdm(texts.items(), desc="writing labels", unit="file", disable=None, leave=False):
        _write_changed(path, text)
    for split, places in planned:
        _place_images(out / "images" / split.name, {place: item.image for place, item in places.items()}, copy)
    for split, places in planned:
        _write_changed(out / f"{split.name}.txt", "".join(f"./{place.relative_to(out).as_posix()}\n" for place in places))
        boxes, empty = sum(len(item.lines) for item in places.values()), sum(not item.rows for item in places.values())
        LOGGER.info(f"{split.name}: {len(places)} images, {boxes} boxes, {empty} backgrounds")
    skips.report()
    if skips.reasons:
        _write_changed(out / "skipped.txt", "\n".join(skips.lines()) + "\n")
    else:
        (out / "skipped.txt").unlink(missing_ok=True)
    _write_yaml(out / DATASET, [split.name for split, _ in planned], names)


def _plan(out: Path, split: Split, skips: Skips) -> dict[Path, Item]:
    """Return where each image of a split will be. Two images that would share a label file cannot both be converted."""
    places: dict[Path, Item] = {}
    labels: set[Path] = set()
    for item in split.items:
        parts = Path(item.image).relative_to(out).parts[:-1] if item.image.is_relative_to(out) else ()
        place = item.image if "images" in parts else out / "images" / split.name / item.name
        if label_path(place) in labels:
            skips.add("its label file is another image's", f"{split.name}/{item.name}")
            continue
        if len(item.lines) < len(item.rows):
            skips.add("the same box twice", f"{split.name}/{item.name}")
        labels.add(label_path(place))
        places[place] = item
    return places


def _label_texts(pairs: Sequence[tuple[Path, Item]]) -> dict[Path, str]:
    """Return the content of every label file."""
    texts: dict[Path, str] = {}
    for place, item in pairs:
        text = "".join(f"{line}\n" for line in item.lines)
        if texts.setdefault(label_path(place), text) != text:
            raise InputError(f"{place}: is in two splits with different boxes; convert them one at a time, each with its own --out")
    return texts


def _check_free(pairs: Sequence[tuple[Path, Item]], copy: bool) -> None:
    """Raise InputError if another file is where an image is to be placed; a link may be replaced."""
    for place, item in pairs:
        if os.path.lexists(place) and not place.is_symlink() and not _is_in_place(place, item.image, copy):
            raise InputError(f"{place}: is another file than {item.image}; remove it, or choose another --out")


def _write_changed(path: Path, text: str) -> None:
    """Write `text` atomically, unless the file has it already (its time then stays, and label caches with it)."""
    if path.is_file() and path.read_bytes() == text.encode():
        return
    _make(path.parent)
    write_text(path, text)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out: {folder} cannot be made ({error.strerror})") from None


def _place_images(folder: Path, places: dict[Path, Path], copy: bool) -> None:
    """Link or copy images to their places. A new folder appears with all of its images, or not at all."""
    wanted = {place: image for place, image in places.items() if place != image}
    if not wanted:
        return
    _make(folder.parent)
    with TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as staging:
        target = folder if folder.exists() else Path(staging) / folder.name
        for place, image in tqdm(wanted.items(), desc=f"placing {folder.name}", unit="image", disable=None, leave=False):
            _place(target / place.relative_to(folder), place, image, copy)
        if target != folder:
            target.rename(folder)


def _place(staged: Path, place: Path, image: Path, copy: bool) -> None:
    """Link or copy `image` to `staged`, which will be `place` once its folder is renamed."""
    _make(staged.parent)
    if os.path.lexists(staged) and _is_in_place(staged, image, copy):
        return
    with atomic(staged) as temporary:
        if copy:
            shutil.copy2(image, temporary)
            return
        try:
            # Relative, so that a folder that holds both can be moved or mounted elsewhere.
            temporary.symlink_to(os.path.relpath(os.path.realpath(image), os.path.realpath(place.parent)))
        except OSError as error:
            raise InputError(f"{place}: cannot be linked ({error.strerror}); --copy copies the images instead") from None


def _is_in_place(place: Path, image: Path, copy: bool) -> bool:
    """Whether `place` is the image: a link to it, or with `copy` a file of its size and time."""
    if place.is_symlink():
        return not copy and os.path.realpath(place) == os.path.realpath(image)
    there, here = place.stat(), image.stat()
    return os.path.samestat(there, here) or (there.st_size, int(there.st_mtime)) == (here.st_size, int(here.st_mtime))


def _write_yaml(path: Path, splits: Sequence[str], names: Sequence[str]) -> None:
    """Write the dataset yaml; a split's name says what it is for: val... and test..., any other is for training."""
    lists: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for name in splits:
        lists[next((kind for kind in ("val", "test") if name.startswith(kind)), "train")].append(f"{name}.txt")
    content = {"path": str(path.parent), **lists, "nc": len(names), "names": dict(enumerate(names))}
    _write_changed(path, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
