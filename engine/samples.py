"""Detections of two networks on the same images, side by side: which images to show, and the pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch

from engine.predictor import Detections, Predictor
from models.network import Network
from utils.boxes import box_iou
from utils.device import Precision
from utils.labels import LabelSet, load_image
from utils.plots import draw_boxes

LOOKED_AT = 16  # images that both networks see, of which the pictures are chosen
DRAWN_SIDE, MOST_ENLARGED = 640, 4  # long side of a picture in pixels; a small image is enlarged at most so many times


@dataclass(frozen=True, eq=False)
class Sample:
    """One image with the detections of each network drawn: BGR uint8 (H, W, 3), and in words, such as `person ×4, bus ×1`."""

    name: str
    before: np.ndarray
    after: np.ndarray
    before_text: str = ""
    after_text: str = ""


def sample_pairs(
    before: Network,
    after: Network,
    labels: LabelSet,
    names: Sequence[str],
    imgsz: int,
    count: int = 4,
    device: str | torch.device = "cpu",
) -> list[Sample]:
    """At most `count` images of `labels` on which the two networks differ most, with what each detects at confidence 0.25 and IoU 0.45.

    The networks look at 16 images, evenly spaced among those that have labels (among all where none has). The choice depends on nothing
    but the images and the networks: most detections that the other network lacks first, then the order of the images.
    """
    chosen = _evenly([i for i, rows in enumerate(labels.labels) if len(rows)] or list(range(len(labels))), LOOKED_AT)
    images = [load_image(labels.images[i]) for i in chosen]
    found = [Predictor(network, (imgsz, imgsz), Precision(torch.device(device)))(images) for network in (before, after)]
    pairs = list(zip(chosen, images, *found))
    pairs.sort(key=lambda pair: -_differences(pair[2].boxes, pair[3].boxes))  # stable: ties stay in the order of the images
    return [
        Sample(labels.images[i].name, _drawn(image, old, names), _drawn(image, new, names), _words(old, names), _words(new, names))
        for i, image, old, new in pairs[:count]
    ]


def _evenly(items: list[int], count: int) -> list[int]:
    return [items[i] for i in np.unique(np.linspace(0, len(items) - 1, min(count, len(items))).astype(int))] if items else []


def _differences(a: np.ndarray, b: np.ndarray) -> int:
    """How many boxes (n, 6) and (m, 6) have no counterpart of their class with an IoU of at least 0.5 in the other."""
    if not len(a) or not len(b):
        return len(a) + len(b)
    same = (box_iou(a[:, :4], b[:, :4]) >= 0.5) & (a[:, 5:6] == b[None, :, 5])
    return int((~same.any(1)).sum() + (~same.any(0)).sum())


def _words(detections: Detections, names: Sequence[str]) -> str:
    """`person ×4, bus ×1`: unlike `Detections.counts`, clear where the names are numbers."""
    classes, counts = np.unique(detections.boxes[:, 5].astype(int), return_counts=True)
    return ", ".join(f"{names[c]} ×{n}" for c, n in zip(classes, counts)) or "nothing"


def _drawn(image: np.ndarray, detections: Detections, names: Sequence[str]) -> np.ndarray:
    """`image` at the size of the page, with its boxes; scaled first, so that lines and labels have one size in all pictures."""
    gain = min(DRAWN_SIDE / max(image.shape[:2]), MOST_ENLARGED)
    method = cv2.INTER_AREA if gain < 1 else cv2.INTER_CUBIC
    height, width = (max(round(side * gain), 1) for side in image.shape[:2])
    boxes = detections.boxes.copy()
    boxes[:, [0, 2]] *= width / image.shape[1]
    boxes[:, [1, 3]] *= height / image.shape[0]
    return draw_boxes(cv2.resize(image, (width, height), interpolation=method), boxes, names, 2)
