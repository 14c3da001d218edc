"""Turns a `LabelSet` into batches for training and evaluation.

Owns loading, resizing and caching of images, the order of the augmentations, and the batching. A sample is a function
of (seed, epoch, index) alone, so batches are equal bit by bit whatever the number of workers.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from utils.augment import (
    AugmentOptions,
    flip_left_right,
    flip_up_down,
    jitter_hsv,
    letterbox,
    mixup,
    mosaic4,
    random_perspective,
    resize_long_side,
    to_centres,
    to_corners,
)
from utils.errors import InputError
from utils.labels import LabelSet, load_image
from utils.log import LOGGER

Item, Result = TypeVar("Item"), TypeVar("Result")

# ((height, width) of the image as displayed, (gain, pad_x, pad_y)): x_input = x_image * gain + pad_x, likewise y.
ShapeInfo = tuple[tuple[int, int], tuple[float, float, float]]


@dataclass(frozen=True)
class DatasetOptions:
    """How samples are made.

    imgsz: long side of the network input, pixels.  augment: None for evaluation.  rect: batches of similar aspect,
    padded as little as `stride` allows plus `pad` strides, in a fixed order and without mosaic; otherwise squares.
    cache: None, "ram" (resized images) or "disk" (decoded images as `.npy` beside them).  single_cls: all classes
    become 0.
    """

    imgsz: int = 640
    augment: AugmentOptions | None = None
    rect: bool = False
    stride: int = 32
    pad: float = 0.0
    batch_size: int = 16
    cache: str | None = None
    single_cls: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.cache not in (None, "ram", "disk"):
            raise InputError(f"--cache {self.cache}: expected ram or disk")
        if self.batch_size < 1:
            raise InputError(f"--batch-size {self.batch_size}: must be at least 1")
        if self.seed < 0:
            raise InputError(f"--seed {self.seed}: must not be negative")


@dataclass(frozen=True, eq=False)
class Sample:
    """One network input.

    image: uint8 (3, H, W) RGB.  labels: float32 (n, 6), [0, class, cx, cy, w, h] normalised to (W, H); collating fills
    in column 0.  index: position in the LabelSet.  `shape` leads back to the original image only without augmentation.
    """

    image: torch.Tensor
    labels: torch.Tensor
    index: int
    shape: ShapeInfo
    path: Path


@dataclass(frozen=True, eq=False)
class Batch:
    """Samples of one size.

    images: uint8 (B, 3, H, W) RGB.  targets: float32 (M, 6), [image in batch, class, cx, cy, w, h] normalised to
    (W, H).  indices, shapes, paths: one per image, as in `Sample`.
    """

    images: torch.Tensor
    targets: torch.Tensor
    indices: tuple[int, ...]
    shapes: tuple[ShapeInfo, ...]
    paths: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.images)

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory; the name is the one that torch's loader calls."""
        return Batch(self.images.pin_memory(), self.targets.pin_memory(), self.indices, self.shapes, self.paths)


