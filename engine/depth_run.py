"""Layer pruning: which bottlenecks go, as a cut that `engine/prune_run.py` proves, measures and writes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from engine.cut import Cut, LayerWidth
from engine.prune_run import Job, PruneOptions, finish, prepare
from models.blocks import Blocks
from models.checkpoint import Model
from pruning.depth import Verdict, choose, plain_bottlenecks, remove, silenced
from pruning.masked import masked_network, zero_gamma
from pruning.surgery import fold_constants
from utils.errors import InputError


def run(options: PruneOptions, shortcuts: int) -> Path | None:
    """Remove `shortcuts` bottlenecks; return the run folder (None in a dry run)."""
    if shortcuts < 1:
        raise InputError(f"--shortcuts {shortcuts}: the number of bottlenecks to remove, at least 1")
    job = prepare(options)
    return finish(job, select_bottlenecks(job, shortcuts))


def select_bottlenecks(job: Job, shortcuts: int) -> Cut:
    """Judge the bottlenecks, choose and cut."""
    return depth_cut(job.model, choose(job.model.blocks, job.model.state, shortcuts, job.options.exclude))


def depth_cut(model: Model, verdicts: list[Verdict]) -> Cut:
    """The cut that removes the bottlenecks which `verdicts` say go from `model`, constants folded first."""
    blocks, state = model.blocks, model.state
    removed = [v.residual for v in verdicts if v.removed]
    spaces, mask = silenced(blocks, removed)
    folded = fold_constants(blocks, state, spaces, mask)
    small_blocks, small_state = remove(blocks, folded, removed)
    names = ", ".join(r.name for r in removed)
    return Cut(
        small_blocks, small_state, masked_network(blocks, folded, spaces, mask), zero_gamma(blocks, state, spaces, mask),
        tuple(layer_widths(blocks, small_blocks, verdicts)), (table(verdicts), *_left_alone(blocks), f"removed: {names}"),
        None,
        {
            "shortcuts": len(removed), "removed": [r.name for r in removed],
            "bottlenecks": [
                {"name": v.residual.name, "gamma": v.gamma, "parameters": v.parameters, "removed": v.removed, "note": v.note} for v in verdicts
            ],
        },
    )  # fmt: skip


def layer_widths(before: Blocks, after: Blocks, verdicts: list[Verdict]) -> list[LayerWidth]:
    """Width before and after of every convolution: 0 where it is gone; the reason where its bottleneck had to stay."""
    left = {b.name for b in after}
    notes = {before[i].name: v.note for v in verdicts for i in v.residual.branch if not v.note.startswith("gone")}
    return [
        LayerWidth(b.name, b.channels, b.channels * (b.name in left), notes.get(b.name, "")) for b in before if b.kind == "convolutional"
    ]


def table(verdicts: list[Verdict]) -> str:
    """A line per bottleneck with a shortcut: what it is judged by, its parameters, and what becomes of it."""
    width = max(22, *(len(v.residual.name) + 2 for v in verdicts))
    ranks = np.argsort(np.argsort([v.gamma for v in verdicts], kind="stable")) + 1
    lines = [f"{'bottleneck':<{width}}{'mean |gamma|':>14}{'rank':>6}{'parameters':>12}"]
    for v, rank in zip(verdicts, ranks):
        fate = "removed" if v.removed else f"stays: {v.note}" if v.note.startswith("excluded") else v.note or "stays"
        lines.append(f"{v.residual.name:<{width}}{v.gamma:>14.4f}{rank:>6}{v.parameters:>12,}  {fate}")
    return "\n".join(lines)


def _left_alone(blocks: Blocks) -> list[str]:
    plain = plain_bottlenecks(blocks)
    if not plain:
        return []
    names = ", ".join(plain[:4]) + (", …" if len(plain) > 4 else "")
    return [f"left alone: {len(plain)} bottlenecks without a shortcut ({names}); nothing would be left in their place"]
