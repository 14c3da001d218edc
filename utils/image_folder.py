"""Image-folder data sets, for classification: `ROOT/train/CLASS/*.jpg` and `ROOT/val/CLASS/*.jpg` (or `test`).

Owns what `--data` may name for a classifier, which images are used, and how a sample is cut out of an image. A sample is one of
`utils.dataset` whose only box is the whole image, so loaders, loop and pictures are those of detection.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset

from utils.augment import AugmentOptions, flip_left_right, flip_up_down, jitter_hsv
from utils.data_config import SPLITS, read_data
from utils.dataset import DatasetOptions, Sample
from utils.errors import InputError
from utils.labels import LabelSet, image_size, list_images, load_image
from utils.log import LOGGER
from utils.planes import to_planes

_LAYOUT = "a classifier's data is a folder with train/CLASS/*.jpg and val/CLASS/*.jpg (or test), or a yaml that names such folders"


@dataclass(frozen=True)
class ImageFolders:
    """A data set: the class names, and the folder of each split that it has. `source`: what `--data` said."""

    source: Path
    names: tuple[str, ...]
    splits: dict[str, Path]

    def folder(self, split: str) -> Path:
        """The folder of a split; val and test stand in for each other. Raises `InputError` where there is none."""
        order = (split, *(other for other in ("val", "test") if split != "train"))
        found = next((self.splits[s] for s in order if s in self.splits), None)
        if found is None:
            raise InputError(f"--data {self.source}: has no split {split!r}; {_LAYOUT}")
        return found


def read_image_folders(data: str | Path) -> ImageFolders:
    """Read `--data` of a classifier: a folder, or a dataset yaml whose splits are folders with a subfolder per class.

    Of a folder the classes are the subfolders of `train`, sorted by name. Raises `InputError` for a layout that is none.
    """
    if Path(data).is_dir():
        root = Path(os.path.abspath(data))
        splits = {split: root / split for split in SPLITS if (root / split).is_dir()}
        folders = ImageFolders(root, _subfolders(splits["train"]) if "train" in splits else (), splits)
    else:
        config = read_data(data, ("train",))
        several = [split for split in SPLITS if len(getattr(config, split)) > 1]
        if several:
            raise InputError(f"--data {data}: `{several[0]}` lists several folders; a classifier takes one, with a subfolder per class")
        splits = {split: getattr(config, split)[0] for split in SPLITS if getattr(config, split) and getattr(config, split)[0].is_dir()}
        folders = ImageFolders(config.source, config.names, splits)
    if not folders.names or not any(_subfolders(folder) for folder in splits.values()):
        raise InputError(f"--data {data}: has no class folders; {_LAYOUT}")
    for folder in splits.values():
        unknown = sorted(set(_subfolders(folder)) - set(folders.names))
        if unknown:
            raise InputError(
                f"--data {data}: the folder {folder / unknown[0]} is none of the {len(folders.names)} classes; rename or list it"
            )
    return folders


def _subfolders(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")))


def scan_folder(folder: Path, names: Sequence[str], *, quiet: bool = False) -> LabelSet:
    """The usable images below `folder` with their classes; each label is one box, the whole image.

    Bad images are counted, named in the log and left out. Raises `InputError` where none is left.
    """
    listed = [(path, c) for c, name in enumerate(names) if (folder / name).is_dir() for path in list_images([folder / name])]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # decoding releases the interpreter lock
        outcomes = list(pool.map(lambda item: _inspected(item[0]), listed))
    kept = [i for i, (size, _) in enumerate(outcomes) if size is not None]
    messages = tuple(message for _, message in outcomes if message)
    if not quiet:
        for message in messages:
            LOGGER.warning(message)
        LOGGER.info(f"{folder}: {len(kept)} images of {len({listed[i][1] for i in kept})} classes, {len(listed) - len(kept)} corrupt")
    if not kept:
        raise InputError(f"no usable image in {folder}: {f'all {len(listed)} are corrupt, e.g. {messages[0]}' if listed else _LAYOUT}")
    return LabelSet(
        images=tuple(listed[i][0] for i in kept),
        labels=tuple(np.array([[listed[i][1], 0.5, 0.5, 1, 1]], np.float32) for i in kept),
        sizes=np.array([outcomes[i][0] for i in kept], np.int64),
        found=len(kept), missing=0, empty=0, corrupt=len(listed) - len(kept), messages=messages,
    )  # fmt: skip


def _inspected(path: Path) -> tuple[tuple[int, int] | None, str]:
    try:
        return image_size(path)[0], ""
    except (OSError, ValueError, MemoryError) as error:
        return None, f"{path}: image ignored: {error}"


class ClassificationDataset(Dataset):
    """Samples of a `LabelSet` of `scan_folder`: `dataset[epoch, position]`, square images of `options.imgsz`.

    For evaluation the largest centred square is resized. With `options.augment` it is a square at a random place, its side the share
    U(1 - scale, 1) of the image's short one; then hue, saturation and value vary, and it is flipped, with the strengths and probabilities
    of the hyp file. What else that file says (mosaic, degrees, ...) is for boxes.
    """

    def __init__(self, labels: LabelSet, options: DatasetOptions) -> None:
        self.labels, self.options = labels, options

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: tuple[int, ...]) -> Sample:
        epoch, index, *_ = key
        path, side = self.labels.images[index], self.options.imgsz
        image = load_image(path)
        height, width = image.shape[:2]
        if self.options.augment is None:
            image = cut_square(image, 1.0, 0.5, 0.5, side)
        else:
            image = augmented(image, side, np.random.default_rng([self.options.seed, epoch, index]), self.options.augment)
        labels = np.zeros((1, 6), np.float32)
        labels[0, 1:] = self.labels.labels[index][0]
        planes = to_planes(image, self.options.channels)
        return Sample(torch.from_numpy(planes), torch.from_numpy(labels), index, ((height, width), (1.0, 0.0, 0.0)), path)


def augmented(image: np.ndarray, side: int, rng: np.random.Generator, options: AugmentOptions) -> np.ndarray:
    """A random variation (side, side, 3) of a BGR image; see `ClassificationDataset`."""
    share, x, y = 1 - options.scale * rng.random(), rng.random(), rng.random()
    image = jitter_hsv(cut_square(image, share, x, y, side), rng, options)
    none = np.zeros((0, 5), np.float32)
    if rng.random() < options.flipud:
        image, _ = flip_up_down(image, none)
    if rng.random() < options.fliplr:
        image, _ = flip_left_right(image, none)
    return image


def cut_square(image: np.ndarray, share: float, x: float, y: float, side: int) -> np.ndarray:
    """The square whose side is `share` of the image's short one, resized to `side`. `x`, `y`: where in 0..1 of the room that it has."""
    height, width = image.shape[:2]
    cut = max(round(share * min(height, width)), 1)
    left, top = round(x * (width - cut)), round(y * (height - cut))
    square = image[top : top + cut, left : left + cut]
    return cv2.resize(square, (side, side), interpolation=cv2.INTER_AREA if cut > side else cv2.INTER_LINEAR)
