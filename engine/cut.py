"""A cut: what a pruning decided about a model, before anything is measured or written. What every pruning script makes and `finish` takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from models.blocks import Blocks, flops, parameters
from models.checkpoint import Model
from models.network import Network
from pruning.criteria import Scores
from pruning.masked import masked_network, zero_gamma
from pruning.policy import PrunePolicy, Selection, keep_reason
from pruning.spaces import Spaces
from pruning.surgery import fold_constants, prune


@dataclass(frozen=True)
class LayerWidth:
    """One convolution in the report; `kept` says why it could not be pruned, or is empty."""

    name: str
    before: int
    after: int
    kept: str


@dataclass(frozen=True)
class Cut:
    """`blocks`, `state`: the pruned network. `masked`: the full-width network that it must equal. `gamma_zero`: the full-width tensors with
    gamma at zero in what goes and nothing else done. `layers`: the widths; `lines`: what to tell about the decision; `threshold`: the largest
    |gamma| that goes, None where something else was judged; `report`: the decision for report.json."""

    blocks: Blocks
    state: Mapping[str, Tensor]
    masked: Network
    gamma_zero: Mapping[str, Tensor]
    layers: tuple[LayerWidth, ...]
    lines: tuple[str, ...] = ()
    threshold: float | None = None
    report: Mapping[str, Any] = field(default_factory=dict)


def channel_cut(model: Model, spaces: Spaces, scores: Scores, policy: PrunePolicy, selection: Selection) -> Cut:
    """The cut that removes the channels which `selection` drops from `model`, constants folded first."""
    blocks, state = model.blocks, model.state
    folded = fold_constants(blocks, state, spaces, selection.mask)
    pruned_blocks, pruned_state = prune(blocks, folded, spaces, selection.mask)
    layers = layer_widths(blocks, spaces, scores, selection, policy)
    return Cut(
        pruned_blocks, pruned_state, masked_network(blocks, folded, spaces, selection.mask), zero_gamma(blocks, state, spaces, selection.mask),
        tuple(layers), (layer_table(layers), *_plan_lines(selection, policy, layers)), selection.threshold,
        {
            "policy": asdict(policy) | ({"plan": _plain(policy)} if policy.plan else {}),
            "selection": {k: getattr(selection, k) for k in ("threshold", "safe_percent", "planned", "pool")},
        },
    )  # fmt: skip


def _plain(policy: PrunePolicy) -> list[dict[str, Any]]:
    return [asdict(quota) for quota in policy.plan.quotas]


def layer_widths(blocks: Blocks, spaces: Spaces, scores: Scores, selection: Selection, policy: PrunePolicy) -> list[LayerWidth]:
    """Width before and after of every convolution, with the reason where all of it had to stay."""
    reasons: dict[int, set[str]] = {}
    for space in spaces.spaces:
        reason = keep_reason(space, scores, policy)
        for producer in space.producers:
            reasons.setdefault(producer, set()).add(reason.value if reason else "")
    return [
        LayerWidth(b.name, b.channels, int(selection.of(spaces, i).sum()), "; ".join(sorted(r for r in reasons[i] if r)))
        for i, b in enumerate(blocks)
        if b.kind == "convolutional"
    ]


def layer_table(layers: list[LayerWidth]) -> str:
    """A line per convolution: its channels, those kept, and why all of them stay where they do."""
    lines = [f"{'layer':<22}{'channels':>10}{'kept':>8}{'':>7}  why it stays whole"]
    lines += [f"{x.name:<22}{x.before:>10}{x.after:>8}{x.after / x.before:>7.0%}  {x.kept}" for x in layers]
    return "\n".join(lines)


def _plan_lines(selection: Selection, policy: PrunePolicy, layers: list[LayerWidth]) -> list[str]:
    before, after = sum(x.before for x in layers), sum(x.after for x in layers)
    share = f"{selection.planned / max(selection.pool, 1):.3g}"
    lines = [
        f"planned: {selection.planned} of {selection.pool} scores ({share}), the largest of them {selection.threshold:.4g}; "
        f"achieved: {before - after} of {before} filters ({1 - after / before:.1%}) after groups, floors and rounding"
    ]
    if selection.safe_percent is None:
        return lines
    safe = selection.safe_percent
    lines.insert(0, f"safe upper limit: {safe:.3f} of the {selection.pool} scores can go before a layer loses all its channels")
    if policy.percent > safe:
        lines.append(f"{policy.percent:.4g} is above the safe limit: layers that would be empty keep their best channels")
    return lines


def cost_line(before: Blocks, after: Blocks, imgsz: int) -> str:
    """What the structure alone tells: parameters and FLOPs before and after."""
    params, cost = [sum(parameters(b)) for b in (before, after)], [sum(flops(b, imgsz, imgsz)) for b in (before, after)]
    return (
        f"parameters {params[0]:,} -> {params[1]:,} (-{1 - params[1] / params[0]:.1%}), "
        f"GFLOPs at {imgsz} px {cost[0] / 1e9:.4g} -> {cost[1] / 1e9:.4g} (-{1 - cost[1] / cost[0]:.1%})"
    )
