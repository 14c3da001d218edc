"""Detectors in OpenCV's `dnn` module: Darknet pairs, and ONNX files of fixed size.

OpenCV decodes a Darknet pair itself. It gives one output per `[yolo]`, rows (y, x, anchor) with y slowest, and columns centre and size as fractions of the
image, objectness, and objectness x probability of each class (`models/darknet.py` says how that was found out). Suppression here multiplies by
the objectness, as the rest of the project does, so each class score is divided by it first: the products are OpenCV's scores again, to the last
bit or the one before it. A score that OpenCV has cut to 0 (`thresh`) stays 0. Rows are put into the order of `utils.decode.decode`, which decides
between equal scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from engine.runtime import Compute, first_line
from models.cfg_text import parse, read_text
from models.foreign import DARKNET, dialect_of
from models.foreign_weights import cfg_beside, names_beside
from models.metadata import Metadata
from utils.errors import InputError
from utils.files import existing
from utils.log import LOGGER

Forward = Callable[[np.ndarray], Sequence[np.ndarray]]


def open_darknet(weights: Path, cfg: str | Path | None) -> tuple[Metadata, Compute]:
    """The pair of `weights` and `cfg`, or the .cfg beside it, in OpenCV. Raises `InputError` for a cfg that OpenCV would not read as it is meant."""
    cfg = existing(cfg_beside(weights, cfg), "--cfg")
    text = read_text(cfg)
    if dialect_of(text, str(cfg)) != DARKNET:
        raise InputError(
            f"{cfg}: not plain Darknet, so OpenCV would misread it; export the model with export.py --include darknet, or leave --dnn out"
        )
    net, sections = parse(text, str(cfg), "#;")
    heads = [s for s in sections if s.kind == "yolo"]
    if not heads:
        raise InputError(f"{cfg}: has no [yolo] section, so it is no detector")
    cut = max(s.number("thresh", 0.2) for s in heads)
    if cut > 0:
        LOGGER.info(f"{cfg}: thresh={cut:g} in [yolo] (0.2 if it is not written): OpenCV cuts lower scores; thresh=0 keeps them")
    try:
        with _quiet():
            network = cv2.dnn.readNetFromDarknet(str(cfg), str(weights))
    except cv2.error as error:
        raise InputError(f"{weights} with {cfg}: OpenCV cannot read it ({first_line(error)})") from None
    forward = _forward(network, network.getUnconnectedOutLayersNames())
    anchors = [len(s.numbers("mask")) if "mask" in s.values else s.integer("num", 1) for s in heads]
    height, width = net.integer("height", 640), net.integer("width", 640)
    channels = net.integer("channels", 3)
    probe = forward(np.zeros((1, channels, height, width), np.float32))
    cells = [out.size // out.shape[-1] // na for out, na in zip(probe, anchors)]
    stride = round((height * width / min(cells)) ** 0.5)
    classes = probe[0].shape[-1] - 5
    metadata = Metadata(names_beside((weights, cfg), classes), stride, (height, width), channels, dynamic=True)

    def compute(images: Tensor) -> Tensor:
        batch, _, high, wide = images.shape
        outputs = forward(images.contiguous().numpy())
        levels = [decoded(torch.from_numpy(out.copy()), batch, na, high, wide) for out, na in zip(outputs, anchors)]
        return torch.cat(sorted(levels, key=_rows, reverse=True), 1)

    return metadata, compute


def _rows(rows: Tensor) -> int:
    return rows.shape[1]


def ordered(rows: Tensor, batch: int, anchors: int, height: int, width: int) -> Tensor:
    """One output of a `[yolo]` of so many `anchors`, for images of `height` x `width`, in the order and the pixels of `utils.decode.decode`:
    (B, N, 5 + nc), scores as OpenCV gives them."""
    no = rows.shape[-1]
    rows = rows.reshape(batch, -1, anchors, no).transpose(1, 2).reshape(batch, -1, no)
    return torch.cat([rows[..., :4] * rows.new_tensor([width, height, width, height]), rows[..., 4:]], -1)


def decoded(rows: Tensor, batch: int, anchors: int, height: int, width: int) -> Tensor:
    """The same with class scores that are still to be multiplied by the objectness, as `decode` gives them."""
    rows = ordered(rows, batch, anchors, height, width)
    objectness = rows[..., 4:5]
    return torch.cat([rows[..., :5], torch.where(objectness > 0, rows[..., 5:] / objectness, 0.0)], -1)


def open_onnx(path: Path, name: str, output: str) -> Compute:
    """`path` in OpenCV, from its input `name` to its `output`."""
    with _quiet():
        network = cv2.dnn.readNetFromONNX(str(path))
    forward = _forward(network, [output], name)
    return lambda images: torch.from_numpy(forward(images.contiguous().numpy())[0].copy())


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep OpenCV from writing into the terminal what its exception says as well."""
    level = cv2.utils.logging.getLogLevel()
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        yield
    finally:
        cv2.utils.logging.setLogLevel(level)


def _forward(network: cv2.dnn.Net, outputs: Sequence[str], name: str = "") -> Forward:
    """Run OpenCV's own kernels, on as many threads as torch."""
    network.setPreferableBackend(cv2.dnn.DNN_BACKEND_OPENCV)
    cv2.setNumThreads(torch.get_num_threads())

    def forward(images: np.ndarray) -> Sequence[np.ndarray]:
        network.setInput(images, name)
        return network.forward(outputs)

    return forward
