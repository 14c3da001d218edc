"""Which channels go: scores of members -> one mask over channel classes. The four scripts are presets of `PrunePolicy`.

Ranking is stable and by count: exactly `int(percent * pool)` scores are marked, whatever ties there are; no threshold is compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import numpy as np

from models.blocks import Blocks
from pruning.spaces import KeepReason, Space, Spaces
from utils.errors import InputError

Scores = dict[int, np.ndarray]  # block index -> (C,) score of each channel of its batch norm


@dataclass(frozen=True)
class PrunePolicy:
    """How much to prune and how spaces with several members decide.

    `percent`: share in [0, 1) of the pooled scores to mark. `shortcuts`: `keep` leaves groups tied by a shortcut whole, `first`
    lets the first member rule the group (the other members do not count in the pool), `union` keeps a channel that any member
    keeps. `layer_keep`: share of each member's channels that always stays (at least one). `divisor`: every space's kept channels are extended
    to a multiple of it by its best dropped ones, or to its whole width.
    """

    percent: float
    shortcuts: str = "union"
    layer_keep: float = 0.0
    divisor: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.percent < 1:
            raise InputError(f"the share of channels to prune must be at least 0 and below 1, got {self.percent}; try 0.5")
        if not 0 <= self.layer_keep <= 1:
            raise InputError(f"--layer_keep must lie in 0..1, got {self.layer_keep}; try 0.01")
        if self.divisor < 1:
            raise InputError(f"--divisor must be at least 1, got {self.divisor}; try 8")
        if self.shortcuts not in ("keep", "first", "union"):
            raise ValueError(f"unknown shortcut rule {self.shortcuts!r}")


@dataclass(frozen=True)
class Selection:
    """What a policy decided. `mask`: (classes,) bool, True = kept. `threshold`: the largest score that was marked. `safe_percent`: the
    largest share at which no member loses all its channels without a floor stepping in. `planned`/`pool`: marked and pooled scores."""

    mask: np.ndarray
    threshold: float
    safe_percent: float
    planned: int
    pool: int

    def of(self, spaces: Spaces, block: int) -> np.ndarray:
        """The mask over the output channels of `block`."""
        return self.mask[spaces.channels[block]]


def select_masks(spaces: Spaces, scores: Scores, policy: PrunePolicy) -> Selection:
    """Apply `policy` to the `scores` of every member and return the mask over channel classes."""
    free = [s for s in spaces.spaces if keep_reason(s, policy) is None]
    if not free:
        raise InputError("no channel of this model can be pruned under this policy")
    voters = [(s, [_score(scores, m) for m in _voting(s, policy)]) for s in free]
    pool = np.concatenate([vote for _, votes in voters for vote in votes])
    planned = int(len(pool) * policy.percent)
    order = np.argsort(pool, kind="stable")
    keep_flat = np.ones(len(pool), dtype=bool)
    keep_flat[order[:planned]] = False
    mask = np.ones(spaces.count, dtype=bool)
    start = 0
    for space, votes in voters:
        kept = []
        for vote in votes:
            kept.append(_floor(keep_flat[start : start + len(vote)], vote, policy.layer_keep))
            start += len(vote)
        union = np.any(kept, axis=0)
        mask[space.classes] = _extend(union, np.max(votes, axis=0), policy.divisor)
    ranks = np.empty(len(pool), dtype=np.int64)
    ranks[order] = np.arange(len(pool))
    threshold = float(pool[order[planned - 1]]) if planned else 0.0
    return Selection(mask, threshold, _safe_percent(ranks, [len(v) for _, votes in voters for v in votes]), planned, len(pool))


def keep_reason(space: Space, policy: PrunePolicy) -> KeepReason | None:
    """Why `space` stays whole under `policy`, or None where it may be pruned."""
    return space.keep or (KeepReason.SHORTCUT if space.tied and policy.shortcuts == "keep" else None)


def _voting(space: Space, policy: PrunePolicy) -> tuple[tuple[int, np.ndarray], ...]:
    """The members whose scores count. Under `first` the first member speaks for the whole group."""
    return space.members[:1] if policy.shortcuts == "first" else space.members


def _score(scores: Scores, member: tuple[int, np.ndarray]) -> np.ndarray:
    block, positions = member
    return scores[block][positions].max(axis=1)


def _floor(keep: np.ndarray, scores: np.ndarray, layer_keep: float) -> np.ndarray:
    """Force the best channels on where fewer than `max(1, int(n * layer_keep))` survive."""
    least = max(1, int(len(keep) * layer_keep))
    if keep.sum() >= least:
        return keep
    forced = keep.copy()
    forced[np.argsort(-scores, kind="stable")[:least]] = True
    return forced


def _extend(keep: np.ndarray, scores: np.ndarray, divisor: int) -> np.ndarray:
    """Add the best dropped channels until the count is a multiple of `divisor`, or all channels are kept."""
    wanted = min(ceil(int(keep.sum()) / divisor) * divisor, len(keep))
    missing = wanted - int(keep.sum())
    if missing <= 0:
        return keep
    extended = keep.copy()
    ranked = np.argsort(-scores, kind="stable")
    extended[ranked[~keep[ranked]][:missing]] = True
    return extended


def _safe_percent(ranks: np.ndarray, sizes: list[int]) -> float:
    """The share below which every member keeps its best channel: the lowest of the members' best ranks."""
    best = [part.max() for part in np.split(ranks, np.cumsum(sizes)[:-1])]
    return float(min(best)) / len(ranks)


def gamma_scores(blocks: Blocks, state: dict) -> Scores:
    """|gamma| of every batch norm: the criterion of network slimming (Liu et al. 2017)."""
    return {i: state[f"{b.bn_path}.weight"].detach().abs().double().cpu().numpy() for i, b in enumerate(blocks) if b.has_gamma}
