"""The phases of a run with a recipe: what the network is in which epoch. Their results are not compared, and each keeps its own best checkpoint.

dense -> pruning (while the share of zeros grows) -> pruned (from the end of the last ramp) -> quantized, or pruned_quantized.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from engine.recipe.modifiers import (
    ConstantPruningModifier,
    DistillationModifier,
    GMPruningModifier,
    QuantizationModifier,
    Recipe,
    TrainableParamsModifier,
    first_epoch,
)
from utils.log import LOGGER

if TYPE_CHECKING:
    from engine.loop import Loop

DENSE, PRUNING, PRUNED, QUANTIZED = "dense", "pruning", "pruned", "quantized"


def phase_at(recipe: Recipe, epoch: int, batches: int, epochs: int) -> str:
    """The phase of epoch number `epoch` (0-based) of `epochs`: what the network is at its last batch. `batches` per epoch."""
    last = epoch + 1 - 1 / batches + 1e-9  # what arithmetic rounds makes no phase longer
    end = epochs if epoch + 1 == epochs else last  # the run's last batch finishes every ramp
    ramps, held = recipe.of(GMPruningModifier), recipe.of(ConstantPruningModifier)
    name = DENSE
    if any(m.start <= last for m in (*ramps, *held)):
        name = PRUNED if all(min(m.end, epochs) <= end for m in ramps) else PRUNING
    if any(first_epoch(m.start) <= epoch for m in recipe.of(QuantizationModifier)):
        name = QUANTIZED if name == DENSE else f"{name}_{QUANTIZED}"
    return name


def quantizes(recipe: Recipe | None) -> bool:
    """Whether the run quantises its network on the way."""
    return bool(recipe and recipe.of(QuantizationModifier))


def is_passing(phase: str) -> bool:
    """Whether the share of zeros still grows in this phase, so that its best checkpoint is of no use: most likely the one with fewest."""
    return phase.startswith(PRUNING)


def last_event(recipe: Recipe) -> int:
    """The epoch (0-based) from which on nothing of the recipe begins or ends any more, but for curves of learning rates, which go on.

    What ends with the run is no event that a run would have to wait for, but for ramps: these must arrive.
    """
    run = math.inf if recipe.epochs is None else recipe.epochs
    edges = [m.start for m in recipe.modifiers]
    edges += [m.end for m in recipe.of(ConstantPruningModifier, TrainableParamsModifier, DistillationModifier)]
    for m in recipe.of(QuantizationModifier):
        edges += [m.norm_freeze or 0.0, m.observer_stop or 0.0]
    edges = [edge for edge in edges if edge < run] + [m.end for m in recipe.of(GMPruningModifier)]
    return max(map(first_epoch, edges), default=0)


class Phases:
    """Transition seam: tells the loop when the phase changes."""

    def __init__(self, recipe: Recipe, batches: int, epochs: int) -> None:
        self.recipe, self.batches, self.epochs = recipe, batches, epochs

    def before_epoch(self, loop: Loop, epoch: int) -> None:
        phase = phase_at(self.recipe, epoch, self.batches, self.epochs)
        if phase != loop.phase:
            if loop.phase:
                LOGGER.info(f"from epoch {epoch + 1} on the network is {phase.replace('_', ' and ')}: the best result is looked for afresh")
            loop.begin_phase(phase)
