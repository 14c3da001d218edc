"""Finds images and their label files, reads and checks them, and remembers the result in a cache without pickle.

Owns which files are images, where an image's labels lie, which of both are left out, and `load_image`. What a valid row
is belongs to `utils.label_rows`; what is done to the pixels and boxes afterwards, to `utils.augment` and `utils.dataset`.
Nothing here ever writes to an image or a label.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from utils.errors import InputError, did_you_mean
from utils.label_rows import parse_labels
from utils.log import LOGGER

IMAGE_SUFFIXES = frozenset(f".{kind}" for kind in "bmp dng jpeg jpg mpo pfm png tif tiff webp".split())
MIN_SIDE = 10  # pixels
MAX_PIXELS = 178_956_970  # Pillow's guard against decompression bombs, at which YOLOv5 ignores an image
_CACHE_VERSION = 2
_JPEG_START, _JPEG_END = b"\xff\xd8", b"\xff\xd9"
_PROBE = bytes(range(1, 255))  # stands in for the missing rest of a JPEG
_COLOUR = {1: cv2.IMREAD_COLOR, 2: cv2.IMREAD_REDUCED_COLOR_2, 4: cv2.IMREAD_REDUCED_COLOR_4, 8: cv2.IMREAD_REDUCED_COLOR_8}


@dataclass(frozen=True, eq=False)
class LabelSet:
    """The usable images of a split and their boxes; position i means the same image in `images`, `labels` and `sizes`.

    labels: per image float32 (n, 5), [class, cx, cy, w, h] normalised to the image.  sizes: int64 (len, 2), (width,
    height) as displayed, i.e. after EXIF orientation.  found + missing = len: images with and without a label file;
    empty counts those of `found` without a row; corrupt counts the dropped images.  messages: one line per image that
    was dropped or mended.
    """

    images: tuple[Path, ...]
    labels: tuple[np.ndarray, ...]
    sizes: np.ndarray
    found: int
    missing: int
    empty: int
    corrupt: int
    messages: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)

    @property
    def instances(self) -> int:
        """Number of boxes."""
        return sum(len(rows) for rows in self.labels)

    def subset(self, positions: Sequence[int]) -> LabelSet:
        """Some of the images, in that order. What was counted and said of the whole split stays."""
        images, labels = ([items[i] for i in positions] for items in (self.images, self.labels))
        return replace(self, images=tuple(images), labels=tuple(labels), sizes=self.sizes[list(positions)])


@dataclass(frozen=True, eq=False)
class _Inspected:
    """One image's outcome; `rows` is None if the image has to be dropped."""

    size: tuple[int, int]
    rows: np.ndarray | None
    has_file: bool
    messages: tuple[str, ...]


# Images ---------------------------------------------------------------------------------------------------------------


def load_image(path: str | Path, reduction: int = 1) -> np.ndarray:
    """Read an image as uint8 (height, width, 3) in BGR, turned upright by its EXIF orientation.

    Gray, palette, CMYK and 16-bit images are converted; an alpha channel is dropped. A JPEG without its end marker is
    read as far as it goes. `reduction` (1, 2, 4, 8) decodes a JPEG straight to that share of its sides, rounded up;
    other formats come whole. Raises InputError for a file that is gone or no image.
    """
    try:
        image, _ = _decode(path, _COLOUR[reduction])
    except (OSError, ValueError) as error:
        hint = "; was it moved or deleted?" if isinstance(error, FileNotFoundError) else ""
        raise InputError(f"image {_shown(path)}: {_reason(error)}{hint}") from None
    if image is None:
        raise InputError(f"image {_shown(path)}: cannot be read as an image; remove or replace it")
    # OpenCV hands some single-channel formats (PFM) over as they are, whatever the flag.
    return image if image.ndim == 3 else cv2.cvtColor(image, cv2.COLOR_GRAY2BGR)


def _decode(path: str | Path, flags: int) -> tuple[np.ndarray | None, bool]:
    """Decode a file; return the image (None if it is none) and whether its JPEG end marker had to be supplied."""
    _check_path(path)
    content = np.fromfile(path, dtype=np.uint8)  # unlike cv2.imread, takes any path on any system
    is_jpeg = content[:2].tobytes() == _JPEG_START
    if flags in _COLOUR.values() and not is_jpeg:
        flags = cv2.IMREAD_COLOR  # OpenCV would decode it whole and shrink it afterwards
    image = _decode_bytes(content, flags)
    if image is None and is_jpeg:
        return _decode_bytes(np.append(content, np.frombuffer(_JPEG_END, np.uint8)), flags), True
    return image, False


