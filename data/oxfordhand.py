"""The Oxford hand dataset's `.mat` annotations -> YOLO labels (Mittal, Zisserman and Torr, "Hand detection using multiple proposals", 2011).

As distributed, `hand_dataset/{training,validation,test}_dataset/*/` hold `images/*.jpg` and `annotations/*.mat`. A file's
`boxes` is a cell array of hands; each is a struct whose fields a, b, c, d are the corners of a rotated rectangle, as (y, x) in
pixels. The label is the smallest upright box around them.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.layout import Corners, Item, Skips, Split, image_size, images_by_stem, normalised
from utils.errors import InputError

NAMES = ("hand",)
_FOLDERS = {"train": "training_dataset", "val": "validation_dataset", "test": "test_dataset"}
_CORNERS = ("a", "b", "c", "d")


def read_oxfordhand(source: Path, skips: Skips) -> list[Split]:
    """Read the splits that are below `source`; raises InputError if there is none."""
    source = Path(os.path.abspath(source))
    folders = [_FOLDERS[name] for name in _FOLDERS]
    if (source / "hand_dataset").is_dir():
        source = source / "hand_dataset"
    splits = [_split(name, source / folder, skips) for name, folder in _FOLDERS.items() if (source / folder).is_dir()]
    if not any(split.items for split in splits):
        first = f" (all were skipped, e.g. {skips.lines()[0]})" if skips.reasons else ""
        raise InputError(f"{source}: no Oxford hand dataset{first}: expected {', '.join(folders)} with images and annotations/*.mat below")
    return splits


def _split(name: str, folder: Path, skips: Skips) -> Split:
    files = sorted(path for path in folder.rglob("annotations/*.mat") if not path.name.startswith("."))
    pictures = {
        parent: images_by_stem(parent / "images") for parent in {path.parent.parent for path in files} if (parent / "images").is_dir()
    }
    items = []
    for path in tqdm(files, desc=f"reading {name}", unit="file", disable=None, leave=False):
        try:
            items.append(_item(path, pictures.get(path.parent.parent, {}), skips))
        except ValueError as error:
            skips.add(str(error), f"{name}/{path.name}")
    return Split(name, tuple(items))


def _item(path: Path, pictures: dict[str, Path], skips: Skips) -> Item:
    """Convert one file; ValueError with the reason if the image has to be left out."""
    image = pictures.get(path.stem)
    if image is None:
        raise ValueError("no image")
    hands = read_corners(path)
    try:
        size = image_size(image)
    except InputError:
        raise ValueError("unreadable image") from None
    rows = [normalised(0, corners, size) for corners in hands]
    for k, row in enumerate(rows):
        if row is None:
            skips.add("box without area in the image", f"{path.name} hand {k + 1}")
    return Item(image, image.name, tuple(row for row in rows if row))


def read_corners(path: Path) -> list[Corners]:
    """Return the upright box (x1, y1, x2, y2) in pixels around each hand of a `.mat`; ValueError if it cannot be read."""
    from scipy.io import loadmat  # needed only here

    try:
        boxes = loadmat(path, variable_names=["boxes"], squeeze_me=True, struct_as_record=False).get("boxes")
    except Exception:  # a damaged file makes scipy raise nearly anything: IndexError, TypeError, zlib.error, ...
        raise ValueError("broken .mat") from None
    if boxes is None:
        raise ValueError(".mat without `boxes`")
    return [_upright(hand) for hand in np.ravel(np.asarray(boxes, dtype=object))]


def _upright(hand: object) -> Corners:
    points = [getattr(hand, corner, None) for corner in _CORNERS]
    try:
        y, x = np.array([np.asarray(point, float).ravel()[:2] for point in points]).T
    except (TypeError, ValueError):
        raise ValueError(".mat whose `boxes` have no corners a, b, c, d") from None
    return float(x.min()), float(y.min()), float(x.max()), float(y.max())
