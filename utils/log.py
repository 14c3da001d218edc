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


if not LOGGER.handlers:
    LOGGER.addHandler(_Stdout())
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False


def quiet() -> None:
    """Say nothing but errors from now on: for the processes of a distributed run that are not the first."""
    LOGGER.setLevel(logging.ERROR)