def _check_path(path: str | Path) -> None:
    """Raise OSError or ValueError for a path that must not be opened, or not be passed on."""
    try:
        str(path).encode()
    except UnicodeEncodeError:  # bytes that are no text, which Python keeps as surrogates; as a string they crash OpenCV
        raise ValueError("the path is not text in UTF-8; rename it") from None
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError("is not a file")  # reading a pipe or a device might never end


def _decode_bytes(content: np.ndarray, flags: int) -> np.ndarray | None:
    try:
        return cv2.imdecode(content, flags)
    except cv2.error:  # an empty file, or one whose header promises too many pixels
        return None


def list_images(sources: Sequence[Path]) -> list[Path]:
    """Return the images of folders (recursive) and `.txt` lists, sorted by path; hidden files are passed over.

    A folder that links lead to twice is read once, under its own name if it has one there. A link to a folder that it
    lies in is passed over: what is up there is not part of the source.

    A list's line beginning with `./` is relative to the list; any other relative line to the working folder if the file
    is there, else to the list. Raises InputError for a source that does not exist.
    """
    return sorted(path for source in sources for path in _images_of(Path(source)))


def _images_of(source: Path) -> Iterator[Path]:
    if source.is_dir():
        paths = _walk(source)
    elif source.is_file():
        paths = _list_lines(source)
    else:
        near = did_you_mean(source.name, os.listdir(source.parent)) if source.parent.is_dir() else ""
        raise InputError(f"images: no such folder or list: {source}{near}")
    return (path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES)


def _walk(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder, through links to folders but never twice through the same one."""
    seen, roots = set(), [os.path.abspath(folder)]
    for root in roots:  # links are followed after all real folders, which so keep their own names
        for parent, folders, files in os.walk(root, onerror=_warn_of_folder):
            real = os.path.realpath(parent)
            folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith("."))
            if real not in seen:
                yield from (Path(parent, name) for name in files if not name.startswith("."))
            seen.add(real)
            links = (os.path.join(parent, name) for name in folders if os.path.islink(os.path.join(parent, name)))
            roots += [link for link in links if not _leads_up(link)]


def _leads_up(link: str) -> bool:
    target = Path(os.path.realpath(link))
    return target in (Path(os.path.realpath(os.path.dirname(link))) / "x").parents


def _warn_of_folder(error: OSError) -> None:
    LOGGER.warning(f"{_shown(error.filename)}: folder ignored: {_reason(error)}")


def _list_lines(source: Path) -> Iterator[Path]:
    for line in source.read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines():
        line = line.strip()
        if line:
            beside_list = line.startswith("./") or not os.path.exists(line)
            yield Path(os.path.abspath(source.parent / line if beside_list else line))


# Labels ---------------------------------------------------------------------------------------------------------------


def label_path(image: Path) -> Path:
    """Return the label file of an image: the last folder called `images` becomes `labels`, the suffix `.txt`.

    Example: `a/images/train/1.jpg` -> `a/labels/train/1.txt`; without such a folder the labels lie beside the image.
    """
    head, images, tail = str(image).rpartition(f"{os.sep}images{os.sep}")
    moved = os.path.join(head, "labels", tail) if images else tail
    return Path(moved).with_suffix(".txt")


def _inspect(image: Path) -> _Inspected:
    """Check an image and its labels. Never raises for a bad file: the outcome says so."""
    label = label_path(image)
    culprit = image
    try:
        size, mended = image_size(image)
        culprit = label
        text = _label_text(label)
        rows, note = parse_labels(text or "")
    except (OSError, ValueError, MemoryError) as error:
        return _Inspected((0, 0), None, False, (f"{_shown(culprit)}: image ignored: {_reason(error)}",))
    notes = [(image, "JPEG without its end marker, read as far as it goes")] if mended else []
    notes += [(label, note)] if note else []
    return _Inspected(size, rows, text is not None, tuple(f"{_shown(path)}: {what}" for path, what in notes))


def _label_text(label: Path) -> str | None:
    """Return the content of a label file, or None without one. Raises OSError, or ValueError if it is no text."""
    if label.is_file():
        try:
            return label.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError:
            raise ValueError("is not text in UTF-8") from None
    if os.path.lexists(label):
        raise ValueError("is not a file")  # not to be taken for a background
    return None


def image_size(path: Path) -> tuple[tuple[int, int], bool]:
    """Decode an image to learn that it can be, and return ((width, height), whether its JPEG end marker is missing)."""
    image, mended = _decode(path, cv2.IMREAD_GRAYSCALE)
    if image is None:
        raise ValueError("cannot be read as an image" + (": it is empty" if path.stat().st_size == 0 else ""))
    height, width = image.shape[:2]
    if min(width, height) < MIN_SIDE:
        raise ValueError(f"{width}x{height} pixels; each side must have at least {MIN_SIDE}")
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width}x{height} pixels; at most {MAX_PIXELS} are read")
    if mended and _lacks_pixels(path, image):
        raise ValueError("the JPEG is cut short: some of its pixels are missing")
    return (width, height), mended


def _lacks_pixels(path: Path, image: np.ndarray) -> bool:
    """Tell whether a JPEG without its end marker, decoded in gray as `image`, lacks more than the marker.

    A decoder fills up what is missing without a word. But bytes put in the place of the missing ones change the
    picture, whereas after its last pixel they are passed over.
    """
    content = path.read_bytes() + _PROBE + _JPEG_END
    probed = _decode_bytes(np.frombuffer(content, np.uint8), cv2.IMREAD_GRAYSCALE)
    return probed is None or not np.array_equal(probed, image)


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or " ".join(_shown(error).split()) or type(error).__name__


def _shown(value: object) -> str:
    """Return a path or text fit for one line of output: line ends, NULs and undecodable bytes are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(value))


