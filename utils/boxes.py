"""Box geometry: formats, overlap, and the way back from the letterboxed to the original image.

Boxes are the last axis of a tensor or an array: `xyxy` = left, top, right, bottom; `xywh` = centre and size. Nothing
here mutates its input. Suppression is in `utils/nms.py`, matching with labels in `utils/metrics.py`.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import TypeVar

import numpy as np
import torch

Boxes = TypeVar("Boxes", np.ndarray, torch.Tensor)

EPS = 1e-7


def _library(boxes: Boxes) -> ModuleType:
    return torch if isinstance(boxes, torch.Tensor) else np


def xyxy_to_xywh(boxes: Boxes) -> Boxes:
    """Return (..., 4) corners as centre and size, in the same units."""
    top_left, bottom_right = boxes[..., :2], boxes[..., 2:4]
    return _library(boxes).concatenate([(top_left + bottom_right) / 2, bottom_right - top_left], -1)


def xywh_to_xyxy(boxes: Boxes) -> Boxes:
    """Return (..., 4) centre and size as corners, in the same units; `xyxy_to_xywh` is the inverse."""
    centre, half = boxes[..., :2], boxes[..., 2:4] / 2
    return _library(boxes).concatenate([centre - half, centre + half], -1)


def normalise(boxes: Boxes, shape: tuple[int, int]) -> Boxes:
    """Divide (..., 4) boxes in pixels, corners or centre and size, by an image `shape` (height, width)."""
    return boxes / _sides(boxes, shape)


def denormalise(boxes: Boxes, shape: tuple[int, int]) -> Boxes:
    """Multiply (..., 4) normalised boxes, corners or centre and size, by an image `shape` (height, width)."""
    return boxes * _sides(boxes, shape)


def _sides(boxes: Boxes, shape: tuple[int, int]) -> Boxes:
    height, width = shape
    sides = [width, height, width, height]
    return boxes.new_tensor(sides) if isinstance(boxes, torch.Tensor) else np.asarray(sides, boxes.dtype)


def box_iou(a: Boxes, b: Boxes) -> Boxes:
    """Return the (n, m) intersection over union of `a` (n, 4) and `b` (m, 4), both xyxy; 0 where both are empty."""
    library = _library(a)
    low = library.maximum(a[:, None, :2], b[None, :, :2])
    high = library.minimum(a[:, None, 2:4], b[None, :, 2:4])
    sides = (high - low).clip(0)
    intersection = sides[..., 0] * sides[..., 1]
    return intersection / (_area(a)[:, None] + _area(b)[None] - intersection + EPS)


def _area(xyxy: Boxes) -> Boxes:
    return (xyxy[..., 2] - xyxy[..., 0]) * (xyxy[..., 3] - xyxy[..., 1])


def ciou(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the (n,) complete IoU of paired boxes, both (n, 4) xywh in float32; at most 1, below 0 when far apart.

    CIoU = IoU - rho^2 / c^2 - alpha v, where rho is the distance of the centres, c the diagonal of the smallest box
    around both, v = (4 / pi^2) (atan(w2 / h2) - atan(w1 / h1))^2 and alpha = v / (v - IoU + 1) a constant for the
    gradient (Zheng et al., "Distance-IoU Loss", AAAI 2020).
    """
    corners_a, corners_b = xywh_to_xyxy(a), xywh_to_xyxy(b)
    shared = torch.minimum(corners_a[:, 2:], corners_b[:, 2:]) - torch.maximum(corners_a[:, :2], corners_b[:, :2])
    intersection = shared[:, 0].clamp(0) * shared[:, 1].clamp(0)
    # Areas from the corners, not from w * h: rounding then never lifts the IoU above 1, where alpha's denominator
    # vanishes.
    iou = intersection / (_area(corners_a) + _area(corners_b) - intersection + EPS)

    hull = torch.maximum(corners_a[:, 2:], corners_b[:, 2:]) - torch.minimum(corners_a[:, :2], corners_b[:, :2])
    distance = (a[:, :2] - b[:, :2]).square().sum(1) / (hull.square().sum(1) + EPS)

    v = (4 / math.pi**2) * (_aspect_angle(b) - _aspect_angle(a)).square()
    with torch.no_grad():
        alpha = v / (v - iou + 1 + EPS)
    return iou - distance - alpha * v


def _aspect_angle(xywh: torch.Tensor) -> torch.Tensor:
    # Without the epsilon a box of height 0 has the gradient 0 * inf.
    return torch.atan(xywh[:, 2] / (xywh[:, 3] + EPS))


def label_text(detections: np.ndarray, shape: tuple[int, int], with_conf: bool) -> str:
    """Detections (n, 6: corners in pixels of an image of `shape` (height, width), confidence, class) as the lines of a label file."""
    boxes = normalise(xyxy_to_xywh(detections[:, :4]), shape)
    rows = ((int(d[5]), *box, *([d[4]] if with_conf else [])) for d, box in zip(detections, boxes))
    return "".join(" ".join(f"{v:g}" for v in row) + "\n" for row in rows)


def clip_boxes(xyxy: Boxes, shape: tuple[int, int]) -> Boxes:
    """Return (..., 4) corners moved into an image of `shape` (height, width) pixels."""
    height, width = shape
    x, y = xyxy[..., 0:4:2].clip(0, width), xyxy[..., 1:4:2].clip(0, height)
    return _library(xyxy).stack([x[..., 0], y[..., 0], x[..., 1], y[..., 1]], -1)


def scale_boxes(xyxy: Boxes, gain: float, pad: tuple[float, float], shape: tuple[int, int]) -> Boxes:
    """Undo a letterbox: subtract `pad` (x, y) pixels, divide by `gain`, clip to the original `shape` (height, width).

    `gain` is letterboxed pixels per original pixel; (..., 4) corners in, (..., 4) corners out.
    """
    x, y = pad
    shift = xyxy.new_tensor([x, y, x, y]) if isinstance(xyxy, torch.Tensor) else np.asarray([x, y, x, y], xyxy.dtype)
    return clip_boxes((xyxy - shift) / gain, shape)
