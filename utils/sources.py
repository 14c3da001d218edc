"""What `detect.py --source` can be: images, folders, globs, `.txt` lists, videos, a camera's number or a stream's address."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import cv2
import numpy as np

from utils.errors import InputError
from utils.labels import IMAGE_SUFFIXES, load_image
from utils.log import LOGGER
from utils.streams import Live, open_capture, opened

VIDEO_SUFFIXES = frozenset(f".{kind}" for kind in "asf avi gif m4v mkv mov mp4 mpeg mpg ts wmv".split())
_ADDRESSES = ("rtsp://", "rtmp://", "http://", "https://", "tcp://", "udp://")


@dataclass(frozen=True)
class Frame:
    """One picture (H, W, 3) BGR uint8 to detect in.

    `path`: the file, or a name made for a camera or stream.  `frame`: position in its video from 0, None for images; `fps` and
    `total` (0: unknown) are the video's.  `file` of `files`: its place among the files of the source.  `live`: of a camera or stream.
    """

    image: np.ndarray
    path: Path
    frame: int | None = None
    fps: float = 30.0
    total: int = 0
    file: int = 1
    files: int = 1
    live: bool = False

    @property
    def label(self) -> str:
        """What a log line begins with, as YOLOv5's: `image 1/2 path`, `video 1/1 (3/120) path`, `name` of a stream."""
        if self.live:
            return str(self.path)
        if self.frame is None:
            return f"image {self.file}/{self.files} {self.path}"
        return f"video {self.file}/{self.files} ({self.frame + 1}/{self.total or '?'}) {self.path}"


def frames(source: str, vid_stride: int = 1) -> Iterator[Frame]:
    """Yield the frames of `source`, of videos and streams every `vid_stride`-th.

    Files that are missing or unreadable are named in the log and skipped; a source with nothing in it is an `InputError`.
    """
    if source.isdigit():
        yield from _camera(int(source), vid_stride)
    elif is_address(source):
        yield from _stream(source, vid_stride)
    else:
        yield from _files(source, vid_stride)


def is_address(source: str) -> bool:
    """Whether `source` is the address of a stream."""
    return source.lower().startswith(_ADDRESSES)


def _camera(number: int, vid_stride: int) -> Iterator[Frame]:
    capture = open_capture(number, f"--source {number}")
    for count, image, fps in Live(capture, number, f"camera {number}", vid_stride):
        yield Frame(image, Path(str(number)), count, fps, live=True)


def _stream(address: str, vid_stride: int) -> Iterator[Frame]:
    """A stream of known length is a file that a server hands out: all its frames count. Otherwise the newest frame does."""
    shown = _shown(address)
    path = Path(re.sub(r"\W+", "_", shown.split("://")[1]).strip("_") or "stream")
    capture = open_capture(address, f"--source {shown}")
    if capture.get(cv2.CAP_PROP_FRAME_COUNT) > 0:
        yield from _frames_of(capture, path, vid_stride, f"--source {shown}")
        return
    for count, image, fps in Live(capture, address, shown, vid_stride):
        yield Frame(image, path, count, fps, live=True)


def _shown(address: str) -> str:
    """`address` without the user and password that it may hold, which belong neither in a log nor in a file name."""
    parts = urlsplit(address)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="").geturl()


def _files(source: str, vid_stride: int) -> Iterator[Frame]:
    paths = _paths(source)
    readable = 0
    for number, path in enumerate(paths, 1):
        try:
            for frame in _file(path, vid_stride, number, len(paths)):
                readable += 1
                yield frame
        except InputError as error:
            LOGGER.warning(f"skipped: {error}")
    if not readable:
        raise InputError(f"--source {source}: none of its {len(paths)} files can be read as an image or a video")


def _file(path: Path, vid_stride: int, number: int, of: int) -> Iterator[Frame]:
    if path.suffix.lower() in VIDEO_SUFFIXES:
        with opened(str(path), f"video {path}") as capture:
            yield from _frames_of(capture, path, vid_stride, f"video {path}", number, of)
    else:
        yield Frame(load_image(path), path, file=number, files=of)


def _frames_of(capture: cv2.VideoCapture, path: Path, vid_stride: int, what: str, number: int = 1, of: int = 1) -> Iterator[Frame]:
    fps, total = capture.get(cv2.CAP_PROP_FPS) or 30.0, max(int(capture.get(cv2.CAP_PROP_FRAME_COUNT)), 0)
    position = 0
    while capture.grab():
        if position % vid_stride == 0:
            ok, image = capture.retrieve()
            if not ok:
                break
            yield Frame(image, path, position, fps / vid_stride, total, number, of)
        position += 1
    if position == 0:
        raise InputError(f"{what}: no frame could be read from it")


def _paths(source: str) -> list[Path]:
    path = Path(source)
    if path.is_dir():
        files = [p for p in sorted(path.rglob("*")) if p.is_file()]
    elif path.is_file() and path.suffix.lower() == ".txt":
        return _listed(path)
    elif path.is_file():
        files = [path]
    elif glob.has_magic(source):
        files = [Path(p) for p in sorted(glob.glob(source, recursive=True))]
    else:
        raise InputError(f"--source {source}: no such file or folder, and not a glob that matches any")
    known = [p for p in files if _is_known(p)]
    if not known:
        raise InputError(f"--source {source}: no images or videos there; known endings: {_endings()}")
    return known


def _listed(path: Path) -> list[Path]:
    """The files that a list names, one a line: `./` is the list's folder; other paths the working folder's if there, else the list's.

    Empty lines and lines that begin with `#` are passed over.
    """
    lines = (line.strip() for line in path.read_text(encoding="utf-8", errors="surrogateescape").splitlines())
    listed, found = [line for line in lines if line and not line.startswith("#")], []
    for line in listed:
        entry = Path(line)
        if line.startswith("./") or not entry.exists():
            entry = path.parent / line
        if entry.is_file() and _is_known(entry):
            found.append(entry)
        else:
            reason = f"has no known ending ({_endings()})" if entry.is_file() else "no such file"
            LOGGER.warning(f"skipped: {path} names {line}: {reason}")
    if not found:
        raise InputError(f"--source {path}: none of its {len(listed)} lines is the path of an image or a video that is there")
    return found


def _is_known(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES


def _endings() -> str:
    return ", ".join(sorted(IMAGE_SUFFIXES | VIDEO_SUFFIXES))