# Scan and cache -------------------------------------------------------------------------------------------------------


def scan_labels(sources: Path | Sequence[Path], nc: int | None = None, *, quiet: bool = False) -> LabelSet:
    """Find and check all images and labels of a split, or take them from the cache if no file has changed since.

    `sources` are folders or `.txt` lists. Bad images and labels are counted, named in the log and left out. `quiet`
    silences progress and log, for the other processes of a distributed run. A class must be below `nc` (None: not
    checked): few images with others are left out like bad ones. Raises InputError for a missing source, for no usable
    image at all, and for many images with classes beyond `nc`, when the names are more likely wrong than the labels.
    """
    sources = [Path(sources)] if isinstance(sources, (str, Path)) else [Path(source) for source in sources]
    where = ", ".join(map(_shown, sources))
    images = list_images(sources)
    if not images:
        kinds = " ".join(sorted(suffix[1:] for suffix in IMAGE_SUFFIXES))
        raise InputError(f"no images in {where}: no file there ends in one of: {kinds}")

    cache, fingerprint = _cache_path(sources, images), _fingerprint(images)
    labels = _read_cache(cache, fingerprint, images)
    fresh = labels is None
    if fresh:
        labels = _scan(images, where, quiet)
        _write_cache(cache, fingerprint, images, labels)
    if nc is not None:
        labels = _below_nc(labels, nc)
    if not quiet:
        _report(labels, where, "" if fresh else f" (from {cache.name})")
    if not len(labels):
        raise InputError(f"no usable image in {where}: all {labels.corrupt} are corrupt, e.g. {labels.messages[0]}")
    return labels


def _scan(images: Sequence[Path], where: str, quiet: bool) -> LabelSet:
    # Decoding releases the interpreter lock, so threads suffice.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        outcomes = pool.map(_inspect, images)
        hidden = True if quiet else None  # None: where the output is no terminal
        outcomes = list(tqdm(outcomes, total=len(images), desc=f"scanning {where}", disable=hidden, leave=False))
    kept = [i for i, outcome in enumerate(outcomes) if outcome.rows is not None]
    with_file = [i for i in kept if outcomes[i].has_file]
    return LabelSet(
        images=tuple(images[i] for i in kept),
        labels=tuple(outcomes[i].rows for i in kept),
        sizes=np.array([outcomes[i].size for i in kept], np.int64).reshape(-1, 2),
        found=len(with_file),
        missing=len(kept) - len(with_file),
        empty=sum(len(outcomes[i].rows) == 0 for i in with_file),
        corrupt=len(images) - len(kept),
        messages=tuple(message for outcome in outcomes for message in outcome.messages),
    )


def _report(labels: LabelSet, where: str, origin: str) -> None:
    for message in labels.messages:
        LOGGER.warning(message)
    backgrounds = labels.missing + labels.empty
    LOGGER.info(f"{where}: {len(labels)} images, {backgrounds} backgrounds, {labels.corrupt} corrupt{origin}")
    if len(labels) and not labels.instances:
        LOGGER.warning(f"{where}: no labels; {labels.images[0]} should have its in {label_path(labels.images[0])}")


