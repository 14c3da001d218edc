"""Pruning in depth: whole bottlenecks go, x + f(x) becomes x plus the constant that f gives once its last gammas are taken as zero.

Worked example, `C3` with two residual bottlenecks: m.1 reads s0 = x + m.0(x), and cv3 reads s1 = s0 + m.1(s0). Without m.0, m.1 reads x
itself, and act(beta) of m.0.cv2 is folded into the statistics of both readers of s0: m.1.cv1, and through s1 cv3.

Which go: those whose last convolution has the lowest mean |gamma|, as in the pruning repositories before this one (tanluren's
yolov3-channel-and-layer-pruning was the first). The remaining blocks keep their names.

It needs no spaces of channels: with a channel class for every output channel of every block, the masked network and the folding of
`surgery.py` do all but the removal.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import numpy as np

from models.blocks import Block, Blocks, check, consumers, parameters
from pruning.criteria import gamma_scores
from pruning.spaces import Spaces
from pruning.surgery import State
from utils.errors import InputError


@dataclass(frozen=True)
class Residual:
    """A residual branch that can be removed. `shortcut`: index of the add, `identity`: of the x that it adds to, `branch`: all blocks of f,
    `last`: those of them whose batch norms feed the add (two in a ghost bottleneck)."""

    name: str
    shortcut: int
    identity: int
    branch: tuple[int, ...]
    last: tuple[int, ...]


def residuals(blocks: Blocks) -> list[Residual]:
    """The residual branches of `blocks` in network order.

    A branch is what lies between one input of an add of two and the other: it reads only that input, keeps the resolution, is read by
    nothing but the add, and ends in batch norms. A bottleneck without a shortcut is none: without it nothing would be left.
    """
    readers = consumers(blocks)
    found = []
    for index, block in enumerate(blocks):
        if block.kind == "shortcut" and len(block.inputs) == 2:
            for end, identity in (block.inputs, block.inputs[::-1]):
                branch = _branch(blocks, end, identity)
                last = _last(blocks, end) if branch else []
                if branch and last and all(set(readers[i]) <= {*branch, index} for i in branch):
                    found.append(Residual(_name(blocks, branch), index, identity, tuple(sorted(branch)), tuple(sorted(last))))
                    break
    return found


def _branch(blocks: Blocks, end: int, identity: int) -> set[int]:
    """Everything that `end` is computed from behind `identity`; empty where it reads anything else or changes the resolution."""
    seen: set[int] = set()
    todo = [end]
    while todo:
        index = todo.pop()
        if index == identity or index in seen:
            continue
        if index < identity or blocks[index].stride > 1 or blocks[index].kind in ("focus", "yolo"):
            return set()
        seen.add(index)
        todo += blocks[index].inputs
    return seen


def _last(blocks: Blocks, end: int) -> list[int]:
    """The batch norms that feed the add, through concats; empty where something else does."""
    if blocks[end].has_gamma:
        return [end]
    if blocks[end].kind != "route":
        return []
    parts = [_last(blocks, i) for i in blocks[end].inputs]
    return [i for part in parts for i in part] if all(parts) else []


def _name(blocks: Blocks, branch: set[int]) -> str:
    """The path that the branch's blocks share and no other block lies under; else the name of its last block."""
    names = [blocks[i].name.split(".") for i in sorted(branch) if blocks[i].has_gamma]
    path = ".".join(os.path.commonprefix([name[:-1] for name in names])).removesuffix(".conv")  # a ghost bottleneck's own sequence
    outside = (b for i, b in enumerate(blocks) if i not in branch and (b.name == path or b.name.startswith(path + ".")))
    return path if path and not any(outside) else blocks[max(branch)].name or ".".join(names[-1])


def plain_bottlenecks(blocks: Blocks) -> list[str]:
    """Paths of the bottlenecks (`X.m.N` of cv1 and cv2) that no shortcut goes round."""
    names = {b.name for b in blocks}
    around = {blocks[i].name for residual in residuals(blocks) for i in residual.branch}
    ends = [b.name.removesuffix(".cv2") for b in blocks if b.name.endswith(".cv2") and ".m." in b.name and b.name not in around]
    return [path for path in ends if f"{path}.cv1" in names]


@dataclass(frozen=True)
class Verdict:
    """What became of a residual branch. `gamma`: mean |gamma| of its last convolution; `parameters`: of the branch; `note`: why it had to stay, or
    which removed branch holds it, or empty."""

    residual: Residual
    gamma: float
    parameters: int
    removed: bool
    note: str


