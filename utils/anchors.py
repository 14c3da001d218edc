"""Autoanchor: do the anchors fit the labels, and better ones where they do not (YOLOv5's metric and search)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from utils.log import LOGGER


@dataclass(frozen=True)
class AnchorFit:
    """`recall`: best possible recall, the share of labels that some anchor fits; `per_label`: mean number of anchors that fit."""

    recall: float
    per_label: float


def label_sizes(labels: list[np.ndarray], sizes: np.ndarray, imgsz: int, seed: int = 0) -> np.ndarray:
    """(n, 2) widths and heights in pixels at long side `imgsz`, jittered by 10% per image. `labels`: (k, 5) normalised; `sizes`: (images, 2)."""
    scale = np.random.default_rng(seed).uniform(0.9, 1.1, size=(len(labels), 1))
    pixels = imgsz * sizes / sizes.max(1, keepdims=True) * scale
    parts = [boxes[:, 3:5] * size for boxes, size in zip(labels, pixels)]
    return np.concatenate(parts) if parts else np.zeros((0, 2))


def fit(anchors: np.ndarray, wh: np.ndarray, anchor_t: float) -> AnchorFit:
    """How well `anchors` (n, 2) fit label sizes `wh` (m, 2): a fit differs by less than the factor `anchor_t` on both sides."""
    worst = _match(anchors, wh)
    return AnchorFit(float((worst.max(1) > 1 / anchor_t).mean()), float((worst > 1 / anchor_t).sum(1).mean()))


def _match(anchors: np.ndarray, wh: np.ndarray) -> np.ndarray:
    ratio = wh[:, None] / anchors[None]
    with np.errstate(divide="ignore", over="ignore"):  # a box without width or height fits no anchor
        return np.minimum(ratio, 1 / ratio).min(2)


def best_anchors(wh: np.ndarray, count: int, anchor_t: float, generations: int = 1000, seed: int = 0) -> np.ndarray:
    """k-means on the label sizes, then `generations` of random mutation; (count, 2) in pixels, sorted by area."""
    from sklearn.cluster import KMeans  # heavy, and needed only here

    rng = np.random.default_rng(seed)
    wh = wh[(wh >= 2).any(1)]
    spread = wh.std(0).clip(1e-6)
    distinct = len(np.unique(wh.round(3), axis=0))
    if distinct >= count:
        anchors = KMeans(count, n_init=1, max_iter=30, random_state=seed).fit(wh / spread).cluster_centers_ * spread
    else:  # too few different sizes to cluster
        anchors = rng.uniform(0.5, 1.5, size=(count, 2)) * wh.mean(0)
    anchors = anchors.clip(1e-3)  # the centre of boxes without width or height; nothing else is that small
    best = _fitness(anchors, wh, anchor_t)
    for _ in range(generations):
        factors = np.ones_like(anchors)
        while (factors == 1).all():
            genes = rng.random(anchors.shape) < 0.9
            factors = np.where(genes, 1 + 0.1 * rng.normal(size=anchors.shape) * rng.random(), 1).clip(0.3, 3)
        candidate = (anchors * factors).clip(2)
        score = _fitness(candidate, wh, anchor_t)
        if score > best:
            best, anchors = score, candidate
    return anchors[np.argsort(anchors.prod(1), kind="stable")]


def _fitness(anchors: np.ndarray, wh: np.ndarray, anchor_t: float) -> float:
    best = _match(anchors, wh).max(1)
    return float((best * (best > 1 / anchor_t)).mean())


def autoanchor(anchors: np.ndarray, wh: np.ndarray, anchor_t: float, seed: int = 0) -> np.ndarray:
    """Return anchors (levels, na, 2) in pixels: the given ones where their best possible recall exceeds 0.98, else better ones if found.

    Placeholders (anchors of size 0, from `anchors: 3` in a yaml) are replaced in any case, if there is a label to go by.
    """
    placeholders = bool((anchors <= 0).any())
    usable = int((wh >= 2).any(1).sum())
    if usable < (1 if placeholders else anchors.shape[0] * anchors.shape[1]):
        LOGGER.info("autoanchor: too few labels of 2 px or more to fit anchors to; they stay")
        return anchors
    flat = anchors.reshape(-1, 2)
    now = AnchorFit(0.0, 0.0) if placeholders else fit(flat, wh, anchor_t)
    LOGGER.info(f"autoanchor: {now.per_label:.2f} anchors/target, {now.recall:.3f} best possible recall (BPR)")
    if now.recall > 0.98:
        return anchors
    sample = wh if len(wh) <= 20000 else wh[np.random.default_rng(seed).choice(len(wh), 20000, replace=False)]
    found = best_anchors(sample, len(flat), anchor_t, seed=seed)
    then = fit(found, wh, anchor_t)
    if then.recall <= now.recall and not placeholders:
        LOGGER.info("autoanchor: nothing better was found; the anchors stay")
        return anchors
    LOGGER.info(f"autoanchor: replaced, BPR {now.recall:.3f} -> {then.recall:.3f}")
    return found.reshape(anchors.shape)