def _below_nc(labels: LabelSet, nc: int) -> LabelSet:
    """Leave out the images with a class that is not below `nc`; InputError if they are too many to be mere slips.

    Slips are up to a tenth of the labelled images, or up to 10 of them if they are not the majority.
    """
    highest = np.array([rows[:, 0].max() if len(rows) else -1 for rows in labels.labels])
    beyond, labelled = np.flatnonzero(highest >= nc), int((highest >= 0).sum())
    found = [(_shown(label_path(labels.images[i])), f"class {highest[i]:.0f}, but the data set has nc = {nc}") for i in beyond]
    if len(beyond) > max(labelled / 10, min(10, labelled / 2)):
        raise InputError(
            f"{': '.join(found[0])}, so classes 0 to {nc - 1}; {len(beyond)} of {labelled} labelled images have such "
            f"classes, up to {highest.max():.0f}: correct the labels, or the names"
        )
    kept = np.flatnonzero(highest < nc)
    return replace(
        labels,
        images=tuple(labels.images[i] for i in kept),
        labels=tuple(labels.labels[i] for i in kept),
        sizes=labels.sizes[kept],
        found=labels.found - len(beyond),
        corrupt=labels.corrupt + len(beyond),
        messages=labels.messages + tuple(f"{label}: image ignored: {reason}" for label, reason in found),
    )


def _cache_path(sources: Sequence[Path], images: Sequence[Path]) -> Path:
    """Return the cache's file: beside the one `.txt` list, else beside the folder with the first image's labels."""
    if len(sources) == 1 and sources[0].is_file():
        return sources[0].with_name(f"{sources[0].stem}.cache.npz")
    folder = label_path(images[0]).parent
    return folder.with_name(f"{folder.name}.cache.npz")


def _fingerprint(images: Sequence[Path]) -> str:
    """Return a hash of the paths, sizes and modification times of all images and label files."""
    digest = hashlib.sha256()
    for image in images:
        for path in (image, label_path(image)):
            try:
                status = os.stat(path)
                digest.update(f"{path}\n{status.st_size} {status.st_mtime_ns}\n".encode(errors="surrogateescape"))
            except (OSError, ValueError):  # ValueError: a path that no file can have
                digest.update(f"{path}\n-\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _read_cache(path: Path, fingerprint: str, images: Sequence[Path]) -> LabelSet | None:
    """Return the cached result of scanning `images`, or None if there is none, it is damaged, or a file has changed."""
    try:
        with np.load(path, allow_pickle=False) as cache:
            if int(cache["version"]) != _CACHE_VERSION or str(cache["fingerprint"]) != fingerprint:
                return None
            kept, sizes, counts, rows = (cache[key] for key in ("kept", "sizes", "counts", "rows"))
            found, missing, empty, corrupt = (int(number) for number in cache["tallies"])
            messages = tuple(str(message) for message in cache["messages"])
        if not len(kept) == len(sizes) == len(counts) or counts.sum() != len(rows) or found + missing != len(kept):
            return None
        labels = tuple(np.split(rows, np.cumsum(counts)[:-1])) if len(kept) else ()
        return LabelSet(tuple(images[i] for i in kept), labels, sizes, found, missing, empty, corrupt, messages)
    except (OSError, ValueError, KeyError, IndexError, TypeError, EOFError, zipfile.BadZipFile, zlib.error):
        return None


def _write_cache(path: Path, fingerprint: str, images: Sequence[Path], labels: LabelSet) -> None:
    """Write the cache whole or not at all; a folder that cannot be written to is only worth a warning."""
    if not path.parent.is_dir():  # a split without a labels folder; `_report` says so
        return
    number = {image: i for i, image in enumerate(images)}
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            np.savez(
                file,
                version=np.int64(_CACHE_VERSION),
                fingerprint=np.str_(fingerprint),
                kept=np.array([number[image] for image in labels.images], np.int64),
                sizes=labels.sizes,
                counts=np.array([len(rows) for rows in labels.labels], np.int64),
                rows=np.concatenate([np.zeros((0, 5), np.float32), *labels.labels]),
                tallies=np.array([labels.found, labels.missing, labels.empty, labels.corrupt], np.int64),
                messages=np.array(labels.messages, dtype=np.str_),
            )
        os.replace(temporary, path)
    except OSError as error:
        LOGGER.warning(f"{path}: the label cache was not written ({error.strerror}); the next run scans again")
        with contextlib.suppress(OSError):
            temporary.unlink()
