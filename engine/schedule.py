"""Learning rate, momentum and accumulation over a run: pure curves, and the schedule that applies them (YOLOv5 v7.0)."""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, pi

import numpy as np
import torch


def linear(epoch: float, epochs: int, final: float) -> float:
    """Factor on lr0: from 1 at epoch 0 to `final` at `epochs`, in a line."""
    return (1 - epoch / epochs) * (1 - final) + final


def cosine(epoch: float, epochs: int, final: float) -> float:
    """Factor on lr0: from 1 at epoch 0 to `final` at `epochs`, along half a cosine."""
    return ((1 - cos(epoch * pi / epochs)) / 2) * (final - 1) + 1


@dataclass(frozen=True)
class ScheduleOptions:
    """Numbers of a schedule. `accumulate`: batches per optimizer step once warm; `warmup_batches`: length of the warm-up."""

    epochs: int
    lr0: float
    lrf: float
    momentum: float
    warmup_batches: int
    warmup_momentum: float
    warmup_bias_lr: float
    accumulate: int
    cosine: bool = False


def warmup_batches(warmup_epochs: float, batches: int, floor: int = 100) -> int:
    """Batches of warm-up: `warmup_epochs` epochs, at least `floor` (YOLOv5: 100); 0 epochs means none."""
    return max(round(warmup_epochs * batches), floor) if warmup_epochs > 0 else 0


class YoloSchedule:
    """Per epoch the curve, per batch the warm-up: learning rates from 0 (biases from `warmup_bias_lr`), momentum, accumulation from 1."""

    def __init__(self, optimizer: torch.optim.Optimizer, options: ScheduleOptions) -> None:
        self.optimizer, self.options = optimizer, options

    def batch(self, step: int, epoch: int) -> int:
        """Set the optimizer for batch number `step` (0-based, over the run); return the batches to accumulate."""
        o = self.options
        target = o.lr0 * (cosine if o.cosine else linear)(epoch, o.epochs, o.lrf)
        warm = step <= o.warmup_batches and o.warmup_batches > 0
        ramp = [0, o.warmup_batches]
        for group in self.optimizer.param_groups:
            start = o.warmup_bias_lr if group["role"] == "bias" else 0.0
            group["lr"] = float(np.interp(step, ramp, [start, target])) if warm else target
            if "nesterov" in group:
                group["momentum"] = float(np.interp(step, ramp, [o.warmup_momentum, o.momentum])) if warm else o.momentum
        return max(1, round(float(np.interp(step, ramp, [1, o.accumulate])))) if warm else o.accumulate
