"""The schedule seam of a recipe: learning rates and weight decays by role, the clock, and the pruner's updates. The curves are `curves.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from engine.recipe.curves import rate_of, ruling
from engine.recipe.modifiers import LEARNING_RATES, Recipe, SetWeightDecayModifier
from engine.seams import Schedule


class Updated(Protocol):
    """What changes its masks by the clock."""

    def update(self, clock: float, last: bool) -> bool:
        """Called before every batch with the recipe's clock, `last`: before the last batch of the run. Whether the masks may have changed."""


@dataclass
class Clock:
    """The recipe's time, for seams that the loop does not tell it to: batches done / batches per epoch, at the batch that is being trained."""

    epoch: float = 0.0


class RecipeSchedule:
    """The native schedule until the first learning rate modifier starts; from then on the recipe rules each role that it names.

    With it warm-up is over: momentum is `momentum`, and a step takes `accumulate` batches. A role that no modifier has reached keeps the native
    rate. Weight decays, likewise by role, are those that the optimizer was built with until a modifier starts. Everything follows from the
    number of the batch, so there is no state to save.
    """

    def __init__(
        self, native: Schedule, optimizer: torch.optim.Optimizer, recipe: Recipe, batches: int, epochs: int, accumulate: int,
        momentum: float, clock: Clock, pruner: Updated | None = None,
    ) -> None:  # fmt: skip
        self.native, self.optimizer, self.clock, self.pruner = native, optimizer, clock, pruner
        self.batches, self.epochs, self.accumulate, self.momentum = batches, epochs, accumulate, momentum
        self.rates, self.decays = recipe.of(*LEARNING_RATES), recipe.of(SetWeightDecayModifier)
        self.native_decays = {group["role"]: group["weight_decay"] for group in optimizer.param_groups}
        self.start = min((m.start for m in self.rates), default=float("inf"))

    def batch(self, step: int, epoch: int) -> int:
        """Set the optimizer for batch number `step` (0-based, over the run); return the batches to accumulate."""
        clock = self.clock.epoch = step / self.batches
        accumulate = self.native.batch(step, epoch)
        rules = clock >= self.start
        for group in self.optimizer.param_groups:
            rate = ruling(self.rates, clock, group["role"])
            if rate is not None:
                group["lr"] = rate_of(rate, clock, self.batches)
            decay = ruling(self.decays, clock, group["role"])
            group["weight_decay"] = self.native_decays[group["role"]] if decay is None else decay.weight_decay
            if rules and "nesterov" in group:
                group["momentum"] = self.momentum
        if self.pruner is not None:
            self.pruner.update(clock, step + 1 == self.batches * self.epochs)
        return self.accumulate if rules else accumulate
