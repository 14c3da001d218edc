"""Which channels go: scores of members -> one mask over channel classes. The pruning scripts are presets of `PrunePolicy`.

Every member of a space that the criterion scores has a *vote*: its scores of the space's channels. Votes are pooled, all together under
`percent` or layer by layer under a `LayerPlan`, and the lowest are marked; then the votes of a space are combined into its mask.

Ranking is stable and by count: exactly `int(share * pool)` scores are marked, whatever ties there are; no threshold is compared.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil

import numpy as np

from pruning.choices import EQUALIZE
from pruning.criteria import Scores
from pruning.plan import LayerPlan
from pruning.spaces import KeepReason, Space, Spaces
from utils.errors import InputError

MOST = 0.9999  # the largest share that a budget may ask for; what stays then is up to the floors


@dataclass(frozen=True)
class PrunePolicy:
    """How much to prune and how spaces with several members decide.

    `percent`: share in [0, 1) of the pooled scores to mark; with a `plan` the shares are the plan's. `equalize`: how the members of a
    space decide. `first`: the first member speaks for all (the others are not in the pool). `union`, `intersection`: a channel stays
    that any, or every, member keeps. `arithmetic_mean`, `geometric_mean`: the means of the members' scores count as one. `keep`: as union, but groups tied by a
    shortcut stay whole. `layer_keep`: share of each space's channels that always stays, `min_filters`: number of them (at least
    one). `divisor`: every space's kept channels are extended to a multiple of it by its best dropped ones, or to its whole width.
    """

    percent: float
    equalize: str = "union"
    layer_keep: float = 0.0
    divisor: int = 1
    min_filters: int = 1
    plan: LayerPlan | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.percent < 1:
            raise InputError(f"the share of channels to prune must be at least 0 and below 1, got {self.percent}; try 0.5")
        if not 0 <= self.layer_keep <= 1:
            raise InputError(f"--layer_keep must lie in 0..1, got {self.layer_keep}; try 0.01")
        if self.divisor < 1:
            raise InputError(f"--divisor must be at least 1, got {self.divisor}; try 8")
        if self.min_filters < 1:
            raise InputError(f"--min-filters must be at least 1, got {self.min_filters}; try 8")
        if self.equalize not in (*EQUALIZE, "keep"):
            raise ValueError(f"unknown rule for the members of a space: {self.equalize!r}")

    def scaled(self, amount: float) -> PrunePolicy:
        """The policy that prunes `amount`: a share of the pool, or with a plan that multiple of each of its shares."""
        return replace(self, plan=self.plan.scaled(amount)) if self.plan else replace(self, percent=amount)

    @property
    def most(self) -> float:
        """The largest amount that `scaled` takes."""
        return self.plan.most if self.plan else MOST


@dataclass(frozen=True)
class Selection:
    """What a policy decided. `mask`: (classes,) bool, True = kept. `threshold`: the largest score that was marked. `safe_percent`: the
    largest share at which no vote loses all its channels without a floor stepping in (None under a plan). `planned`/`pool`: marked and
    pooled scores."""

    mask: np.ndarray
    threshold: float
    safe_percent: float | None
    planned: int
    pool: int

    def of(self, spaces: Spaces, block: int) -> np.ndarray:
        """The mask over the output channels of `block`."""
        return self.mask[spaces.channels[block]]


def select_masks(spaces: Spaces, scores: Scores, policy: PrunePolicy) -> Selection:
    """Apply `policy` to the `scores` of every member and return the mask over channel classes."""
    return Selector(spaces, scores, policy).select()


def keep_reason(space: Space, scores: Scores, policy: PrunePolicy) -> KeepReason | None:
    """Why `space` stays whole under `policy` with these `scores`, or None where it may be pruned."""
    if space.keep:
        return space.keep
    if space.tied and policy.equalize == "keep":
        return KeepReason.SHORTCUT
    if not any(block in scores for block, _ in space.members):
        return KeepReason.NO_BATCHNORM
    if policy.plan and not _votes(space, scores, policy):
        return KeepReason.NOT_CONFIGURED
    return None


@dataclass(frozen=True)
class _Vote:
    """What one member says of a space. `block` is the member, `quota` the number of the plan's entry that it belongs to."""

    block: int
    scores: np.ndarray
    quota: int = 0