class DetectionDataset(Dataset):
    """Samples of a LabelSet: `dataset[epoch, position]`. Positions follow the LabelSet, or with `rect` the aspect."""

    def __init__(self, labels: LabelSet, options: DatasetOptions) -> None:
        self.labels = labels
        self.options = options
        self._centres = tuple(_without_classes(rows) for rows in labels.labels) if options.single_cls else labels.labels
        self._order = np.arange(len(labels))
        self._shapes = np.zeros((0, 2), np.int64)
        if options.rect:
            aspects = labels.sizes[:, 1] / labels.sizes[:, 0]
            # Not a stable sort: equal aspects in another order fall into other batches, hence other paddings, and the
            # published figures were measured with this one.
            self._order = np.argsort(aspects, kind="quicksort")
            self._shapes = rect_shapes(aspects[self._order], options)
        self._ram: list[tuple[np.ndarray, tuple[int, int]]] = []
        if options.cache == "ram":
            self._fill_ram()
        elif options.cache == "disk":
            _fill_disk(labels)

    def __len__(self) -> int:
        return len(self.labels)

    def input_shape(self, position: int) -> tuple[int, int]:
        """Return the network input (height, width) of the batch that a position belongs to."""
        if not self.options.rect:
            return self.options.imgsz, self.options.imgsz
        height, width = self._shapes[position // self.options.batch_size]
        return int(height), int(width)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, position = key
        index = int(self._order[position])
        if self.options.augment is None:
            image, centres, shape = self._plain(index, self.input_shape(position))
        else:
            rng = np.random.default_rng([self.options.seed, epoch, index])
            image, centres, shape = self._augmented(index, self.input_shape(position), rng, self.options.augment)
        labels = np.zeros((len(centres), 6), np.float32)
        labels[:, 1:] = centres
        planes = np.ascontiguousarray(image.transpose(2, 0, 1)[::-1])  # HWC BGR -> CHW RGB
        return Sample(torch.from_numpy(planes), torch.from_numpy(labels), index, shape, self.labels.images[index])

    def _plain(self, index: int, input_shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, ShapeInfo]:
        """Return image, centres and shape of an image letterboxed into the input."""
        image, corners, shape = self._letterboxed(index, input_shape, scale_up=False)
        return image, to_centres(corners, image.shape[1], image.shape[0]), shape

    def _augmented(
        self, index: int, input_shape: tuple[int, int], rng: np.random.Generator, options: AugmentOptions
    ) -> tuple[np.ndarray, np.ndarray, ShapeInfo]:
        if not self.options.rect and rng.random() < options.mosaic:
            image, corners = self._mosaic(index, rng, options)
            if rng.random() < options.mixup:
                other = self._mosaic(int(rng.integers(len(self))), rng, options)
                image, corners = mixup((image, corners), other, rng)
            width0, height0 = self.labels.sizes[index].tolist()
            shape = ((height0, width0), (1.0, 0.0, 0.0))
        else:
            image, corners, shape = self._letterboxed(index, input_shape, scale_up=True)
            image, corners = random_perspective(image, corners, rng, options)

        centres = to_centres(corners, image.shape[1], image.shape[0])
        image = jitter_hsv(image, rng, options)
        if rng.random() < options.flipud:
            image, centres = flip_up_down(image, centres)
        if rng.random() < options.fliplr:
            image, centres = flip_left_right(image, centres)
        return image, centres, shape

    def _mosaic(self, index: int, rng: np.random.Generator, options: AugmentOptions) -> tuple[np.ndarray, np.ndarray]:
        """Return image and corners of a mosaic of this image and three drawn ones, warped back to imgsz."""
        members = np.array([index, *rng.integers(len(self), size=3)])
        rng.shuffle(members)
        tiles = [(self._sized(member)[0], self._centres[member]) for member in members]
        canvas, corners = mosaic4(tiles, self.options.imgsz, rng)
        return random_perspective(canvas, corners, rng, options, (self.options.imgsz, self.options.imgsz))

    def _letterboxed(self, index: int, input_shape: tuple[int, int], *, scale_up: bool) -> tuple[np.ndarray, np.ndarray, ShapeInfo]:
        sized, (height0, width0) = self._sized(index)
        height, width = sized.shape[:2]
        image, gain, (pad_x, pad_y) = letterbox(sized, input_shape, scale_up=scale_up)
        corners = to_corners(self._centres[index], width * gain, height * gain, pad_x, pad_y)
        return image, corners, ((height0, width0), (gain * height / height0, pad_x, pad_y))

    def _sized(self, index: int) -> tuple[np.ndarray, tuple[int, int]]:
        """Return an image with its long side at imgsz, not to be written to, and its original (height, width)."""
        return self._ram[index] if self._ram else self._load_sized(index)

    def _load_sized(self, index: int) -> tuple[np.ndarray, tuple[int, int]]:
        path = self.labels.images[index]
        image = _load_decoded(path) if self.options.cache == "disk" else load_image(path)
        return resize_long_side(image, self.options.imgsz, smooth=self.options.augment is None), image.shape[:2]

    def _fill_ram(self) -> None:
        """Keep every resized image in memory, if there is enough of it."""
        scale = self.options.imgsz / self.labels.sizes.max(axis=1)
        needed = int(3 * (self.labels.sizes.prod(axis=1) * scale**2).sum())
        available = _available_memory()
        if available is not None and needed > 0.8 * available:
            sizes = f"{needed / 1e9:.1f} GB of {available / 1e9:.1f} GB available"
            LOGGER.warning(f"--cache ram: needs {sizes}; images are read as needed")
            return
        self._ram = _in_threads(self._load_sized, range(len(self)), f"caching images ({needed / 1e9:.1f} GB)")


def rect_shapes(aspects: np.ndarray, options: DatasetOptions) -> np.ndarray:
    """Return the input (height, width) of each batch, int64 (batches, 2), for ascending aspects = height / width."""
    shapes = []
    for start in range(0, len(aspects), options.batch_size):
        low, high = aspects[start], aspects[start : start + options.batch_size][-1]
        if high < 1:
            shapes.append((high, 1.0))
        elif low > 1:
            shapes.append((1.0, 1 / low))
        else:
            shapes.append((1.0, 1.0))
    strides = np.ceil(np.array(shapes) * options.imgsz / options.stride + options.pad)
    return strides.astype(np.int64) * options.stride


def _without_classes(rows: np.ndarray) -> np.ndarray:
    single = rows.copy()
    single[:, 0] = 0
    return single


# Image cache ----------------------------------------------------------------------------------------------------------


def _in_threads(work: Callable[[Item], Result], items: Sequence[Item], description: str) -> list[Result]:
    """Map in a few threads with a progress bar; decoding and resizing release the interpreter lock."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(tqdm(pool.map(work, items), total=len(items), desc=description, disable=None, leave=False))


def _available_memory() -> int | None:
    """Return the bytes of memory that can be taken without swapping, or None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return None


def _fill_disk(labels: LabelSet) -> None:
    """Write each decoded image as `.npy` beside it, unless a newer one is there."""
    needed = int(3 * labels.sizes.prod(axis=1).sum())
    free = shutil.disk_usage(labels.images[0].parent).free
    if needed > 0.9 * free:
        sizes = f"{needed / 1e9:.1f} GB of {free / 1e9:.1f} GB free"
        LOGGER.warning(f"--cache disk: needs {sizes}; images are decoded as needed")
        return
    failures = [error for error in _in_threads(_write_decoded, labels.images, "caching images on disk") if error]
    if failures:
        LOGGER.warning(f"--cache disk: {len(failures)} images not cached, e.g. {failures[0]}; decoded as needed")


def _npy_path(image: Path) -> Path:
    return image.with_name(f"{image.name}.npy")


def _is_current(cached: Path, image: Path) -> bool:
    return cached.is_file() and cached.stat().st_mtime_ns >= image.stat().st_mtime_ns


def _write_decoded(image: Path) -> str:
    """Write an image's `.npy` whole or not at all; return what went wrong, or an empty string."""
    cached = _npy_path(image)
    temporary = cached.with_name(f".{cached.name}.{os.getpid()}")
    try:
        if not _is_current(cached, image):
            with open(temporary, "wb") as file:
                np.save(file, load_image(image), allow_pickle=False)
            os.replace(temporary, cached)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        return f"{cached}: {error.strerror}"
    return ""


def _load_decoded(image: Path) -> np.ndarray:
    """Read an image from its `.npy`, or the image itself where that is missing, older or damaged."""
    cached = _npy_path(image)
    with contextlib.suppress(OSError, ValueError, EOFError):
        if _is_current(cached, image):
            content = np.load(cached, allow_pickle=False)
            if content.dtype == np.uint8 and content.ndim == 3 and content.shape[2] == 3:
                return content
    return load_image(image)


# Batches --------------------------------------------------------------------------------------------------------------


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack samples of one size into a batch and write each one's place into column 0 of its labels."""
    # In numpy: torch would start its threads to copy a few megabytes, which costs more than the copy on a busy machine.
    targets = np.concatenate([sample.labels.numpy() for sample in samples])
    targets[:, 0] = np.repeat(np.arange(len(samples)), [len(sample.labels) for sample in samples])
    return Batch(
        images=torch.from_numpy(np.stack([sample.image.numpy() for sample in samples])),
        targets=torch.from_numpy(targets),
        indices=tuple(sample.index for sample in samples),
        shapes=tuple(sample.shape for sample in samples),
        paths=tuple(sample.path for sample in samples),
    )


class EpochBatchSampler(Sampler[list[tuple[int, int]]]):
    """Yields batches of (epoch, position) keys; the last one may be short. Set `epoch` before each iteration."""

    def __init__(self, count: int, batch_size: int, shuffle: bool, seed: int) -> None:
        self.count = count
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return -(-self.count // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return self._batches(self.epoch)  # bound now: a generator of its own would read it at the first batch only

    def _batches(self, epoch: int) -> Iterator[list[tuple[int, int]]]:
        positions = np.arange(self.count)
        if self.shuffle:
            positions = np.random.default_rng([self.seed, epoch]).permutation(self.count)
        for start in range(0, self.count, self.batch_size):
            yield [(epoch, int(position)) for position in positions[start : start + self.batch_size]]


class _Batches(Dataset):
    """Whole batches of a dataset by their keys, so that one item is one batch on its way between processes.

    A wrong input comes back as the error itself: torch's loader would bury its one line in a worker's traceback.
    """

    def __init__(self, dataset: DetectionDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, keys: Sequence[tuple[int, int]]) -> Batch | InputError:
        try:
            return collate([self.dataset[key] for key in keys])
        except InputError as error:
            return error


class EpochLoader:
    """Batches of a dataset, epoch by epoch; worker processes are started once and kept. Built by `make_loader`."""

    def __init__(self, dataset: DetectionDataset, workers: int, shuffle: bool, pin_memory: bool) -> None:
        self.dataset = dataset
        options = dataset.options
        self._sampler = EpochBatchSampler(len(dataset), options.batch_size, shuffle, options.seed)
        self._loader = DataLoader(
            _Batches(dataset),
            batch_size=None,  # the sampler's items are batches already
            sampler=self._sampler,
            num_workers=workers,
            collate_fn=_as_is,
            pin_memory=pin_memory,
            worker_init_fn=_start_worker,
            persistent_workers=workers > 0,
            # A generator of its own: otherwise each epoch would advance torch's global one.
            generator=torch.Generator().manual_seed(options.seed),
        )

    def __len__(self) -> int:
        """Number of batches in an epoch."""
        return len(self._sampler)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Iterate over the batches of an epoch, one epoch at a time. Raises InputError if an image has vanished."""
        self._sampler.epoch = epoch
        return map(_checked, iter(self._loader))


def _as_is(batch: Batch | InputError) -> Batch | InputError:
    return batch


def _start_worker(worker: int) -> None:
    cv2.setNumThreads(0)  # the workers are the parallelism
    # Ctrl-C and a batch system's SIGTERM reach every process of a group. The main one ends its workers; one that dies of a signal of its
    # own would be reported as an error, in the middle of that.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))


def _checked(batch: Batch | InputError) -> Batch:
    if isinstance(batch, InputError):
        # A new error, since a frame that holds the error it raises is a cycle, which would keep the workers alive.
        raise InputError(str(batch))
    # A tensor from a worker holds a file descriptor for as long as it lives, and targets are what callers collect.
    return replace(batch, targets=batch.targets.clone()) if batch.targets.is_shared() else batch


def make_loader(dataset: DetectionDataset, workers: int = 0, shuffle: bool = False, pin_memory: bool = False) -> EpochLoader:
    """Build the loader of a dataset, with the batch size and seed of its options.

    At most as many workers as processors and batches; 0 loads in this process. Rectangular batches are never shuffled.
    """
    batches = -(-len(dataset) // dataset.options.batch_size)
    workers = min(workers, os.cpu_count() or 1, batches)
    return EpochLoader(dataset, workers, shuffle and not dataset.options.rect, pin_memory)
