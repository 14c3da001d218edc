"""What a recipe's learning rates and weight decays are at an epoch: pure functions of its modifiers. `engine/recipe/schedule.py` applies them.

Where several modifiers have started for a group of parameters, the one with the latest start rules; of equal starts a curve rules before a
single value, otherwise the later in the file. A value stays after the modifier's end until another one starts, so a curve's share of its way
is held within 0..1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

from engine.recipe.modifiers import (
    LearningRateFunctionModifier,
    LearningRateModifier,
    Modifier,
    SetLearningRateModifier,
    SetWeightDecayModifier,
)

Rate = SetLearningRateModifier | LearningRateFunctionModifier | LearningRateModifier
R = TypeVar("R", bound=Modifier)
_EPS = 1e-9  # epochs: what a quotient of whole numbers may be off


def linear(share: float, first: float, last: float) -> float:
    """From `first` at share 0 to `last` at 1, in a line."""
    return first + share * (last - first)


def cosine(share: float, first: float, last: float) -> float:
    """From `first` at share 0 to `last` at 1, along half a cosine: level at both ends, whether it falls or rises."""
    return last + (first - last) * (1 + math.cos(math.pi * share)) / 2


def cyclic_linear(batch: int, batches: int, cycle: int, first: float, last: float) -> float:
    """A saw-tooth: at batch number `batch` of `batches`, each cycle of `cycle` batches falls from `first` to `last`. The last cycle may be shorter."""
    start = batch - batch % cycle
    length = min(cycle, batches - start)
    return first if length <= 1 else linear((batch - start) / (length - 1), first, last)


_LINES: dict[str, Callable[[float, float, float], float]] = {"linear": linear, "cosine": cosine}


def function_rate(m: LearningRateFunctionModifier, clock: float, batches: int) -> float:
    """The learning rate of a curve at the epoch `clock`, which is not before its start; `batches` per epoch."""
    if m.lr_func == "cyclic_linear":
        every = max(math.ceil((m.end - m.start) * batches - _EPS), 1)
        batch = min(math.floor((clock - m.start) * batches + _EPS), every - 1)
        return cyclic_linear(batch, every, max(round(m.cycle_epochs * batches), 1), m.init_lr, m.final_lr)
    share = min(max((clock - m.start) / (m.end - m.start), 0.0), 1.0)
    return _LINES[m.lr_func](share, m.init_lr, m.final_lr)


def _step(m: LearningRateModifier, done: float) -> float:
    return m.init_lr * m.lr_kwargs["gamma"] ** math.floor(done / m.lr_kwargs["step_size"] + _EPS)


def _exponential(m: LearningRateModifier, done: float) -> float:
    return m.init_lr * m.lr_kwargs["gamma"] ** math.floor(done + _EPS)


def _milestones(m: LearningRateModifier, done: float) -> float:
    passed = sum(done + m.start + _EPS >= milestone for milestone in m.lr_kwargs["milestones"])
    return m.init_lr * m.lr_kwargs["gamma"] ** passed


def _restarts(m: LearningRateModifier, done: float) -> float:
    length = m.lr_kwargs["cycle_epochs"]
    phase = done % length
    if phase < _EPS and done > 0 and done >= m.end - m.start - _EPS:
        phase = length  # at its end a cycle is over, not beginning
    return cosine(phase / length, m.init_lr, m.lr_kwargs["lr_min"])


_SCHEDULERS: dict[str, Callable[[LearningRateModifier, float], float]] = {
    "StepLR": _step,
    "MultiStepLR": _milestones,
    "ExponentialLR": _exponential,
    "CosineAnnealingWarmRestarts": _restarts,
}


def scheduler_rate(m: LearningRateModifier, clock: float) -> float:
    """The learning rate of a torch scheduler, whose steps are epochs since `m.start`; milestones are epochs of the run, as in the recipe."""
    return _SCHEDULERS[m.lr_class](m, min(clock, m.end) - m.start)


def rate_of(m: Rate, clock: float, batches: int) -> float:
    """The learning rate that `m`, which has started, says at the epoch `clock`; `batches` per epoch."""
    if isinstance(m, SetLearningRateModifier):
        return m.learning_rate
    if isinstance(m, LearningRateFunctionModifier):
        return function_rate(m, clock, batches)
    return scheduler_rate(m, clock)


def ruling(modifiers: Sequence[R], clock: float, role: str) -> R | None:
    """The modifier that rules the parameters of `role` at `clock`; None where none has started for them."""
    started = [(m.start, not isinstance(m, SetLearningRateModifier), i) for i, m in enumerate(modifiers) if _acts(m, clock, role)]
    return modifiers[max(started)[2]] if started else None


def _acts(m: Modifier, clock: float, role: str) -> bool:
    roles = getattr(m, "param_groups", ()) or (("weight",) if isinstance(m, SetWeightDecayModifier) else ())
    return clock >= m.start - _EPS and (not roles or role in roles)