def _votes(space: Space, scores: Scores, policy: PrunePolicy) -> list[_Vote]:
    """The votes of `space`; under a plan only of members that it asks for, so that a group follows those of its members that are named."""
    members = [m for m in space.members if m[0] in scores]
    every = [_Vote(block, scores[block][positions].max(axis=1)) for block, positions in members]
    if policy.equalize.endswith("mean") and every:
        every = [_Vote(every[0].block, _MEANS[policy.equalize](np.stack([vote.scores for vote in every])))]
        members = members[:1]
    elif policy.equalize == "first":
        every, members = every[:1], members[:1]
    if policy.plan is None:
        return every
    wanted = [policy.plan.quota_of(block, space.producers) for block, _ in members]
    if len(space.members) > 1 and policy.equalize in _ONE_VOTE and wanted and wanted[0] is None:
        wanted = [policy.plan.quota_of_any([block for block, _ in space.members])]  # a vote for all of them, so any may be named
    return [replace(vote, quota=quota) for vote, quota in zip(every, wanted) if quota is not None]


def _geometric_mean(stacked: np.ndarray) -> np.ndarray:
    if (stacked < 0).any():
        raise InputError(
            "--equalize geometric_mean needs scores that are not negative, and --normalize standard makes some so; use mean or max"
        )
    with np.errstate(divide="ignore"):
        return np.exp(np.log(stacked).mean(axis=0))


_ONE_VOTE = ("first", "arithmetic_mean", "geometric_mean")
_MEANS = {"arithmetic_mean": lambda stacked: stacked.mean(axis=0), "geometric_mean": _geometric_mean}


