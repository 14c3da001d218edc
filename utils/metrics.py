"""Detection metrics in NumPy: matching with labels, average precision, fitness and the confusion matrix.

Detections are (n, 6): x1, y1, x2, y2, confidence, class; labels are (m, 5): class, x1, y1, x2, y2; both in the same
pixels. Pictures of these numbers are drawn in `utils/plots.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from utils.boxes import box_iou

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10, dtype=np.float32)
CURVE_POINTS = 1000  # confidences at which the P, R and F1 curves are sampled
AP_POINTS = 101  # recalls at which the precision is integrated
SMOOTHING = 0.1  # width of the box that smooths the mean F1, as a fraction of its points
EPS = 1e-16


def match(detections: np.ndarray, labels: np.ndarray, thresholds: np.ndarray = IOU_THRESHOLDS) -> np.ndarray:
    """Return (n, t) bool: whether each detection (n, 6) finds a label (m, 5) of its class at each IoU threshold (t,).

    Each detection takes the label of its class with the highest IoU, if that reaches the threshold; each label then
    keeps, of the detections that took it, the one with the highest confidence (ties: the first in order).
    """
    thresholds = np.asarray(thresholds, np.float32)
    correct = np.zeros((len(detections), len(thresholds)), bool)
    if not len(detections) or not len(labels):
        return correct
    iou = box_iou(detections[:, :4].astype(np.float32), labels[:, 1:5].astype(np.float32))
    iou[detections[:, 5:6] != labels[None, :, 0]] = -1
    choice, best = iou.argmax(1), iou.max(1)
    by_score = np.argsort(-detections[:, 4], kind="stable")
    for column, threshold in enumerate(thresholds):
        candidates = by_score[best[by_score] >= threshold]
        first = np.unique(choice[candidates], return_index=True)[1]
        correct[candidates[first], column] = True
    return correct


@dataclass(frozen=True)
class APResult:
    """Precision, recall and average precision of the k classes that have labels, in ascending order of `classes`.

    Precision, recall and F1 are taken at `confidence`, where the smoothed mean of the F1 curves is highest. Curves are
    sampled at `px`: confidences for P, R and F1, recalls for `pr_curve` (the precision at the first IoU threshold).
    """

    classes: np.ndarray  # (k,) int64
    labels: np.ndarray  # (k,) int64, labels per class
    predictions: np.ndarray  # (k,) int64, detections per class
    precision: np.ndarray  # (k,)
    recall: np.ndarray  # (k,)
    f1: np.ndarray  # (k,)
    ap: np.ndarray  # (k, t), one column per IoU threshold
    confidence: float
    px: np.ndarray  # (1000,) from 0 to 1
    p_curve: np.ndarray  # (k, 1000)
    r_curve: np.ndarray  # (k, 1000)
    f1_curve: np.ndarray  # (k, 1000)
    pr_curve: np.ndarray  # (k, 1000)

    @property
    def mp(self) -> float:
        """Mean precision over the classes; 0 without labels, as every mean here."""
        return _mean(self.precision)

    @property
    def mr(self) -> float:
        """Mean recall over the classes."""
        return _mean(self.recall)

    @property
    def map50(self) -> float:
        """Mean AP at the first threshold (IoU 0.50)."""
        return _mean(self.ap[:, 0])

    @property
    def map(self) -> float:
        """Mean AP over all thresholds (IoU 0.50 to 0.95) and classes."""
        return _mean(self.ap)


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else 0.0


def ap_per_class(correct: np.ndarray, conf: np.ndarray, pred_cls: np.ndarray, target_cls: np.ndarray) -> APResult:
    """Return the metrics of a data set from all its detections and labels.

    `correct` is (n, t) bool as from `match`, `conf` and `pred_cls` are (n,), `target_cls` is (m,). Classes without
    labels do not count; classes with labels but no detections count 0.
    """
    order = np.argsort(-conf, kind="stable")
    correct, conf, pred_cls = correct[order], conf[order], pred_cls[order]
    classes, labels = np.unique(target_cls, return_counts=True)

    k, px = len(classes), np.linspace(0, 1, CURVE_POINTS)
    predictions = np.zeros(k, np.int64)
    ap = np.zeros((k, correct.shape[1]))
    p_curve, r_curve, pr_curve = np.zeros((3, k, CURVE_POINTS))
    for i, cls in enumerate(classes):
        chosen = pred_cls == cls
        predictions[i] = chosen.sum()
        if not predictions[i]:
            continue
        hits = correct[chosen].cumsum(0)
        recall = hits / (labels[i] + EPS)
        precision = hits / np.arange(1, len(hits) + 1)[:, None]
        # Confidences are negated because np.interp wants ascending abscissae.
        r_curve[i] = np.interp(-px, -conf[chosen], recall[:, 0], left=0)
        p_curve[i] = np.interp(-px, -conf[chosen], precision[:, 0], left=1)
        ap[i] = [average_precision(recall[:, t], precision[:, t]) for t in range(ap.shape[1])]
        pr_curve[i] = np.interp(px, *_envelope(recall[:, 0], precision[:, 0]))

    f1_curve = 2 * p_curve * r_curve / (p_curve + r_curve + EPS)
    best = int(smooth(f1_curve.mean(0)).argmax()) if k else 0
    return APResult(
        classes=classes.astype(np.int64),
        labels=labels.astype(np.int64),
        predictions=predictions,
        precision=p_curve[:, best],
        recall=r_curve[:, best],
        f1=f1_curve[:, best],
        ap=ap,
        confidence=float(px[best]),
        px=px,
        p_curve=p_curve,
        r_curve=r_curve,
        f1_curve=f1_curve,
        pr_curve=pr_curve,
    )


def average_precision(recall: np.ndarray, precision: np.ndarray) -> float:
    """Return the area under the envelope of a curve, both (n,) and best score first: 101 recalls, trapezoids."""
    heights = np.interp(np.linspace(0, 1, AP_POINTS), *_envelope(recall, precision))
    return float((heights[1:] + heights[:-1]).sum() / 2 / (AP_POINTS - 1))


def _envelope(recall: np.ndarray, precision: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return both with the end points (0, 1) and (1, 0) added and the precision made non-increasing from the right."""
    recall = np.concatenate([[0.0], recall, [1.0]])
    precision = np.concatenate([[1.0], precision, [0.0]])
    return recall, np.maximum.accumulate(precision[::-1])[::-1]


