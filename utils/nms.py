"""Non-maximum suppression: from decoded predictions to at most `max_det` detections per image.

The rule is that of torchvision's CPU operator: sort by score, best first, ties in their given order; a kept box
suppresses every later box whose IoU, computed in float32, exceeds the threshold, compared in double precision.
torchvision runs it where its compiled operators load; otherwise the NumPy implementation below, which picks the same
boxes. OpenCV's `cv2.dnn.NMSBoxes` is no substitute: it compares in float32, where an IoU of exactly 0.6 (rounded up)
does not exceed a threshold of 0.6, lets any two boxes without area suppress each other, and drops scores of 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import torch

from utils.boxes import xywh_to_xyxy

MAX_CANDIDATES = 30000
CLASS_OFFSET = 7680.0  # pixels; larger than any image side, so that boxes of different classes do not meet
Operator = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
BLOCK = 256  # boxes tested at a time against those already kept
PREFIX = 4  # times `limit` boxes are tried first where the operator knows no limit


def non_max_suppression(
    prediction: torch.Tensor | Sequence[torch.Tensor],
    conf_threshold: float = 0.25,
    iou_threshold: float = 0.45,
    classes: Sequence[int] | None = None,
    agnostic: bool = False,
    multi_label: bool = False,
    max_det: int = 300,
) -> list[torch.Tensor]:
    """Return per image an (n, 6) float32 tensor, n <= max_det: x1, y1, x2, y2 in pixels, confidence, class; best first.

    `prediction` is (B, N, 5 + nc), or per image an (N, 5 + nc) tensor: xywh in pixels, objectness and class
    probabilities. Candidates have objectness and
    score = objectness * class probability above `conf_threshold`; with `multi_label` (and nc > 1) each such class of a
    box is one, otherwise its best class only. `classes` keeps these classes, `agnostic` lets boxes of different classes
    suppress each other. No time limit: an image never comes out empty because others were slow.
    """
    return [
        _suppress(_candidates(rows.detach(), conf_threshold, classes, multi_label), iou_threshold, agnostic, max_det) for rows in prediction
    ]


def _candidates(rows: torch.Tensor, conf_threshold: float, classes: Sequence[int] | None, multi_label: bool) -> torch.Tensor:
    """Return the (n, 6) candidates of one image (N, 5 + nc), best first, n <= MAX_CANDIDATES."""
    rows = rows[rows[:, 4] > conf_threshold].float()
    scores = rows[:, 5:] * rows[:, 4:5]
    nc, flat = scores.shape[1], scores.flatten()

    # A candidate is an index into `flat`: row * nc + class.
    if multi_label and nc > 1:
        chosen = (flat > conf_threshold).nonzero().squeeze(1)
    else:
        best, label = scores.max(1)
        row = (best > conf_threshold).nonzero().squeeze(1)
        chosen = row * nc + label[row]
    if classes is not None:
        chosen = chosen[torch.isin(chosen % nc, chosen.new_tensor(list(classes)))]

    chosen = chosen[_best_first(flat[chosen], MAX_CANDIDATES)]
    row, label = chosen // nc, chosen % nc
    return torch.cat([xywh_to_xyxy(rows[row, :4]), flat[chosen, None], label[:, None].float()], 1)


def _best_first(scores: torch.Tensor, limit: int) -> torch.Tensor:
    """Return the indices of the `limit` highest scores (n,), best first, ties in their given order."""
    if len(scores) <= limit:
        return scores.sort(descending=True, stable=True).indices
    # An untrained model yields millions of candidates: selecting first is several times faster than sorting them all.
    last = scores.topk(limit, sorted=False).values.min()
    top = (scores >= last).nonzero().squeeze(1)
    return top[scores[top].sort(descending=True, stable=True).indices[:limit]]


def _suppress(candidates: torch.Tensor, iou_threshold: float, agnostic: bool, max_det: int) -> torch.Tensor:
    """Return the first `max_det` survivors of candidates (n, 6) given best first."""
    boxes, scores, label = candidates[:, :4], candidates[:, 4], candidates[:, 5:]
    shifted = boxes if agnostic else boxes + label * CLASS_OFFSET
    return candidates[nms(shifted, scores, iou_threshold, max_det)]


def nms(boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float, limit: int | None = None) -> torch.Tensor:
    """Return the indices (k,) int64 of the boxes that survive, best first; only the first `limit` of them if given.

    `boxes` is (n, 4) xyxy, `scores` (n,), both float32 on one device, where the result lies too.
    """
    operator = _torchvision_nms()
    if operator is not None:
        return _limited(operator, boxes, scores, iou_threshold, limit)
    order = scores.sort(descending=True, stable=True).indices
    kept = _greedy(boxes[order].cpu().numpy(), iou_threshold, len(boxes) if limit is None else limit)
    return order[torch.from_numpy(kept).to(order.device)]


def _limited(operator: Operator, boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float, limit: int | None) -> torch.Tensor:
    """torchvision's operator on no more of the best boxes than `limit` survivors need.

    What survives among the best k does not depend on the rest, and the cost grows with the square of their number.
    """
    if limit is None:
        return operator(boxes, scores, iou_threshold)
    order = scores.sort(descending=True, stable=True).indices
    size = PREFIX * limit
    while True:
        part = order[:size]
        kept = operator(boxes[part], scores[part], iou_threshold)[:limit]
        if len(kept) == limit or size >= len(order):
            return part[kept]
        size *= PREFIX


@cache
def _torchvision_nms() -> Operator | None:
    """Return torchvision's operator if it can be called here.

    torchvision may be absent, fail to import with any exception, or import without its compiled library, as when it
    was built for another torch.
    """
    try:
        from torchvision.ops import nms as operator

        operator(torch.zeros(1, 4), torch.zeros(1), 0.5)
    except Exception:  # noqa: BLE001 - whatever goes wrong in there, the NumPy implementation does the work
        return None
    return operator


def _greedy(boxes: np.ndarray, iou_threshold: float, limit: int) -> np.ndarray:
    """Return the positions (k,) int64, k <= limit, of the survivors of `boxes` (n, 4) float32, best first.

    Blocks of boxes are tested against the kept ones only when their turn comes, so that a `limit` ends the work early.
    """
    threshold = _float32_below(iou_threshold)
    kept = np.empty(0, np.int64)
    for start in range(0, len(boxes), BLOCK):
        block = np.arange(start, min(start + BLOCK, len(boxes)))
        block = block[~_overlaps(boxes[kept], boxes[block], threshold).any(0)]
        kept = np.concatenate([kept, block[_survivors(_overlaps(boxes[block], boxes[block], threshold))]])
        if len(kept) >= limit:
            return kept[:limit]
    return kept


def _survivors(overlaps: np.ndarray) -> list[int]:
    """Return the positions left when each survivor in turn removes what it overlaps; `overlaps` is (n, n) bool."""
    alive = np.ones(len(overlaps), bool)
    survivors = []
    for i, row in enumerate(overlaps):
        if alive[i]:
            survivors.append(i)
            alive &= ~row
    return survivors


def _overlaps(a: np.ndarray, b: np.ndarray, threshold: np.float32) -> np.ndarray:
    """Return (n, m) bool: IoU > threshold for `a` (n, 4) and `b` (m, 4); 0 / 0 is NaN, which exceeds nothing."""
    a = a[:, None]
    width = np.minimum(a[..., 2], b[:, 2]) - np.maximum(a[..., 0], b[:, 0])
    height = np.minimum(a[..., 3], b[:, 3]) - np.maximum(a[..., 1], b[:, 1])
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        intersection = np.maximum(width, 0, out=width)
        intersection *= np.maximum(height, 0, out=height)
        union = (a[..., 2] - a[..., 0]) * (a[..., 3] - a[..., 1]) + (b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1])
        union -= intersection
        return np.divide(intersection, union, out=intersection) > threshold


def _float32_below(value: float) -> np.float32:
    """Return the largest float32 <= value: a float32 number exceeds it just when it exceeds the double `value`."""
    rounded = np.float32(value)
    return rounded if float(rounded) <= value else np.nextafter(rounded, np.float32(-np.inf))
