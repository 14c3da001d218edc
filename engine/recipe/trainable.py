"""The transition that freezes and frees parameters by a recipe's `TrainableParamsModifier`s, between epochs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.recipe.modifiers import Recipe, TrainableParamsModifier, first_epoch
from engine.recipe.selectors import select
from models.network import Network
from utils.errors import InputError
from utils.log import LOGGER

if TYPE_CHECKING:
    from engine.loop import Loop


class TrainableTransition:
    """Transition seam: before each epoch the parameters get the flags that the modifiers say, or the ones that they had at the start of the run.

    Starts and ends round up to whole epochs, since DistributedDataParallel is wrapped anew when flags change. Of modifiers that overlap the one
    that started last rules. Running statistics of frozen batch norms go on moving, as with `--freeze`.
    """

    def __init__(self, recipe: Recipe, network: Network) -> None:
        modifiers = sorted(recipe.of(TrainableParamsModifier), key=lambda m: m.start)
        self.chosen = [(m, select(m.params, network, f"{m.where}: {m.tag}", m.params_strict)) for m in modifiers]
        self.own = {name: parameter.requires_grad for name, parameter in network.named_parameters()}
        for m, _ in self.chosen:
            if not any(self.flags(first_epoch(m.start)).values()):
                raise InputError(f"{m.where}: TrainableParamsModifier leaves no parameter to train from epoch {m.start:g} on")

    def flags(self, epoch: int) -> dict[str, bool]:
        """Name -> whether it is trained in `epoch` (0-based)."""
        wanted = dict(self.own)
        for m, names in self.chosen:
            if first_epoch(m.start) <= epoch < first_epoch(m.end):
                wanted |= dict.fromkeys(names, m.trainable)
        return wanted

    def before_epoch(self, loop: Loop, epoch: int) -> None:
        wanted = self.flags(epoch)
        changed = [(name, p) for name, p in loop.network.named_parameters() if p.requires_grad != wanted[name]]
        for name, parameter in changed:
            parameter.requires_grad_(wanted[name])
            parameter.grad = None
        if changed:
            frozen = sum(not flag for flag in wanted.values())
            LOGGER.info(f"from epoch {epoch + 1} on {frozen} of {len(wanted)} parameter tensors are frozen")
            loop.parallel = loop.wrap()
