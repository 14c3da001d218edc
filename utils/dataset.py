"""Turns a `LabelSet` into batches for training and evaluation.

Owns loading, resizing and caching of images, the order of the augmentations, and the batching. A sample is a function
of (seed, epoch, index) alone, so batches are equal bit by bit whatever the number of workers.
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from utils.augment import (
    AugmentOptions,
    flip_left_right,
    flip_up_down,
    jitter_hsv,
    letterbox,
    long_side_shape,
    mixup,
    mosaic4,
    quad,
    random_perspective,
    resize_long_side,
    to_centres,
    to_corners,
)
from utils.errors import InputError
from utils.image_cache import RamImages, fill_disk, fits_in_memory, load_decoded
from utils.labels import LabelSet, load_image
from utils.planes import resize_planes, stack, to_planes
from utils.world import SOLO, World

# ((height, width) of the image as displayed, (gain, pad_x, pad_y)): x_input = x_image * gain + pad_x, likewise y.
ShapeInfo = tuple[tuple[int, int], tuple[float, float, float]]


@dataclass(frozen=True)
class DatasetOptions:
    """How samples are made.

    imgsz: long side of the network input, pixels.  augment: None for evaluation.  rect: batches of similar aspect,
    padded as little as `stride` allows plus `pad` strides, in a fixed order and without mosaic; otherwise squares.
    cache: None, "ram" (resized images) or "disk" (decoded images as `.npy` beside them).  single_cls: all classes
    become 0.  multi_scale: every batch at another size, 0.5 to 1.5 times imgsz.  channels: of the network's input, 3 (RGB)
    or 1 (grey; augmented in colour, then converted).  quad: four samples become one of twice the size, so a batch is a
    quarter of `batch_size` images.  shape: a (height, width) in the place of the square, for a network that takes no other.

    With `augment`, JPEGs at least twice as long as imgsz are decoded at a half, a quarter or an eighth of their size;
    the disk cache and evaluation hold to the whole image.
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
    multi_scale: bool = False
    channels: int = 3
    quad: bool = False
    shape: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.cache not in (None, "ram", "disk"):
            raise InputError(f"--cache {self.cache}: expected ram or disk")
        if self.batch_size < 1:
            raise InputError(f"--batch-size {self.batch_size}: must be at least 1")
        if self.quad and self.batch_size % 4:
            raise InputError(f"--batch-size {self.batch_size}: --quad makes one image of four, so it must be a multiple of 4")
        if self.seed < 0:
            raise InputError(f"--seed {self.seed}: must not be negative")


@dataclass(frozen=True, eq=False)
class Sample:
    """One network input.

    image: uint8 (3, H, W) RGB or (1, H, W) grey, channels last in memory.  labels: float32 (n, 6), [0, class, cx, cy, w, h]
    normalised to (W, H); collating fills in column 0.  index: position in the LabelSet.  `shape` leads back to the original
    image only without augmentation.
    """

    image: torch.Tensor
    labels: torch.Tensor
    index: int
    shape: ShapeInfo
    path: Path


@dataclass(frozen=True, eq=False)
class Batch:
    """Samples of one size.

    images: uint8 (B, 3, H, W) RGB or (B, 1, H, W) grey, channels last in memory, as the network wants them.  targets: float32
    (M, 6), [image in batch, class, cx, cy, w, h] normalised to (W, H).  indices, shapes, paths: one per image, as in `Sample`.
    number: the batch's place in its epoch.  total: images of the whole batch, of which several processes have a slice each.
    """

    images: torch.Tensor
    targets: torch.Tensor
    indices: tuple[int, ...]
    shapes: tuple[ShapeInfo, ...]
    paths: tuple[Path, ...]
    number: int = 0
    total: int = 0

    def __len__(self) -> int:
        return len(self.images)

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory; the name is the one that torch's loader calls."""
        return replace(self, images=self.images.pin_memory(), targets=self.targets.pin_memory())


