"""What a channel is worth: the criteria, and their normalisation across layers.

A criterion gives `Scores`: block index -> (C,) score of each of the block's output channels; the lowest go first. gamma and taylor judge
by batch norms, the others by the filters of convolutions. A member of a channel space (see `spaces.py`) votes if it has scores.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from models.blocks import Blocks
from models.network import Network
from utils.errors import InputError

Scores = dict[int, np.ndarray]
State = dict[str, Tensor]

# gamma is pooled as it is, as in network slimming: L1 on it makes layers comparable. Filters of layers of other sizes are not.
DEFAULT_NORMALIZE = {"gamma": "none", "random": "none", "l1": "mean", "l2": "mean", "fpgm": "mean", "taylor": "mean"}


class Loss(Protocol):
    """A detection loss: raw head maps and (m, 6) targets -> the scalar loss and its parts."""

    def __call__(self, maps: list[Tensor], targets: Tensor) -> tuple[Tensor, Tensor]: ...


def scores_of(blocks: Blocks, state: State, criterion: str, seed: int = 0) -> Scores:
    """Scores by a criterion that needs no data. `seed`: for `random`.

    gamma: |gamma| (network slimming, Liu et al. 2017). l1, l2: norm of each filter (Li et al. 2017). fpgm: sum of a filter's distances to
    all filters of its layer, small near their geometric median, where others can stand in for it (He et al. 2019). random: the control.
    """
    if criterion == "gamma":
        return gamma_scores(blocks, state)
    if criterion not in _BY_FILTER:
        raise ValueError(f"{criterion!r} is no criterion that goes without data")
    scores = {}
    for index, block in enumerate(blocks):
        if block.kind == "convolutional":
            filters = state[f"{block.conv_path}.weight"].detach().flatten(1).double().cpu()
            scores[index] = _BY_FILTER[criterion](filters, seed + index)
    return scores


def gamma_scores(blocks: Blocks, state: State) -> Scores:
    """|gamma| of every batch norm: the criterion of network slimming (Liu et al. 2017)."""
    return {i: state[f"{b.bn_path}.weight"].detach().abs().double().cpu().numpy() for i, b in enumerate(blocks) if b.has_gamma}


def _fpgm(filters: Tensor, seed: int) -> np.ndarray:
    return torch.cdist(filters, filters).sum(1).numpy()


_BY_FILTER = {
    "l1": lambda filters, seed: filters.abs().sum(1).numpy(),
    "l2": lambda filters, seed: filters.square().sum(1).sqrt().numpy(),
    "fpgm": _fpgm,
    "random": lambda filters, seed: np.random.default_rng(seed).random(len(filters)),
}


def taylor_scores(network: Network, batches: Iterable[tuple[Tensor, Tensor]], loss: Loss) -> Scores:
    """First-order Taylor scores of every batch norm's channels: mean over `batches` of |gamma * dL/dgamma|.

    That is the change of the loss, to first order, when gamma goes to zero while beta's constant stays, which is what surgery does
    (Molchanov et al. 2019, with the gate on gamma). `batches`: (B, channels, H, W) float images in 0..1 and (m, 6) targets; batch norms use
    their running statistics. `network` keeps its weights; it comes back in eval mode without gradients.
    """
    network.eval().requires_grad_(True)
    norms = {i: network.get_submodule(b.bn_path) for i, b in enumerate(network.blocks) if b.has_gamma}
    sums = {i: torch.zeros_like(norm.weight, dtype=torch.float64) for i, norm in norms.items()}
    count = 0
    for images, targets in batches:
        network.zero_grad(set_to_none=True)
        loss(network(images), targets)[0].backward()
        for i, norm in norms.items():
            sums[i] += (norm.weight * norm.weight.grad).detach().abs().double()
        count += 1
    network.zero_grad(set_to_none=True)
    network.requires_grad_(False)
    if not count:
        raise InputError("--criterion taylor needs at least one batch of training images")
    return {i: (total / count).cpu().numpy() for i, total in sums.items()}


def normalized(scores: Scores, how: str) -> Scores:
    """Make layers comparable: divide each layer's scores by their mean or maximum, or standardise them to mean 0 and deviation 1."""
    return {i: _NORMALIZE[how](s) for i, s in scores.items()}


def _divided(scores: np.ndarray, by: float) -> np.ndarray:
    return scores / by if by > 0 else scores  # a layer of zeros stays one


_NORMALIZE = {
    "none": lambda s: s,
    "mean": lambda s: _divided(s, s.mean()),
    "max": lambda s: _divided(s, s.max()),
    "standard": lambda s: _divided(s - s.mean(), s.std()),
}
