"""What a recipe says, as plain data: one frozen dataclass per modifier, and `Recipe`. Nothing here acts; the seams of `engine/recipe` do.

Epochs are numbers on the recipe's clock: batches done / batches per epoch, 0.0 at the first batch of the run; fractions are legal. A
`start_epoch` of -1 means from the start, an `end_epoch` of -1 never. Field names are SparseML's, so that its recipes read as they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

ALL, ALL_PRUNABLE = "__ALL__", "__ALL_PRUNABLE__"
FROM_PARAM = "__FROM_PARAM__"


def first_epoch(at: float) -> int:
    """The epoch (0-based) before which a change takes place that is due at `at` on the recipe's clock: fractions round up.

    What arithmetic rounds is no fraction: `50 * 1.1` is 55.00000000000001, and means 55.
    """
    return math.ceil(min(at, 1e9) - 1e-9)


@dataclass(frozen=True)
class Modifier:
    """What every modifier has. `where`: FILE:LINE of its tag, for messages; two modifiers that say the same are equal wherever they stand."""

    start_epoch: float = -1.0
    end_epoch: float = -1.0
    where: str = field(default="", compare=False, kw_only=True)

    @property
    def tag(self) -> str:
        """The name after `!` in a recipe."""
        return type(self).__name__

    @property
    def start(self) -> float:
        """The epoch from which it is active, never negative."""
        return max(self.start_epoch, 0.0)

    @property
    def end(self) -> float:
        """The epoch at which it ends; infinity where it never does."""
        return self.end_epoch if self.end_epoch >= 0 else math.inf


@dataclass(frozen=True)
class EpochRangeModifier(Modifier):
    """The length of the run: with it in a recipe, the largest rounded-up start or end of all modifiers replaces `--epochs`."""


@dataclass(frozen=True)
class SetLearningRateModifier(Modifier):
    """One learning rate from `start_epoch` on. `param_groups`: roles (`bias`, `weight`, `norm`); empty: every group."""

    learning_rate: float = 0.0
    param_groups: tuple[str, ...] = ()


@dataclass(frozen=True)
class LearningRateFunctionModifier(Modifier):
    """A curve from `init_lr` at `start_epoch` to `final_lr` at `end_epoch`: linear, cosine or cyclic_linear (cycles of `cycle_epochs`)."""

    lr_func: str = "linear"
    init_lr: float = 0.0
    final_lr: float = 0.0
    cycle_epochs: float = 1.0
    param_groups: tuple[str, ...] = ()


@dataclass(frozen=True)
class LearningRateModifier(Modifier):
    """A torch scheduler in units of epochs: StepLR {step_size, gamma}, MultiStepLR {milestones, gamma}, ExponentialLR {gamma},
    CosineAnnealingWarmRestarts {lr_min, cycle_epochs}."""

    lr_class: str = "ExponentialLR"
    lr_kwargs: Mapping[str, Any] = field(default_factory=dict)
    init_lr: float = 0.0


@dataclass(frozen=True)
class SetWeightDecayModifier(Modifier):
    """One weight decay from `start_epoch` on; `param_groups` empty: the groups that decay (convolution weights), not biases and gammas."""

    weight_decay: float = 0.0
    param_groups: tuple[str, ...] = ()


@dataclass(frozen=True)
class TrainableParamsModifier(Modifier):
    """Freeze (or free) parameters from `start_epoch` to `end_epoch`; then their own flags come back. `params`: selectors."""

    params: tuple[str, ...] = ()
    trainable: bool = True
    params_strict: bool = True


@dataclass(frozen=True)
class ConstantPruningModifier(Modifier):
    """Zeros stay zero: from `start_epoch` on every weight of `params` that is zero is masked."""

    params: tuple[str, ...] = (ALL_PRUNABLE,)


@dataclass(frozen=True)
class GMPruningModifier(Modifier):
    """Gradual magnitude pruning (Zhu & Gupta 2017): the share of zeros grows from `init_sparsity` to `final_sparsity`, layer by layer.

    `init_sparsity` None: each tensor's own at the start (`__FROM_PARAM__`). `targets`: final sparsity -> selectors, where the recipe gives a map;
    otherwise `final_sparsity` for all of `params`. `inter_func`: linear, cubic, inverse_cubic. `mask_type`: "unstructured", "block4", "A,B"
    (blocks of A output and B input channels) or "N:M" (N of each M consecutive input channels stay). `leave_enabled`: masks hold after the end.
    """

    init_sparsity: float | None = 0.0
    final_sparsity: float | None = None
    targets: tuple[tuple[float, tuple[str, ...]], ...] = ()
    update_frequency: float = 1.0
    params: tuple[str, ...] = (ALL_PRUNABLE,)
    leave_enabled: bool = True
    inter_func: str = "cubic"
    mask_type: str = "unstructured"
    global_sparsity: bool = False


@dataclass(frozen=True)
class MagnitudePruningModifier(GMPruningModifier):
    """The same, always layer by layer."""


@dataclass(frozen=True)
class GlobalMagnitudePruningModifier(GMPruningModifier):
    """The same, with one ranking over all selected tensors."""

    global_sparsity: bool = True


@dataclass(frozen=True)
class QuantizationModifier(Modifier):
    """Quantisation-aware training from `start_epoch` on.

    `modules`: paths whose convolutions are quantised (`submodules`; empty: all). `ignore`: paths or kinds left in float. `symmetric`: activations too
    (`tensorrt: True`). `reduce_range`: weights of 7 bits, for CPUs whose int8 products saturate. `observer_stop`, `norm_freeze`: epochs of
    `disable_quantization_observer_epoch` and `freeze_bn_stats_epoch`, None: never.
    """

    modules: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    symmetric: bool = False
    reduce_range: bool = False
    observer_stop: float | None = None
    norm_freeze: float | None = None
    calibration_steps: int | None = None


@dataclass(frozen=True)
class DistillationModifier(Modifier):
    """Distillation from the teacher of `--t_weight`: loss = (1 - hardness) x task + hardness x the term at `temperature`."""

    hardness: float = 0.5
    temperature: float = 2.0


M = TypeVar("M", bound=Modifier)
LEARNING_RATES = (SetLearningRateModifier, LearningRateFunctionModifier, LearningRateModifier)
PRUNING = (ConstantPruningModifier, GMPruningModifier)  # with their subclasses


@dataclass(frozen=True)
class Recipe:
    """A recipe as read: its modifiers in the file's order. `notes`: what the reader normalised or passed over, one line each, to be logged."""

    modifiers: tuple[Modifier, ...]
    source: str = field(default="", compare=False)
    notes: tuple[str, ...] = field(default=(), compare=False)

    def of(self, *kinds: type[M]) -> list[M]:
        """The modifiers of these kinds, in order."""
        return [m for m in self.modifiers if isinstance(m, kinds)]

    @property
    def epochs(self) -> int | None:
        """Epochs of the run where an `EpochRangeModifier` says that the recipe decides: the largest rounded-up start or end; otherwise None."""
        if not self.of(EpochRangeModifier):
            return None
        return max(first_epoch(edge) for m in self.modifiers for edge in (m.start_epoch, m.end_epoch))
