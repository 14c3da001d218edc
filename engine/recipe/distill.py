"""The objective of a recipe's `DistillationModifier`s: detection, and while one of them is active also the teacher's outputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.objectives import DistillationObjective, DistillOptions
from engine.recipe.modifiers import DistillationModifier
from engine.recipe.schedule import Clock
from engine.seams import Forward
from models.network import Network
from utils.loss import DetectionLoss


class RecipeDistillation:
    """Detection loss; from a modifier's start to its end (1 - hardness) x that + hardness x the term of `DistillationObjective` at its temperature.

    Of modifiers that overlap the one that started last rules. Outside of them the teacher is not asked, and its part of the loss reads 0.
    """

    names = DistillationObjective.names

    def __init__(
        self, loss: DetectionLoss, teacher: Network, anchors: Tensor, modifiers: Sequence[DistillationModifier], clock: Clock, weight: float = 1.0
    ) -> None:  # fmt: skip
        """`anchors`: the student's, (levels, na, 2) in pixels; `weight`: of the terms, as `--distill-weight`."""
        self.loss, self.clock = loss, clock
        self.stages = [
            (m, DistillationObjective(loss, teacher, anchors, DistillOptions(weight, temperature=m.temperature)))
            for m in sorted(modifiers, key=lambda m: m.start)
        ]

    def __call__(self, network: Forward, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        maps = network(images)
        total, parts = self.loss(maps, targets)
        active = [(m, stage) for m, stage in self.stages if m.start <= self.clock.epoch < m.end]
        if not active:
            return total, torch.cat((parts, parts.new_zeros(1)))
        m, stage = active[-1]
        term, scale = stage.term(maps, images)
        return (1 - m.hardness) * total + m.hardness * term * scale, torch.cat((parts, term.detach().view(1)))
