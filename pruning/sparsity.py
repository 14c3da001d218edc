"""Sparsity training: L1 on the gammas of batch norms (network slimming, Liu et al. 2017), as a gradient term of the loop.

This is the subgradient method; `pruning/proximal.py` is the other. The term is added once per optimizer step, after unscaling and
clipping, so its size depends neither on AMP nor on clipping nor on accumulation.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from models.blocks import Blocks
from models.network import Network
from pruning.spaces import find_spaces

NEAR_ZERO = 0.05  # share of a layer's largest gamma below which a gamma counts as near zero


@dataclass(frozen=True)
class SparsityOptions:
    """`strength` is added to each penalised gamma's gradient; `decay`: linearly down to a tenth of it over the run; `beta`: strength on beta."""

    strength: float
    decay: bool = False
    beta: float = 0.0


def strength_at(options: SparsityOptions, epoch: int, epochs: int) -> float:
    """The strength in an epoch of a run of `epochs`; with decay s * (1 - 0.9 * epoch / epochs)."""
    factor = 1 - 0.9 * epoch / epochs if options.decay else 1.0
    return options.strength * factor


def penalised(blocks: Blocks, shortcuts: bool) -> list[str]:
    """Paths of the batch norms to penalise: those that act on a prunable space; without `shortcuts`, not those of shortcut groups.

    `shortcuts=False` fits `prune.py` (`--prune 0`), `True` the other three scripts (`--prune 1`).
    """
    chosen = set()
    for space in find_spaces(blocks).spaces:
        if space.keep is None and (shortcuts or not space.tied):
            chosen |= {block for block, _ in space.members if blocks[block].has_gamma}
    return [blocks[i].bn_path for i in sorted(chosen)]


def equivalent_scale(strength: float, batch_size: int) -> float:
    """The predecessors' `--scale` with the same effect: they add it once per micro-batch, so round(64 / batch) times per step."""
    return strength / max(1, round(64 / batch_size))


class SparsityTerm:
    """Gradient term: grad(gamma) += s * sign(gamma), and for beta likewise. s is `strength_at` the epoch that `before_epoch` set."""

    def __init__(self, paths: list[str], options: SparsityOptions, epochs: int) -> None:
        self.paths, self.options, self.epochs = paths, options, epochs
        self.strength = strength_at(options, 0, epochs)

    def before_epoch(self, loop: object, epoch: int) -> None:
        """Transition seam: follow the schedule."""
        self.strength = strength_at(self.options, epoch, self.epochs)

    @torch.no_grad()
    def add(self, network: Network) -> None:
        """Add the term to the gradients; a parameter that received none gets the penalty alone."""
        for path in self.paths:
            bn = network.get_submodule(path)
            _penalise(bn.weight, self.strength)
            if self.options.beta:
                _penalise(bn.bias, self.options.beta)


def _penalise(parameter: nn.Parameter, strength: float) -> None:
    if not parameter.requires_grad:  # --freeze
        return
    push = parameter.sign()
    if parameter.grad is None:
        parameter.grad = push.mul_(strength)
    else:
        parameter.grad.add_(push, alpha=strength)


@torch.no_grad()
def gammas(network: Network, paths: list[str]) -> list[np.ndarray]:
    """|gamma| of each batch norm in `paths`."""
    return [network.get_submodule(path).weight.abs().cpu().numpy() for path in paths]


def near_zero_share(layers: list[np.ndarray]) -> float:
    """Share of all gammas that lie below `NEAR_ZERO` of their own layer's largest."""
    small = sum(int((g < NEAR_ZERO * max(float(g.max()), 1e-12)).sum()) for g in layers)
    return small / max(sum(len(g) for g in layers), 1)


def advice(medians: list[float], shares: list[float], fitness: list[float], epochs: int, strength: float) -> str | None:
    """Judge the strength after a few epochs and say what to try; None while it is too early to tell or all is well.

    `medians`: median |gamma| before training and after each epoch; `shares`, `fitness`: near-zero share and fitness after each epoch.
    Gammas shrink all together before the first of them arrives near zero, so weakness shows in the median's pace, not in the share.
    """
    done = len(shares)
    if done < max(2, epochs // 4) or done >= epochs:
        return None
    if fitness[-1] < 0.2 * max(fitness) and shares[-1] > 0.3:
        fell = f"fitness fell from {max(fitness):.3f} to {fitness[-1]:.3f}"
        return f"sparsity strength {strength:g} looks too strong: {fell}; try --sr {strength / 3:.2g}"
    projected = 1 - (1 - medians[-1] / max(medians[0], 1e-12)) * epochs / done
    if shares[-1] < 0.05 and projected > 0.5:
        return (
            f"sparsity strength {strength:g} looks too weak: the median gamma is at {medians[-1] / medians[0]:.0%} of its start "
            f"after {done} of {epochs} epochs; "
            f"try --sr {strength * 3:.2g}, or more epochs"
        )
    return None