class Selector:
    """Applies a policy, and its scaled variants, to the same scores: what does not depend on the amount is worked out once."""

    def __init__(self, spaces: Spaces, scores: Scores, policy: PrunePolicy) -> None:
        self.spaces, self.policy = spaces, policy
        self.free = [s for s in spaces.spaces if keep_reason(s, scores, policy) is None]
        if not self.free:
            raise InputError("no channel of this model can be pruned under this policy")
        self._votes = [_votes(s, scores, policy) for s in self.free]
        flat = [vote for votes in self._votes for vote in votes]
        self._pool = np.concatenate([vote.scores for vote in flat])
        self._ends = np.cumsum([len(vote.scores) for vote in flat])
        self._groups = _groups(flat, self._pool, policy)
        combine = _combined_scores(policy)
        self._ranking = [combine([vote.scores for vote in votes]) for votes in self._votes]

    def select(self, amount: float | None = None) -> Selection:
        """Select by the policy, or by the policy scaled to `amount`."""
        policy = self.policy if amount is None else self.policy.scaled(amount)
        marked = np.concatenate([group.marked(share, cap) for group, (share, cap) in zip(self._groups, _shares(policy, self._groups))])
        keep_flat = np.ones(len(self._pool), dtype=bool)
        keep_flat[marked] = False
        parts = iter(np.split(keep_flat, self._ends[:-1]))
        combine = np.all if policy.equalize == "intersection" else np.any
        mask = np.ones(self.spaces.count, dtype=bool)
        for space, votes, ranking in zip(self.free, self._votes, self._ranking):
            kept = [_floor(next(parts), vote.scores, self._least(len(vote.scores))) for vote in votes]
            kept = _floor(combine(kept, axis=0), ranking, self._least(space.width))
            mask[space.classes] = _extend(kept, ranking, policy.divisor)
        threshold = float(self._pool[marked].max()) if len(marked) else 0.0
        return Selection(mask, threshold, None if policy.plan else self._safe_percent(), len(marked), len(self._pool))

    def step(self, mask: np.ndarray, number: int, up: bool) -> np.ndarray | None:
        """`mask` with one more unit (`divisor` channels) kept (`up`) or removed in the free space `number`; None where that is not possible."""
        space, ranking, divisor = self.free[number], self._ranking[number], self.policy.divisor
        kept = int(mask[space.classes].sum())
        wanted = min((kept // divisor + 1) * divisor, space.width) if up else (ceil(kept / divisor) - 1) * divisor
        if wanted == kept or wanted < self._least(space.width):
            return None
        best = np.argsort(-ranking, kind="stable")
        order = np.concatenate([best[mask[space.classes][best]], best[~mask[space.classes][best]]])  # what is kept ranks before what is not
        changed = mask.copy()
        changed[space.classes[order[:wanted]]] = True
        changed[space.classes[order[wanted:]]] = False
        return changed

    def _least(self, width: int) -> int:
        return max(1, int(width * self.policy.layer_keep), min(self.policy.min_filters, width))

    def _safe_percent(self) -> float:
        """The share below which every vote keeps its best channel: the lowest of the votes' best ranks."""
        ranks = np.empty(len(self._pool), dtype=np.int64)
        ranks[self._groups[0].order] = np.arange(len(self._pool))
        return float(min(part.max() for part in np.split(ranks, self._ends[:-1]))) / len(self._pool)


@dataclass(frozen=True)
class _Group:
    """Scores that are ranked together. `order`: indices into the pool, lowest score first; `layers`: for each, the member it belongs to; `quota`:
    the plan's entry."""

    order: np.ndarray
    layers: np.ndarray
    quota: int

    def marked(self, share: float, cap: float) -> np.ndarray:
        """The lowest `share` of the group, no more than `cap` of any one layer."""
        planned = int(len(self.order) * share + 1e-9)
        if cap >= 1:
            return self.order[:planned]
        allowed = np.zeros(len(self.order), dtype=bool)
        for layer in np.unique(self.layers):
            own = np.flatnonzero(self.layers == layer)
            allowed[own[: int(len(own) * cap + 1e-9)]] = True
        return self.order[allowed][:planned]


def _groups(votes: list[_Vote], pool: np.ndarray, policy: PrunePolicy) -> list[_Group]:
    """One group without a plan; with one, a group per entry with a total, and one per layer of the others."""
    owner = np.concatenate([np.full(len(vote.scores), vote.block) for vote in votes])
    quota = np.concatenate([np.full(len(vote.scores), vote.quota) for vote in votes])
    if policy.plan is None:
        keys = np.zeros(len(pool), dtype=np.int64)
    else:
        alone = np.array([not q.total for q in policy.plan.quotas])[quota]
        keys = np.unique(np.stack([quota, np.where(alone, owner, -1)]), axis=1, return_inverse=True)[1].reshape(-1)
    groups = []
    for key in np.unique(keys):
        members = np.flatnonzero(keys == key)
        order = members[np.argsort(pool[members], kind="stable")]
        groups.append(_Group(order, owner[order], int(quota[order[0]])))
    return groups


def _shares(policy: PrunePolicy, groups: list[_Group]) -> list[tuple[float, float]]:
    """(share, cap per layer) of each group."""
    if policy.plan is None:
        return [(policy.percent, 1.0)]
    return [(policy.plan.quotas[group.quota].ratio, policy.plan.quotas[group.quota].cap) for group in groups]


def _combined_scores(policy: PrunePolicy):
    """How a space's channels rank once its votes are combined: by the best vote, under `intersection` by the worst."""
    return (lambda votes: np.min(votes, axis=0)) if policy.equalize == "intersection" else (lambda votes: np.max(votes, axis=0))


def _floor(keep: np.ndarray, scores: np.ndarray, least: int) -> np.ndarray:
    """Force the best channels on where fewer than `least` survive."""
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