def smooth(values: np.ndarray, fraction: float = SMOOTHING) -> np.ndarray:
    """Return the moving mean of `values` (n,) over about `fraction` * n points (101 of 1000), edges repeated."""
    half = round(len(values) * fraction * 2) // 4
    padded = np.pad(values, half, mode="edge")
    return np.convolve(padded, np.full(2 * half + 1, 1 / (2 * half + 1)), mode="valid")


def fitness(map50: float, map: float) -> float:
    """Return the number by which the best checkpoint is chosen."""
    return 0.1 * map50 + 0.9 * map


class ConfusionMatrix:
    """Counts of (predicted, true) class pairs in `matrix`, (nc + 1, nc + 1) int64; last row and column: background.

    A detection enters if its confidence exceeds `conf_threshold`; it pairs with a label of any class if their IoU
    exceeds `iou_threshold`. Each detection takes its label of highest IoU, each label keeps its detection of highest
    IoU.
    """

    def __init__(self, nc: int, conf_threshold: float = 0.25, iou_threshold: float = 0.45) -> None:
        self.nc = nc
        self.conf_threshold = conf_threshold
        self.iou_threshold = iou_threshold
        self.matrix = np.zeros((nc + 1, nc + 1), np.int64)

    def add(self, detections: np.ndarray, labels: np.ndarray) -> None:
        """Count one image's detections (n, 6) and labels (m, 5).

        As in YOLOv5, unpaired detections are counted only where the image has at least one pair.
        """
        detections = detections[detections[:, 4] > self.conf_threshold]
        predicted, true = detections[:, 5].astype(int), labels[:, 0].astype(int)
        rows, columns = self._pairs(detections, labels)
        np.add.at(self.matrix, (predicted[rows], true[columns]), 1)
        np.add.at(self.matrix, (self.nc, np.delete(true, columns)), 1)
        if len(rows):
            np.add.at(self.matrix, (np.delete(predicted, rows), self.nc), 1)

    def _pairs(self, detections: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the paired indices of detections and labels, both (p,)."""
        if not len(detections) or not len(labels):
            return np.empty(0, int), np.empty(0, int)
        iou = box_iou(detections[:, :4].astype(np.float32), labels[:, 1:5].astype(np.float32))
        choice, best = iou.argmax(1), iou.max(1)
        rows = np.argsort(-best, kind="stable")
        rows = rows[best[rows] > self.iou_threshold]
        rows = rows[np.unique(choice[rows], return_index=True)[1]]
        return rows, choice[rows]