class DetectionDataset(Dataset):
    """Samples of a LabelSet: `dataset[epoch, position]`. Positions follow the LabelSet, or with `rect` the aspect.

    `dataset[epoch, position, copy]` for copy = 1, 2, ... augments the same image in other ways.
    """

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
        self._ram: RamImages | None = None
        if options.cache == "ram":
            self._fill_ram()
        elif options.cache == "disk":
            fill_disk(labels)

    def __len__(self) -> int:
        return len(self.labels)

    def input_shape(self, position: int) -> tuple[int, int]:
        """Return the network input (height, width) of the batch that a position belongs to."""
        if not self.options.rect:
            return self.options.shape or (self.options.imgsz, self.options.imgsz)
        height, width = self._shapes[position // self.options.batch_size]
        return int(height), int(width)

    def __getitem__(self, key: tuple[int, ...]) -> Sample:
        epoch, position, *copy = key
        index = int(self._order[position])
        if self.options.augment is None:
            image, centres, shape = self._plain(index, self.input_shape(position))
        else:
            stream = (5, *copy) if copy else ()  # 5: neither the streams of whole batches nor those of quads
            rng = np.random.default_rng([self.options.seed, epoch, index, *stream])
            image, centres, shape = self._augmented(index, self.input_shape(position), rng, self.options.augment)
        labels = np.zeros((len(centres), 6), np.float32)
        labels[:, 1:] = centres
        planes = to_planes(image, self.options.channels)
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
        width, height = self.labels.sizes[index].tolist()
        return self._load_sized(index) if self._ram is None else self._ram[index], (height, width)

    def _load_sized(self, index: int) -> np.ndarray:
        path, imgsz, training = self.labels.images[index], self.options.imgsz, self.options.augment is not None
        width, height = self.labels.sizes[index].tolist()
        if self.options.cache == "disk":
            image = load_decoded(path)
        else:
            image = load_image(path, _reduction(max(width, height), imgsz) if training else 1)
        return resize_long_side(image, imgsz, smooth=not training, original=(height, width))

    def _fill_ram(self) -> None:
        """Keep every resized image in memory, if there is enough of it."""
        shapes = np.array([long_side_shape(height, width, self.options.imgsz) for width, height in self.labels.sizes.tolist()])
        if fits_in_memory(int(3 * shapes.prod(axis=1).sum())):
            self._ram = RamImages(shapes)
            self._ram.fill(self._load_sized)


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


def _reduction(long_side: int, imgsz: int) -> int:
    """Return the largest scale 1/n at which a JPEG can be decoded without its long side falling below imgsz."""
    return next((n for n in (8, 4, 2) if long_side // n >= imgsz), 1)


def _without_classes(rows: np.ndarray) -> np.ndarray:
    single = rows.copy()
    single[:, 0] = 0
    return single


# Batches --------------------------------------------------------------------------------------------------------------


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack samples of one size into a batch and write each one's place into column 0 of its labels."""
    # In numpy: torch would start its threads to copy a few megabytes, which costs more than the copy on a busy machine.
    targets = np.concatenate([sample.labels.numpy() for sample in samples])
    targets[:, 0] = np.repeat(np.arange(len(samples)), [len(sample.labels) for sample in samples])
    return Batch(
        images=stack([sample.image.numpy() for sample in samples]),
        targets=torch.from_numpy(targets),
        indices=tuple(sample.index for sample in samples),
        shapes=tuple(sample.shape for sample in samples),
        paths=tuple(sample.path for sample in samples),
    )


def drawn_size(options: DatasetOptions, epoch: int, number: int) -> int:
    """The long side of batch `number` under `multi_scale`: a multiple of the stride (at least 32) from 0.5 to 1.5 times imgsz, as in YOLOv5."""
    step = max(options.stride, 32)
    rng = np.random.default_rng([options.seed, epoch, number, 2])
    size = int(rng.integers(options.imgsz // 2, int(options.imgsz * 1.5) + step)) // step * step
    return max(size, step)


def rescaled(batch: Batch, size: int, step: int = 32) -> Batch:
    """The batch with its images resized to long side `size`, both sides rounded up to multiples of `step` pixels."""
    height, width = batch.images.shape[2:]
    factor = size / max(height, width)
    new = tuple(-(-int(round(side * factor)) // step) * step for side in (width, height))
    if new == (width, height):
        return batch
    return replace(batch, images=stack([resize_planes(image, new) for image in batch.images.numpy()]))


@dataclass(frozen=True)
class BatchKeys:
    """What makes a batch: its number in the epoch, the dataset's keys of its samples here, and how many groups of samples (images
    of the finished batch) it has over all processes."""

    number: int
    keys: tuple[tuple[int, ...], ...]
    total: int


class EpochBatchSampler(Sampler[BatchKeys]):
    """Yields an epoch's batches. Set `epoch`, and `drawn` if need be, before each iteration.

    The last batch may be short; samples beyond a whole number of `group` are left out, other ones in each shuffled epoch. `drawn`:
    positions to use in the place of each one once; one that comes again is another copy. Of several processes each gets a slice of
    every batch, in order of rank. Where a batch has fewer groups than there are processes, all of them train on the whole of it, for
    each has to have some; in evaluation those without a slice get no batch.
    """

    def __init__(
        self, count: int, batch_size: int, shuffle: bool, seed: int, group: int = 1, world: World = SOLO, training: bool = False
    ) -> None:
        self.count, self.batch_size, self.shuffle, self.seed = count, batch_size, shuffle, seed
        self.group, self.used = group, count - count % group
        self.world, self.training = world, training
        self.epoch = 0
        self.drawn: np.ndarray | None = None

    def __len__(self) -> int:
        return -(-self.used // self.batch_size)

    def __iter__(self) -> Iterator[BatchKeys]:
        return self._batches(self.epoch)  # bound now: a generator of its own would read it at the first batch only

    def _batches(self, epoch: int) -> Iterator[BatchKeys]:
        keys = self._keys(epoch)
        order = np.arange(self.count)
        if self.shuffle:
            order = np.random.default_rng([self.seed, epoch]).permutation(self.count)
        for number, start in enumerate(range(0, self.used, self.batch_size)):
            groups = order[start : min(start + self.batch_size, self.used)].reshape(-1, self.group)
            part = self._slice(groups)
            if len(part):
                yield BatchKeys(number, tuple(keys[i] for i in part.flat), len(groups))

    def _keys(self, epoch: int) -> list[tuple[int, ...]]:
        if self.drawn is None:
            return [(epoch, position) for position in range(self.count)]
        seen: Counter[int] = Counter()
        keys: list[tuple[int, ...]] = []
        for position in self.drawn.tolist():
            keys.append((epoch, position, seen[position]) if seen[position] else (epoch, position))
            seen[position] += 1
        return keys

    def _slice(self, groups: np.ndarray) -> np.ndarray:
        if self.training and len(groups) < self.world.size:
            return groups
        return np.array_split(groups, self.world.size)[self.world.rank]


class _Batches(Dataset):
    """Whole batches of a dataset by their keys, so that one item is one batch on its way between processes.

    A wrong input comes back as the error itself: torch's loader would bury its one line in a worker's traceback.
    """

    def __init__(self, dataset: DetectionDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, wanted: BatchKeys) -> Batch | InputError:
        options = self.dataset.options
        try:
            samples = [self.dataset[key] for key in wanted.keys]
            batch = collate(self._quads(samples, wanted.keys[0][0]) if options.quad else samples)
            if options.multi_scale:
                batch = rescaled(batch, drawn_size(options, wanted.keys[0][0], wanted.number), max(options.stride, 32))
            return replace(batch, number=wanted.number, total=wanted.total)
        except InputError as error:
            return error

    def _quads(self, samples: Sequence[Sample], epoch: int) -> list[Sample]:
        """Make one sample of every four; it keeps the first one's index, shape and path."""
        merged = []
        for first, *others in zip(*[iter(samples)] * 4, strict=True):
            rng = np.random.default_rng([self.dataset.options.seed, epoch, first.index, 4])  # 4: not the samples' own stream
            four = (first, *others)
            image, labels = quad([sample.image.numpy() for sample in four], [sample.labels.numpy() for sample in four], rng)
            merged.append(replace(first, image=torch.from_numpy(image), labels=torch.from_numpy(labels)))
        return merged


class EpochLoader:
    """Batches of a dataset, epoch by epoch; worker processes are started once and kept. Built by `make_loader`."""

    def __init__(self, dataset: DetectionDataset, workers: int, shuffle: bool, pin_memory: bool, world: World = SOLO) -> None:
        self.dataset = dataset
        options = dataset.options
        group, training = 4 if options.quad else 1, options.augment is not None
        self._sampler = EpochBatchSampler(len(dataset), options.batch_size, shuffle, options.seed, group, world, training)
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

    def draw(self, positions: np.ndarray | None) -> None:
        """Use these positions (len(dataset),) from the next epoch on, some of them several times; None: each once."""
        self._sampler.drawn = positions

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


def make_loader(
    dataset: DetectionDataset, workers: int = 0, shuffle: bool = False, pin_memory: bool = False, world: World = SOLO
) -> EpochLoader:
    """Build the loader of a dataset, with the batch size and seed of its options.

    At most as many workers as processors and batches; 0 loads in this process. Rectangular batches are never shuffled.
    """
    if dataset.options.quad and len(dataset) < 4:
        raise InputError(f"--quad makes one image of four, and there are only {len(dataset)}")
    batches = -(-len(dataset) // dataset.options.batch_size)
    workers = min(workers, os.cpu_count() or 1, batches)
    return EpochLoader(dataset, workers, shuffle and not dataset.options.rect, pin_memory, world)
