"""Keeps images for the next epochs: resized in memory (`RamImages`), or decoded as `.npy` files beside them.

What is kept is decided in `utils.dataset`.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
from tqdm import tqdm

from utils.labels import LabelSet, load_image
from utils.log import LOGGER

Item, Result = TypeVar("Item"), TypeVar("Result")


class RamImages:
    """Images of known shapes (n, 2; height, width), uint8 (height, width, 3), in one block of memory.

    The block is an anonymous shared mapping: loader processes read the pages themselves, and the process that filled it
    does not keep them in its own memory.
    """

    def __init__(self, shapes: np.ndarray) -> None:
        self.shapes = shapes
        self._ends = np.cumsum(3 * shapes.prod(axis=1, dtype=np.int64))
        self._size = int(self._ends[-1])
        self._block = mmap.mmap(-1, self._size)

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, index: int) -> np.ndarray:
        """Return an image as a view that cannot be written to."""
        view = self._view(index)
        view.setflags(write=False)
        return view

    def _view(self, index: int) -> np.ndarray:
        height, width = self.shapes[index].tolist()
        size = 3 * height * width
        return np.frombuffer(self._block, np.uint8, size, int(self._ends[index]) - size).reshape(height, width, 3)

    def fill(self, load: Callable[[int], np.ndarray]) -> None:
        """Load every image, in a few threads, and release the pages."""

        def put(index: int) -> None:
            self._view(index)[...] = load(index)

        in_threads(put, range(len(self)), f"caching images ({self._size / 1e9:.1f} GB)")
        if sys.platform == "linux":  # the system keeps the content of a shared page for whoever reads it next
            self._block.madvise(mmap.MADV_DONTNEED)

    def __reduce__(self) -> tuple:
        return _restore, (self.shapes, self._block[:])  # where worker processes are not forked, each gets a copy


def _restore(shapes: np.ndarray, content: bytes) -> RamImages:
    images = RamImages(shapes)
    images._block[:] = content
    return images


def fits_in_memory(needed: int) -> bool:
    """Whether `needed` bytes leave a fifth of the available memory free; if not, a warning says so."""
    available = _available_memory()
    if available is None or needed <= 0.8 * available:
        return True
    LOGGER.warning(f"--cache ram: needs {needed / 1e9:.1f} GB of {available / 1e9:.1f} GB available; images are read as needed")
    return False


def in_threads(work: Callable[[Item], Result], items: Sequence[Item], description: str) -> list[Result]:
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


def fill_disk(labels: LabelSet) -> None:
    """Write each decoded image as `.npy` beside it, unless a newer one is there."""
    needed = int(3 * labels.sizes.prod(axis=1).sum())
    free = shutil.disk_usage(labels.images[0].parent).free
    if needed > 0.9 * free:
        sizes = f"{needed / 1e9:.1f} GB of {free / 1e9:.1f} GB free"
        LOGGER.warning(f"--cache disk: needs {sizes}; images are decoded as needed")
        return
    failures = [error for error in in_threads(_write_decoded, labels.images, "caching images on disk") if error]
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


def load_decoded(image: Path) -> np.ndarray:
    """Read an image from its `.npy`, or the image itself where that is missing, older or damaged."""
    cached = _npy_path(image)
    with contextlib.suppress(OSError, ValueError, EOFError):
        if _is_current(cached, image):
            content = np.load(cached, allow_pickle=False)
            if content.dtype == np.uint8 and content.ndim == 3 and content.shape[2] == 3:
                return content
    return load_image(image)
