"""From a histogram of values to the range that 8 bits are spent on: where calibration cuts the tails. Pure functions of numpy arrays.

A histogram has 2N bins of equal width over [-most, most], so that its bins of |x| are those of x folded at the middle. A value that is left out is
rounded to the end of the range; what is won is a finer step for all others.
"""

from __future__ import annotations

import numpy as np

METHODS = ("minmax", "percentile", "entropy")
PERCENTILE = 99.99
LEVELS = 128  # of |x| where an int8 has a sign


def percentile_range(histogram: np.ndarray, most: float, percentile: float = PERCENTILE) -> tuple[float, float]:
    """The range that leaves out at most 100 - `percentile` % of the values at either end: whole bins, from the ends inward."""
    share = histogram.cumsum() / max(histogram.sum(), 1)
    edges = np.linspace(-most, most, len(histogram) + 1)
    tail = (100 - percentile) / 100
    low = int(np.searchsorted(share, tail, side="right"))
    high = int(np.searchsorted(share, 1 - tail, side="left"))
    return float(edges[min(low, len(histogram) - 1)]), float(edges[min(high, len(histogram) - 1) + 1])


def entropy_threshold(histogram: np.ndarray, most: float, levels: int = LEVELS, step: int = 8) -> float:
    """The T at which |x| cut at T and rounded to `levels` steps is nearest to |x| by Kullback-Leibler divergence.

    Migacz 2017, "8-bit inference with TensorRT", over every `step`-th of the cuts between bins: what lies beyond T is counted in the last bin before it; the
    rounded distribution spreads the count of each step evenly over those of its bins that hold something. A sharp cut of a long tail costs what
    was moved; a far one makes the steps coarse.
    """
    half = len(histogram) // 2
    counts = (histogram[half:] + histogram[:half][::-1]).astype(np.float64)
    cuts = range(levels, half + 1, step)
    distances = [_divergence(counts, cut, levels) for cut in cuts]
    return most * cuts[int(np.argmin(distances))] / half


def _divergence(counts: np.ndarray, cut: int, levels: int) -> float:
    """KL divergence between `counts`, cut at a bin, and what is left of them on `levels` steps; infinite where the cut leaves nothing."""
    kept = counts[:cut]
    reference = kept.copy()
    reference[-1] += counts[cut:].sum()
    starts = np.arange(levels) * cut // levels
    steps = np.repeat(np.arange(levels), np.diff(np.append(starts, cut)))
    filled = (kept > 0).astype(np.float64)
    mean = np.add.reduceat(kept, starts) / np.maximum(np.add.reduceat(filled, starts), 1)
    rounded = mean[steps] * filled
    if not rounded.sum() or not reference.sum():
        return np.inf
    p, q = reference / reference.sum(), rounded / rounded.sum()
    there = p > 0
    return float((p[there] * np.log(p[there] / np.maximum(q[there], 1e-12))).sum())
