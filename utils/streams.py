"""Cameras and network streams: OpenCV's captures, and a reader that keeps the newest frame so that a slow detector does not lag."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import cv2
import numpy as np

from utils.errors import InputError
from utils.log import LOGGER

RETRIES = 5  # attempts to reopen a stream that dropped, before it is given up
RETRY_SECONDS = 2.0  # before each of them


@contextmanager
def opened(source: str | int, what: str) -> Iterator[cv2.VideoCapture]:
    """An open capture, released at the end; raises as `open_capture` does."""
    capture = open_capture(source, what)
    try:
        yield capture
    finally:
        capture.release()


def open_capture(source: str | int, what: str) -> cv2.VideoCapture:
    """Open a video file, a camera's number or a stream's address; an `InputError` that begins with `what` where that fails."""
    capture = _open(source)
    if not capture.isOpened():
        capture.release()
        hint = "is a camera connected, and its number right?" if isinstance(source, int) else "is it there, and a kind that OpenCV reads?"
        raise InputError(f"{what}: cannot be opened as a video; {hint}")
    return capture


def _open(source: str | int) -> cv2.VideoCapture:
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "8")  # fatal errors only; ours are in the log in words
    level = cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        return cv2.VideoCapture(source)
    finally:
        cv2.utils.logging.setLogLevel(level)


class Live:
    """Iterates over (count from 0, BGR image, frames per second) of a camera or an endless stream: each time the newest frame.

    A thread reads and drops what comes while the caller is busy; of the frames it reads, every `vid_stride`-th is taken. After a drop the
    source is reopened up to `RETRIES` times; then the iteration ends. `capture` is the open source, which is taken over; raises
    `InputError` where no frame comes at all.
    """

    def __init__(self, capture: cv2.VideoCapture, source: str | int, name: str, vid_stride: int = 1) -> None:
        self.source, self.name, self.vid_stride = source, name, vid_stride
        self.fps = (capture.get(cv2.CAP_PROP_FPS) or 30.0) / vid_stride
        self._capture = capture
        self._news = threading.Condition()
        self._stop = threading.Event()
        self._newest: np.ndarray | None = None
        self._over = False

    def __iter__(self) -> Iterator[tuple[int, np.ndarray, float]]:
        reader = threading.Thread(target=self._read, args=(self._capture,), name=f"live {self.name}", daemon=True)
        reader.start()
        count = 0
        try:
            while (image := self._next()) is not None:
                yield count, image, self.fps
                count += 1
        finally:
            self._stop.set()
            reader.join(timeout=5)  # a read that hangs in a dead network must not hold up the end
        if count == 0:
            raise InputError(f"--source {self.source if isinstance(self.source, int) else self.name}: no frame could be read from it")

    def _next(self) -> np.ndarray | None:
        """Wait for a frame newer than the last one taken; None once the stream is over."""
        with self._news:
            self._news.wait_for(lambda: self._newest is not None or self._over)
            image, self._newest = self._newest, None
            return image

    def _read(self, capture: cv2.VideoCapture) -> None:
        position = failures = 0
        try:
            while not self._stop.is_set():
                if capture.grab():
                    failures = 0
                    if position % self.vid_stride == 0:
                        self._publish(*capture.retrieve())
                    position += 1
                    continue
                failures += 1
                if failures > RETRIES:
                    LOGGER.warning(f"{self.name}: no frame after {RETRIES} attempts; the stream is over")
                    return
                LOGGER.warning(f"{self.name}: no frame came; opening it again ({failures} of {RETRIES})")
                capture.release()
                if self._stop.wait(RETRY_SECONDS):
                    return
                capture = _open(self.source)
        finally:
            capture.release()
            with self._news:
                self._over = True
                self._news.notify()

    def _publish(self, ok: bool, image: np.ndarray) -> None:
        if ok:
            with self._news:
                self._newest = image
                self._news.notify()