def choose(blocks: Blocks, state: State, count: int, exclude: Sequence[str] = ()) -> list[Verdict]:
    """Choose the `count` residual branches with the lowest mean |gamma| of their last convolutions; the verdict on all, in network order.

    Ties are broken by network order. A branch inside one that goes is gone with it and does not count. Raises `InputError` where there are
    not as many, or where a pattern of `exclude` (globs; a path names what is in it) matches none.
    """
    every, cost = residuals(blocks), parameters(blocks)
    if not every:
        raise InputError("this model has no bottleneck with a shortcut, so no layer can be removed; channels can: slim_prune.py")
    scores = gamma_scores(blocks, state)
    gammas = [float(np.concatenate([scores[i] for i in r.last]).mean()) for r in every]
    free = [not _excluded(blocks, r, exclude) for r in every]
    _check_patterns(blocks, every, exclude)
    gone: set[int] = set()
    removed: set[int] = set()
    for number in sorted(range(len(every)), key=gammas.__getitem__):
        if len(removed) < count and free[number] and every[number].shortcut not in gone:
            removed.add(number)
            gone |= set(every[number].branch)
    if len(removed) < count:
        held = f", of which {free.count(False)} are excluded" if not all(free) else ""
        raise InputError(
            f"--shortcuts {count}: only {len(removed)} can be removed; the model has {len(every)} bottlenecks with a shortcut{held}"
        )
    return [
        Verdict(r, gammas[n], sum(cost[i] for i in r.branch), n in removed, _note(r, free[n], [every[m] for m in removed]))
        for n, r in enumerate(every)
    ]


def _note(residual: Residual, free: bool, removed: Sequence[Residual]) -> str:
    outer = next((other.name for other in removed if residual.shortcut in other.branch), "")
    return f"gone with {outer}" if outer else "" if free else "excluded by the user"


def _excluded(blocks: Blocks, residual: Residual, patterns: Sequence[str]) -> bool:
    names = [residual.name, *(blocks[i].name for i in residual.branch)]
    return any(fnmatchcase(name, p) or name.startswith(p + ".") for name in names for p in patterns)


def _check_patterns(blocks: Blocks, every: Sequence[Residual], patterns: Sequence[str]) -> None:
    for pattern in patterns:
        if not any(_excluded(blocks, r, (pattern,)) for r in every):
            names = ", ".join(r.name for r in every[:3])
            raise InputError(f"--exclude {pattern}: matches no bottleneck with a shortcut; those of this model are {names}, …")


def silenced(blocks: Blocks, removed: Sequence[Residual]) -> tuple[Spaces, np.ndarray]:
    """Classes, one for every output channel of every block, and the mask over them that drops the last convolutions of the `removed`
    branches: what `fold_constants`, `masked_network` and `zero_gamma` take."""
    ends = np.cumsum([block.channels for block in blocks])
    channels = tuple(np.arange(end - block.channels, end) for block, end in zip(blocks, ends))
    mask = np.ones(int(ends[-1]), dtype=bool)
    for residual in removed:
        for index in residual.last:
            mask[channels[index]] = False
    return Spaces((), channels, len(mask)), mask


def remove(blocks: Blocks, state: State, removed: Sequence[Residual]) -> tuple[Blocks, State]:
    """Blocks and tensors without the branches `removed` and their adds; whatever read such an add reads its identity. Names stay.

    Pure removal: constants must have been folded before.
    """
    dead = {index for residual in removed for index in residual.branch}
    identity = {residual.shortcut: residual.identity for residual in removed}
    place: dict[int, int] = {}
    left: list[Block] = []
    for index, block in enumerate(blocks):
        if index in dead:
            continue
        if index in identity:
            place[index] = place[identity[index]]
            continue
        place[index] = len(left)
        left.append(replace(block, inputs=tuple(place[i] for i in block.inputs)))
    prefixes = tuple(f"{path}." for i in dead if blocks[i].name for path in _owned(blocks[i]))
    return check(left), {key: value for key, value in state.items() if not key.startswith(prefixes)}


def _owned(block: Block) -> tuple[str, ...]:
    """Module paths of the block's tensors."""
    if block.kind == "convolutional":
        return (block.conv_path, block.bn_path) if block.batch_norm else (block.conv_path,)
    return (block.bn_path,) if block.has_gamma else ()
