"""What `detect.py --source` can be: images, folders, globs, `.txt` lists, videos, a webcam's number or a stream's address."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from utils.errors import InputError
from utils.labels import IMAGE_SUFFIXES, load_image
from utils.log import LOGGER

VIDEO_SUFFIXES = frozenset(f".{kind}" for kind in "asf avi gif m4v mkv mov mp4 mpeg mpg ts wmv".split())
_STREAMS = ("rtsp://", "rtmp://", "http://", "https://", "tcp://")


@dataclass(frozen=True)
class Frame:
    """One picture to detect in. `frame` counts a video's frames from 0 and is None for images; `fps` and `total` are the video's."""

    image: np.ndarray
    path: Path
    frame: int | None = None
    fps: float = 30.0
    total: int = 0


def frames(source: str) -> Iterator[Frame]:
    """Yield the frames of `source`. Unreadable files are named in the log and skipped; a source with nothing in it is an `InputError`."""
    if source.isdigit() or source.lower().startswith(_STREAMS):
        yield from _video(
            Path(f"stream{source}" if source.isdigit() else Path(source).name or "stream"), int(source) if source.isdigit() else source
        )
        return
    paths = _paths(source)
    readable = 0
    for path in paths:
        try:
            for frame in _video(path, str(path)) if path.suffix.lower() in VIDEO_SUFFIXES else [Frame(load_image(path), path)]:
                readable += 1
                yield frame
        except InputError as error:
            LOGGER.warning(f"skipped: {error}")
    if not readable:
        raise InputError(f"--source {source}: none of its {len(paths)} files can be read as an image or a video")


def _paths(source: str) -> list[Path]:
    path = Path(source)
    if path.is_dir():
        files = [p for p in sorted(path.rglob("*")) if p.is_file()]
    elif path.is_file() and path.suffix == ".txt":
        files = [Path(line.strip()) for line in path.read_text(encoding="utf-8", errors="surrogateescape").splitlines() if line.strip()]
    elif path.is_file():
        files = [path]
    elif any(c in source for c in "*?["):
        files = [Path(p) for p in sorted(glob.glob(source, recursive=True))]
    else:
        raise InputError(f"--source {source}: no such file or folder, and not a glob that matches any")
    known = [p for p in files if p.suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES]
    if not known:
        raise InputError(
            f"--source {source}: no images or videos there; known endings: {', '.join(sorted(IMAGE_SUFFIXES | VIDEO_SUFFIXES))}"
        )
    return known


def _video(path: Path, source: str | int) -> Iterator[Frame]:
    capture = cv2.VideoCapture(source)
    try:
        if not capture.isOpened():
            raise InputError(f"--source {source}: cannot be opened as a video")
        fps, total = capture.get(cv2.CAP_PROP_FPS) or 30.0, max(int(capture.get(cv2.CAP_PROP_FRAME_COUNT)), 0)
        number = 0
        while True:
            ok, image = capture.read()
            if not ok:
                break
            yield Frame(image, path, number, fps, total)
            number += 1
        if number == 0:
            raise InputError(f"--source {source}: no frame could be read from it")
    finally:
        capture.release()
