"""Magnitude pruning as pure functions: how sparse when (the ramp), and which weights that makes zero (the masks).

Gradual magnitude pruning: Zhu and Gupta 2017, "To prune, or not to prune". A mask is a bool tensor of its weight's shape, **True where the weight
is held at zero**. Masks only grow: what was masked ranks below everything, so those of a ramp are nested. Nothing here knows recipes or epochs of a
run; `engine/recipe/pruner.py` does.

Counts are exact: `round(n * sparsity)` of the n weights (of blocks: of the n blocks) are masked, whatever ties there are; of equal weights the
first in order go first. The order is that of the tensor's indices, not of its memory.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

LINEAR, CUBIC, INVERSE_CUBIC = "linear", "cubic", "inverse_cubic"
RAMPS = (LINEAR, CUBIC, INVERSE_CUBIC)
MASK_TYPES = '"unstructured", "block4", "A,B" (blocks of A output and B input channels) or "N:M" (keep N of each M input channels)'
Masks = dict[str, Tensor]


def ramp(progress: float, kind: str) -> float:
    """Share of the way from the first sparsity to the last at `progress` in 0..1 (clamped): linear p, cubic 1 - (1 - p)^3, inverse_cubic
    1 - (1 - p)^(1/3). Cubic prunes most at first, while the network still has much to spare."""
    p = min(max(progress, 0.0), 1.0)
    if kind not in RAMPS:
        raise ValueError(f"{kind!r} is none of {', '.join(RAMPS)}")
    return {LINEAR: p, CUBIC: 1 - (1 - p) ** 3, INVERSE_CUBIC: 1 - (1 - p) ** (1 / 3)}[kind]


def sparsity_at(epoch: float, start: float, end: float, init: float, final: float, kind: str = CUBIC) -> float:
    """The sparsity at `epoch` of a ramp over `start`..`end`: exactly `init` up to its start, exactly `final` from its end on."""
    if epoch >= end:
        return final
    return init if epoch <= start else init + ramp((epoch - start) / (end - start), kind) * (final - init)


@dataclass(frozen=True)
class MaskType:
    """The shape in which weights are masked.

    `keep` of each `out of` consecutive input channels stay at every tap of the kernel ("N:M") where `of` is not 0; otherwise blocks of `rows` output
    by `columns` input channels at one tap go together, 1 by 1 being unstructured.

    >>> MaskType.parse("2:4").densest, MaskType.parse("block4") == MaskType.parse("1,4")
    (0.5, True)
    """

    rows: int = 1
    columns: int = 1
    keep: int = 0
    of: int = 0

    @classmethod
    def parse(cls, text: str) -> MaskType:
        """Read "unstructured", "block4", "A,B" or "N:M"; `ValueError` says what would be right."""
        plain = text.strip().lower()
        if plain in ("unstructured", "block4"):
            return cls() if plain == "unstructured" else cls(1, 4)
        if match := re.fullmatch(r"(\d+)\s*:\s*(\d+)", plain):
            keep, of = int(match[1]), int(match[2])
            if 0 < keep < of:
                return cls(keep=keep, of=of)
        elif match := re.fullmatch(r"[\[(]?\s*(\d+)\s*,\s*(\d+)\s*[\])]?", plain):
            rows, columns = int(match[1]), int(match[2])
            if rows and columns:
                return cls(rows, columns)
        raise ValueError(f"mask_type {text!r} is none that masks can have: {MASK_TYPES}")

    @property
    def densest(self) -> float:
        """The largest sparsity that it can have: 1 - N/M of N:M, otherwise 1."""
        return 1 - self.keep / self.of if self.of else 1.0

    @property
    def unstructured(self) -> bool:
        return not self.of and self.rows == self.columns == 1

    def __str__(self) -> str:
        if self.of:
            return f"{self.keep}:{self.of}"
        return "unstructured" if self.unstructured else f"{self.rows},{self.columns}"

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        """Why a weight of `shape` (output channels, input channels, ...) cannot have such a mask; None where it can."""
        if self.unstructured:
            return None
        if len(shape) < 2:
            return "it has no input channels"
        for channels, side, what in ((shape[0], self.rows, "output"), (shape[1], self.of or self.columns, "input")):
            if channels % side:
                return f"{channels} {what} channel{'s' if channels > 1 else ''}, no multiple of {side}"
        return None


def misfits(weights: Mapping[str, Tensor], kind: MaskType) -> dict[str, str]:
    """Name -> reason of each weight that such a mask does not fit, and that `magnitude_masks` leaves dense."""
    reasons = {name: kind.misfit(tuple(weight.shape)) for name, weight in weights.items()}
    return {name: reason for name, reason in reasons.items() if reason}


@torch.no_grad()
def magnitude_masks(
    weights: Mapping[str, Tensor], sparsity: float | Mapping[str, float], kind: MaskType = MaskType(), global_ranking: bool = False,
    previous: Mapping[str, Tensor] | None = None,
) -> Masks:  # fmt: skip
    """Mask the smallest |w|: in each tensor by itself, or with `global_ranking` in one ranking over all of them (then `sparsity` is one number).

    Returned: a mask on the weight's device for every weight that `kind` fits (see `misfits`). Exactly `round(n * sparsity)` are masked, or as many as
    `previous` (name -> mask) holds, which all stay. Blocks rank by their mean |w|. Of N:M at most M - N in each group are masked, its smallest; at
    `kind.densest` all those, before it the smallest of them, so that a ramp ends in N:M.
    """
    fitting = {name: weight for name, weight in weights.items() if not kind.misfit(tuple(weight.shape))}
    scores, held = {}, {}
    for name, weight in fitting.items():
        before = previous.get(name) if previous else None
        scores[name], held[name] = _scores(weight, before, kind)
    if global_ranking:
        if isinstance(sparsity, Mapping):
            raise ValueError("one ranking over all tensors has one sparsity")
        flat = torch.cat([s.reshape(-1) for s in scores.values()]) if scores else torch.empty(0)
        pooled = _smallest(flat, _count(flat, sparsity, sum(held.values()), kind))
        parts = dict(zip(scores, pooled.split([s.numel() for s in scores.values()])))
    else:
        target = sparsity if isinstance(sparsity, Mapping) else dict.fromkeys(fitting, sparsity)
        parts = {name: _smallest(s.reshape(-1), _count(s, target[name], held[name], kind)) for name, s in scores.items()}
    return {name: _whole(parts[name], scores[name].shape, weight, previous, name) for name, weight in fitting.items()}


def _scores(weight: Tensor, previous: Tensor | None, kind: MaskType) -> tuple[Tensor, int]:
    """What each weight (of blocks: each block, as (rows, columns, taps)) ranks by, -1 where it is masked already, and how many those are.

    Of N:M infinity for those that must stay.
    """
    values = weight.detach().float().abs()
    if previous is not None:
        values = values.masked_fill(previous, -1.0)
    if kind.of:
        values = values.masked_fill(~_among_smallest(values, kind) & (values >= 0), math.inf)
    elif not kind.unstructured:
        tiles = _tiles(values, kind)
        gone = (tiles < 0).all(3).all(1)
        values = tiles.clamp(min=0).mean((1, 3)).masked_fill(gone, -1.0)
    return values, int((values < 0).sum()) if previous is not None else 0


def _tiles(values: Tensor, kind: MaskType) -> Tensor:
    """(O, I, ...) -> (O / rows, rows, I / columns, columns, taps)."""
    return values.reshape(values.shape[0] // kind.rows, kind.rows, values.shape[1] // kind.columns, kind.columns, -1)


def _among_smallest(values: Tensor, kind: MaskType) -> Tensor:
    """True for the M - N smallest of each M consecutive input channels at a tap; of equal ones the first."""
    groups = values.reshape(values.shape[0], -1, kind.of, math.prod(values.shape[2:])).movedim(2, 0)
    smallest = torch.empty_like(groups, dtype=torch.bool)
    for i in range(kind.of):
        rank = (groups[:i] <= groups[i]).sum(0) + (groups[i + 1 :] < groups[i]).sum(0)
        smallest[i] = rank < kind.of - kind.keep
    return smallest.movedim(0, 2).reshape(values.shape)


def _count(scores: Tensor, sparsity: float, held: int, kind: MaskType) -> int:
    if kind.of and sparsity >= kind.densest - 1e-6:
        return int(torch.isfinite(scores).sum())
    most = int(torch.isfinite(scores).sum()) if kind.of else scores.numel()
    return min(max(round(scores.numel() * sparsity), held), most)


def _smallest(scores: Tensor, count: int) -> Tensor:
    """True for exactly `count` of (n,) scores, the smallest; of equal ones the first."""
    if count <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    border = torch.kthvalue(scores, count).values
    chosen = scores < border
    ties = (scores == border).nonzero().view(-1)
    chosen[ties[: count - int(chosen.sum())]] = True
    return chosen


def _whole(chosen: Tensor, shape: torch.Size, weight: Tensor, previous: Mapping[str, Tensor] | None, name: str) -> Tensor:
    """The mask of a weight, laid out in memory as the weight is, from what was chosen of its scores (n,)."""
    chosen = chosen.view(shape)
    if shape != weight.shape:  # blocks
        rows, columns = (whole // blocks for whole, blocks in zip(weight.shape, shape[:2]))
        chosen = chosen.repeat_interleave(rows, 0).repeat_interleave(columns, 1).view(weight.shape)
    mask = torch.empty_like(weight, dtype=torch.bool).copy_(chosen)
    return mask.logical_or_(previous[name]) if previous and name in previous else mask
