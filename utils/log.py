"""The project's logger: plain lines on stdout, as users of YOLOv5 expect them."""

from __future__ import annotations

import logging
import sys

LOGGER = logging.getLogger("yolo-prune")


class _Stdout(logging.StreamHandler):
    """Write to whatever `sys.stdout` is at the time, so that redirection and test capture see the lines."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self):  # noqa: D102 - the base class reads it
        return sys.stdout

    def format(self, record: logging.LogRecord) -> str:
        """Escape what the output cannot encode, such as a file's name on a terminal of another code page."""
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        return super().format(record).encode(encoding, "backslashreplace").decode(encoding)


if not LOGGER.handlers:
    LOGGER.addHandler(_Stdout())
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False


def quiet() -> None:
    """Say nothing but errors from now on: for the processes of a distributed run that are not the first."""
    LOGGER.setLevel(logging.ERROR)
