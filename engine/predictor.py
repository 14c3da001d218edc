"""From images to detections: letterbox, fused network, decoding, NMS. What detect.py and the Python API share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.inference import inference_network
from engine.tta import AUGMENTED, PLAIN, candidates
from models.checkpoint import Model
from models.network import Network
from utils.augment import letterbox
from utils.boxes import scale_boxes
from utils.device import Precision, inference_precision, select_device
from utils.errors import InputError
from utils.flags import multiple
from utils.nms import non_max_suppression
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
    """A fused network that turns BGR images into detections. `imgsz`: (height, width) that an image is letterboxed into; `augment`: with
    test-time augmentation."""

    def __init__(self, network: Network, imgsz: tuple[int, int], precision: Precision, augment: bool = False) -> None:
        self.network = inference_network(network, precision)
        self.imgsz, self.precision, self.views = imgsz, precision, AUGMENTED if augment else PLAIN
        self.levels = [level.to(precision.device) for level in network.levels]

    def __call__(self, images: Sequence[np.ndarray], limits: Limits = Limits()) -> list[Detections]:
        """Detect in (H, W, 3) BGR uint8 images; those that are letterboxed to one shape go through the network together."""
        started = self.precision.clock()
        stride = self.network.max_stride
        boxed = [letterbox(image, self.imgsz, auto_stride=stride) for image in images]
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
        with self.precision.autocast():
            maps = [self.network(view.of(images, self.network.max_stride)) for view in self.views]
        predictions = candidates(maps, self.views, self.levels, images.shape[3], limits.conf)
        times.append(self.precision.clock())
        found = non_max_suppression(predictions, limits.conf, limits.iou, limits.classes, limits.agnostic, max_det=limits.max_det)
        rows = [f.cpu() for f in found]
        times.append(self.precision.clock())
        a, b, c = (np.diff(times) * 1e3 / len(boxed)).tolist()
        return rows, (a, b, c)


def build_predictor(model: Model, imgsz: tuple[int, ...] | None, device: str, half: bool, augment: bool = False) -> Predictor:
    """The predictor of a loaded checkpoint. `imgsz`: one side, (height, width), or None for the size it was trained at; sides are raised
    to multiples of the largest stride."""
    network = model.network()
    sides = imgsz or (model.imgsz,)
    if len(sides) > 2 or min(sides) < 1:
        raise InputError(f"imgsz {' '.join(map(str, sides))}: give one size, or height and width, in pixels")
    height, width = (multiple(side, network.max_stride) for side in (sides[0], sides[-1]))
    return Predictor(network, (height, width), inference_precision(select_device(device), half), augment)


def check_classes(classes: Sequence[int] | None, names: Sequence[str], what: str) -> None:
    """Raise `InputError`, which begins with `what`, for a class that the model does not have."""
    unknown = [c for c in classes or () if not 0 <= c < len(names)]
    if unknown:
        raise InputError(f"{what} {unknown[0]}: this model has the classes 0..{len(names) - 1}")
