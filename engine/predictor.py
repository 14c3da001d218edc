"""From images to detections: letterbox, fused network or exported model, decoding, NMS. What detect.py and the Python API share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.inference import inference_network
from engine.runner import runner_of
from engine.runtime import Runtime
from engine.runtimes import open_runtime
from models.checkpoint import Model, load_model, require_detector
from models.network import Network
from utils.augment import letterbox
from utils.boxes import scale_boxes
from utils.device import Precision, inference_precision, select_device
from utils.errors import InputError
from utils.flags import multiple
from utils.planes import stack, to_planes

BATCH = 16  # most images that go through the network together


@dataclass(frozen=True)
class Limits:
    """Which detections count. `classes` None: all; `agnostic`: boxes of different classes suppress each other."""

    conf: float = 0.25
    iou: float = 0.45
    max_det: int = 1000
    classes: tuple[int, ...] | None = None
    agnostic: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.conf <= 1 or not 0 <= self.iou <= 1:
            raise InputError(f"confidence {self.conf}, IoU {self.iou}: both must lie between 0 and 1; the defaults are 0.25 and 0.45")
        if self.max_det < 1:
            raise InputError(f"at most {self.max_det} detections: must be at least 1")


@dataclass(frozen=True, eq=False)
class Detections:
    """What was found in one image.

    boxes: float32 (n, 6), corners in pixels of the image, confidence, class; best first.  input_shape: (height, width) that the
    network saw.  ms: of pre-processing, inference and NMS, this image's share of its batch.
    """

    boxes: np.ndarray
    input_shape: tuple[int, int]
    ms: tuple[float, float, float]

    def counts(self, names: Sequence[str]) -> str:
        """`4 persons, 1 bus`, or `(no detections)`."""
        classes, counts = np.unique(self.boxes[:, 5].astype(int), return_counts=True)
        parts = [f"{n} {names[c]}{'s' if n > 1 else ''}" for c, n in zip(classes, counts)]
        return ", ".join(parts) or "(no detections)"


class Predictor:
    """A fused network, or an exported model, that turns BGR images into detections. `imgsz`: (height, width) that an image is letterboxed
    into; `augment`: with test-time augmentation."""

    def __init__(self, network: Network | Runtime, imgsz: tuple[int, int], precision: Precision, augment: bool = False) -> None:
        self.network = network if isinstance(network, Runtime) else inference_network(network, precision)
        self.imgsz, self.precision = imgsz, precision
        self.runner = runner_of(self.network, precision, augment)
        # A file of fixed size is given just that; others as little padding as the stride allows.
        self.stride = None if isinstance(network, Runtime) and network.size else network.max_stride

    def __call__(self, images: Sequence[np.ndarray], limits: Limits = Limits()) -> list[Detections]:
        """Detect in (H, W, 3) BGR uint8 images; those that are letterboxed to one shape go through the network together."""
        started = self.precision.clock()
        boxed = [letterbox(image, self.imgsz, auto_stride=self.stride) for image in images]
        share = (self.precision.clock() - started) * 1e3 / max(len(images), 1)
        alike: dict[tuple[int, ...], list[int]] = {}
        for i, (image, _, _) in enumerate(boxed):
            alike.setdefault(image.shape[:2], []).append(i)
        found: dict[int, Detections] = {}
        for shape, members in alike.items():
            for start in range(0, len(members), BATCH):
                batch = members[start : start + BATCH]
                rows, ms = self._batch([boxed[i][0] for i in batch], limits)
                for i, row in zip(batch, rows):
                    _, gain, pad = boxed[i]
                    boxes = torch.cat([scale_boxes(row[:, :4], gain, pad, images[i].shape[:2]), row[:, 4:]], 1).numpy()
                    found[i] = Detections(boxes, shape, (share + ms[0], ms[1], ms[2]))
        return [found[i] for i in range(len(images))]

    @torch.no_grad()
    def _batch(self, boxed: Sequence[np.ndarray], limits: Limits) -> tuple[list[Tensor], tuple[float, float, float]]:
        """Detections (n, 6) in pixels of the letterboxed images (all of one shape), and milliseconds per image of the three steps."""
        times = [self.precision.clock()]
        images = self.precision.images(stack([to_planes(image, self.network.channels) for image in boxed]))
        times.append(self.precision.clock())
        rows = self.runner.candidates(self.runner.forward(images), images.shape[3], limits.conf)
        times.append(self.precision.clock())
        found = self.runner.suppress(rows, limits.conf, limits.iou, limits.classes, limits.agnostic, max_det=limits.max_det)
        found = [f.cpu() for f in found]
        times.append(self.precision.clock())
        a, b, c = (np.diff(times) * 1e3 / len(boxed)).tolist()
        return found, (a, b, c)


def build_predictor(model: Model, imgsz: tuple[int, ...] | None, device: str, half: bool, augment: bool = False) -> Predictor:
    """The predictor of a loaded checkpoint. `imgsz`: one side, (height, width), or None for the size it was trained at; sides are raised
    to multiples of the largest stride."""
    network = model.network()
    sides = _sides(imgsz, (model.imgsz,), network.max_stride)
    return Predictor(network, sides, inference_precision(select_device(device), half), augment)


def open_predictor(
    weights: str | Path, cfg: str | Path = "", imgsz: tuple[int, ...] | None = None, device: str = "", half: bool = False,
    augment: bool = False, dialect: str = "auto", dnn: bool = False,
) -> tuple[Predictor, tuple[str, ...]]:  # fmt: skip
    """The predictor of a checkpoint or an exported model, and its class names. `imgsz` as for `build_predictor`, None: the file's own."""
    runtime = open_runtime(weights, cfg, select_device(device), dnn)
    if runtime is None:
        model = require_detector(load_model(weights, cfg or None, dialect), weights)
        return build_predictor(model, imgsz, device, half, augment), model.names
    runtime.refuse(half=half, augment=augment)
    sides = runtime.sides(imgsz) or _sides(imgsz, runtime.metadata.imgsz, runtime.max_stride)
    return Predictor(runtime, sides, Precision(runtime.device)), runtime.names


def _sides(wanted: tuple[int, ...] | None, own: tuple[int, ...], stride: int) -> tuple[int, int]:
    """(height, width), multiples of `stride`, of what is `wanted` or else a model's `own` size."""
    sides = wanted or own
    if len(sides) > 2 or min(sides) < 1:
        raise InputError(f"imgsz {' '.join(map(str, sides))}: give one size, or height and width, in pixels")
    return multiple(sides[0], stride), multiple(sides[-1], stride)


def check_classes(classes: Sequence[int] | None, names: Sequence[str], what: str) -> None:
    """Raise `InputError`, which begins with `what`, for a class that the model does not have."""
    unknown = [c for c in classes or () if not 0 <= c < len(names)]
    if unknown:
        raise InputError(f"{what} {unknown[0]}: this model has the classes 0..{len(names) - 1}")
