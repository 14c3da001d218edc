"""The typed seams of the training loop. The loop calls each at one fixed place (see `engine/loop.py`); all are plain objects.

Seams with state have `state_dict`/`load_state_dict` and become part of the checkpoint, so training 2 epochs equals training 1 and
resuming 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor

from models.network import Network

if TYPE_CHECKING:
    from engine.loop import Loop


Forward = Callable[[Tensor], list[Tensor]]  # a Network, or one wrapped for several processes


class Objective(Protocol):
    """What is minimised. `names` are the logged parts, in order."""

    names: tuple[str, ...]

    def __call__(self, network: Forward, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) images in 0..1 and (m, 6) targets (of a classifier one per image, the whole of it) -> the scalar loss and its detached parts (len(names),).

        With several processes the mean of both over the processes is that of the whole batch.
        """


class GradientTerm(Protocol):
    """Adds to gradients once per optimizer step, after unscaling and clipping and before the step."""

    def add(self, network: Network) -> None: ...


class ParamMask(Protocol):
    """Re-imposes a constraint on parameters after each step, and on the EMA after its update."""

    def apply(self, network: Network) -> None: ...


@runtime_checkable
class GradientMask(Protocol):
    """A `ParamMask` that also silences gradients: after unscaling and before clipping, so that what is masked takes no part in the norm."""

    def mask_gradients(self, network: Network) -> None: ...


class Schedule(Protocol):
    """Sets learning rates and momentum before every batch."""

    def batch(self, step: int, epoch: int) -> int:
        """Called with the number of batches so far; returns how many batches to accumulate for one optimizer step."""


class Evaluator(Protocol):
    """Measures the network after an epoch."""

    def __call__(self, network: Network) -> tuple[float, dict[str, float]]:
        """Return the fitness and the metrics to log."""


class Transition(Protocol):
    """The only seam that may change structure, EMA or AMP, between epochs."""

    def before_epoch(self, loop: Loop, epoch: int) -> None: ...


@runtime_checkable
class Structural(Protocol):
    """A `Transition` after which the network has other tensors than before."""

    def restore(self, loop: Loop, epoch: int) -> None:
        """Give a loop that is about to load the state saved after `epoch` (0-based) the structure that it had then."""


@dataclass(frozen=True)
class EpochRecord:
    """What an epoch gave: mean loss parts, metrics of the EMA network, learning rates by group, fitness, and whether it is the best of its phase.

    `phase`: what the network was, where a recipe changes that ("dense", "pruned", ...): results of different phases are not compared.
    """

    epoch: int
    losses: Mapping[str, float]
    metrics: Mapping[str, float]
    rates: Mapping[str, float]
    fitness: float
    is_best: bool
    phase: str = ""


class Observer:
    """Reads and logs; never writes to the model. Every method may be overridden; the defaults do nothing."""

    def train_start(self, loop: Loop) -> None: ...

    def batch_end(self, loop: Loop, index: int, images: Tensor, targets: Tensor, items: Tensor) -> None: ...

    def epoch_end(self, loop: Loop, record: EpochRecord) -> bool:
        """Return True to ask the loop to stop after this epoch."""
        return False

    def train_end(self, loop: Loop) -> None: ...


@runtime_checkable
class Stateful(Protocol):
    """A seam whose state belongs in the checkpoint."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass
class Seams:
    """The loop's optional seams; `stateful()` names those that the checkpoint carries."""

    terms: list[GradientTerm] = field(default_factory=list)
    masks: list[ParamMask] = field(default_factory=list)
    transitions: list[Transition] = field(default_factory=list)
    observers: list[Observer] = field(default_factory=list)

    def stateful(self) -> dict[str, Stateful]:
        every = [*self.terms, *self.masks, *self.transitions, *self.observers]
        return {f"{type(seam).__name__}.{i}": seam for i, seam in enumerate(every) if isinstance(seam, Stateful)}
