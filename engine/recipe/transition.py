"""The transition to quantisation-aware training by a recipe's `QuantizationModifier`, and its two later steps, between epochs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from engine.ema import Ema
from engine.recipe.build_quantization import WITHOUT_WEIGHTS
from engine.recipe.modifiers import QuantizationModifier, Recipe, first_epoch
from models.blocks import Blocks, resolutions
from models.quantization import QuantScheme, quant_plan, quantize
from utils.device import Precision
from utils.errors import InputError
from utils.log import LOGGER

if TYPE_CHECKING:
    from engine.loop import Loop

# Bytes that a training step keeps for its backward pass, per value that a convolution gives: measured on YOLOv5n and s with torch's saved-tensor hooks
# (11 and 12 in float32, 7 and 8 under autocast, 23 and 28 quantised, where each rounding keeps what it gives and a mask of what it clipped).
FLOAT_BYTES, AUTOCAST_BYTES, QUANTIZED_BYTES = 12, 8, 28


class QuantizationTransition:
    """Transition seam: from the modifier's start on the network is trained in the form in which it will be rounded, in float32.

    It takes place before the first epoch that begins at or after `start_epoch`: a fraction rounds up to the next epoch, since only there structure may
    change. The EMA starts again from the raw weights, as one that had followed the unrounded network would lag behind it. `norm_freeze` (batch norms
    use and keep their running statistics) and `observer_stop` (ranges stay) round up likewise. All follows from the number of the epoch, so
    there is no state to save but the network's.
    """

    def __init__(self, recipe: Recipe, blocks: Blocks, quantized: bool) -> None:
        """`recipe` has one `QuantizationModifier`, as its reader sees to. `quantized`: whether the run starts from a quantised checkpoint.

        Raises `InputError` for that, and for modules that are not there."""
        (self.modifier,) = recipe.of(QuantizationModifier)
        if quantized:
            raise InputError(
                f"{self.modifier.where}: QuantizationModifier: --weights is quantised already, and cannot be quantised twice; start from the checkpoint "
                "before quantisation (best_dense.pt or best_pruned.pt of its run), or leave the modifier out to train the quantised one on"
            )
        self.scheme = scheme_of(self.modifier, blocks)
        self.start = first_epoch(self.modifier.start)

    def before_epoch(self, loop: Loop, epoch: int) -> None:
        if epoch == self.start:
            LOGGER.info(f"from epoch {epoch + 1} on the network is trained quantised, in float32; its EMA starts again")
            self._quantize(loop)
        self._steps(loop, epoch, tell=True)

    def restore(self, loop: Loop, epoch: int) -> None:
        """Structural: the network as it was in `epoch`."""
        if epoch >= self.start:
            self._quantize(loop)
            self._steps(loop, epoch)

    def _quantize(self, loop: Loop) -> None:
        quantize(loop.network, self.scheme)
        loop.ema = Ema(loop.network)
        loop.precision = Precision(loop.precision.device)
        loop.scaler = torch.amp.GradScaler(loop.precision.device.type, enabled=False)
        loop.parallel = loop.wrap()

    def _steps(self, loop: Loop, epoch: int, tell: bool = False) -> None:
        m, quantization = self.modifier, loop.network.quantization
        if quantization is not None and m.norm_freeze is not None and epoch >= first_epoch(m.norm_freeze):
            if tell and epoch == max(first_epoch(m.norm_freeze), self.start):
                LOGGER.info(f"from epoch {epoch + 1} on batch norms use and keep their running statistics")
            loop.network.freeze_norms()
        if quantization is not None and m.observer_stop is not None and epoch >= first_epoch(m.observer_stop):
            if tell and epoch == max(first_epoch(m.observer_stop), self.start):
                LOGGER.info(f"from epoch {epoch + 1} on the ranges of quantisation stay as they are")
            quantization.observing = False


def scheme_of(modifier: QuantizationModifier, blocks: Blocks) -> QuantScheme:
    """What `modifier` asks for, without the entries of `submodules` and `ignore` that stand for layers without weights, which have no say.

    Raises `InputError` for paths that name nothing, and where no convolution is left.
    """
    empty = {b.name for b in blocks if b.name and not any(_inside(c.name, b.name) for c in blocks if c.kind == "convolutional")}
    passed = [entry for entry in (*modifier.modules, *modifier.ignore) if entry in empty or entry in WITHOUT_WEIGHTS]
    if passed:
        LOGGER.info(f"QuantizationModifier: {', '.join(passed)} have no weights, and are as quantised as what they read")
    modules = tuple(entry for entry in modifier.modules if entry not in passed)
    if modifier.modules and not modules:
        raise InputError(f"{modifier.where}: QuantizationModifier: none of the submodules has a convolution")
    ignore = tuple(entry for entry in modifier.ignore if entry not in passed)
    scheme = QuantScheme(modifier.symmetric, modifier.reduce_range, modules, ignore)
    try:
        quant_plan(blocks, scheme)
    except InputError as error:
        raise InputError(f"{modifier.where}: QuantizationModifier: {error}") from None
    return scheme


def _inside(path: str, module: str) -> bool:
    return path == module or path.startswith(f"{module}.")


def activation_bytes(blocks: Blocks, imgsz: int, batch: int, autocast: bool) -> tuple[int, int]:
    """About what a training step keeps for its backward pass before and in quantisation-aware training: bytes for `batch` images of `imgsz` pixels."""
    sizes = resolutions(blocks, imgsz, imgsz)
    values = batch * sum(b.channels * h * w for b, (h, w) in zip(blocks, sizes) if b.kind == "convolutional")
    return values * (AUTOCAST_BYTES if autocast else FLOAT_BYTES), values * QUANTIZED_BYTES


def tell_memory(modifier: QuantizationModifier, blocks: Blocks, imgsz: int, batch: int, precision: Precision) -> None:
    """Say before training starts what quantisation will take. `batch`: images of one process."""
    before, after = activation_bytes(blocks, imgsz, batch, precision.autocast_dtype is not None)
    LOGGER.info(
        f"quantisation from epoch {first_epoch(modifier.start) + 1} on trains in float32 and keeps what it rounded: for {batch} images of {imgsz} px about "
        f"{after / 1e9:.2g} GB of activations, {after / before:.1f} times those before it ({before / 1e9:.2g} GB); where that is too much, "
        "lower --batch-size (accumulation makes up for it) or --imgsz now"
    )
