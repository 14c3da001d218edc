"""Channel spaces: which output channels of a network live and die together.

Every output channel of every convolution starts as a class of its own; a shortcut unites the channels it adds, a depthwise
convolution its output with its input; routes, pools and upsamples only pass classes on. Channels that end in one class must be
kept or removed together. Classes that have the same producers form a `Space`, so a sliced route or a shortcut whose sides are cut
differently needs no rule of its own: the spaces come out cut at the common refinement.

Worked example, `C3` with one residual bottleneck: cv1 makes channels a0..a15, the bottleneck's cv2 makes b0..b15, the shortcut adds
them, so {a0,b0}, {a1,b1}, ... are one space with the producers cv1 and m.0.cv2; cv2 and cv3 have a space each.

A *member* is a block whose tensors judge a space: a convolution that produces it (by its filters, or by the gammas of its own batch
norm), or a later `batchnorm` over a concat. Scores belong to members; the policy combines the members of a space into one mask.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from enum import Enum
from fnmatch import fnmatchcase

import numpy as np

from models.blocks import OUTPUTS, Blocks


class KeepReason(Enum):
    """Why a space stays whole."""

    INPUT = "reads the image"
    FEEDS_YOLO = "head output: its channels are the predictions"
    NO_BATCHNORM = "no batch norm acts on it, so it has no gamma to judge by"
    NOT_CONFIGURED = "no entry of --config asks for it"
    NOT_BACKBONE = "no part of the backbone"
    GROUPED = "grouped convolution"
    SHORTCUT = "tied by a shortcut; this strategy leaves shortcut groups whole"
    EXCLUDED = "excluded by the user"


@dataclass(frozen=True, eq=False)
class Space:
    """A set of channel classes with the same producers.

    `classes`: (n,) ids, ascending. `producers`: convolution block indices in network order. `members`: (block index, position of
    each class among that block's channels, (n, k) — k > 1 where one block holds a class several times) in network order.
    `tied`: whether a shortcut unites its producers.
    """

    classes: np.ndarray
    producers: tuple[int, ...]
    members: tuple[tuple[int, np.ndarray], ...]
    tied: bool
    keep: KeepReason | None

    @property
    def width(self) -> int:
        return len(self.classes)


@dataclass(frozen=True)
class Spaces:
    """All spaces of a network and, for each block, the class of each of its output channels: `channels[i]` is (C_i,) int."""

    spaces: tuple[Space, ...]
    channels: tuple[np.ndarray, ...]
    count: int

    def keeping(self, producers: Collection[int], reason: KeepReason) -> Spaces:
        """Keep whole, for `reason`, every space that one of the blocks `producers` has a part in."""
        hit = set(producers)
        return replace(self, spaces=tuple(replace(s, keep=s.keep or reason) if hit & set(s.producers) else s for s in self.spaces))

    def excluding(self, blocks: Blocks, patterns: tuple[str, ...]) -> Spaces:
        """Keep whole every space with a producer whose name equals or matches one of `patterns` (globs; a path names what is in it)."""

        named = [i for i, b in enumerate(blocks) if any(fnmatchcase(b.name, p) or b.name.startswith(p + ".") for p in patterns)]
        return self.keeping(named, KeepReason.EXCLUDED)


class _Union:
    """Union-find over channel ids; the smallest id stands for its class."""

    def __init__(self) -> None:
        self.parent: list[int] = []

    def fresh(self, n: int) -> np.ndarray:
        start = len(self.parent)
        self.parent.extend(range(start, start + n))
        return np.arange(start, start + n)

    def find(self, i: int) -> int:
        while self.parent[i] != i:
            self.parent[i] = self.parent[self.parent[i]]
            i = self.parent[i]
        return i

    def unite(self, a: np.ndarray, b: np.ndarray) -> None:
        for i, j in zip(a.tolist(), b.tolist()):
            i, j = self.find(i), self.find(j)
            self.parent[max(i, j)] = min(i, j)

    def roots(self, ids: np.ndarray) -> np.ndarray:
        return np.array([self.find(i) for i in ids.tolist()], dtype=np.int64)


def find_spaces(blocks: Blocks) -> Spaces:
    """Return the channel spaces of `blocks`."""
    union, channels = _Union(), []
    tied: list[np.ndarray] = []
    kept: list[tuple[np.ndarray, KeepReason]] = []
    for block in blocks:
        inputs = [channels[i] for i in block.inputs]
        if block.kind == "input":
            channels.append(union.fresh(block.channels))
            kept.append((channels[-1], KeepReason.INPUT))
        elif block.kind == "convolutional":
            channels.append(union.fresh(block.channels))
            if block.groups == block.channels == len(inputs[0]):
                union.unite(inputs[0], channels[-1])
            elif block.groups > 1:  # cutting it would need equal cuts in every group; it and what it reads stay whole
                kept += [(channels[-1], KeepReason.GROUPED), (inputs[0], KeepReason.GROUPED)]
        elif block.kind == "shortcut":
            for other in inputs[1:]:
                union.unite(inputs[0], other)
            tied += inputs
            channels.append(inputs[0])
        elif block.kind == "route":
            joined = np.concatenate(inputs)
            channels.append(joined if block.slice is None else joined[slice(*block.slice)])
        elif block.kind == "focus":
            channels.append(np.tile(inputs[0], 4))
        else:
            channels.append(inputs[0])
            if block.kind in OUTPUTS:
                kept.append((inputs[0], KeepReason.FEEDS_YOLO))
    roots = [union.roots(ids) for ids in channels]
    names, flat = np.unique(np.concatenate(roots), return_inverse=True)
    classes = tuple(np.split(flat, np.cumsum([len(r) for r in roots])[:-1]))
    to_class = lambda ids: np.searchsorted(names, union.roots(ids))  # noqa: E731
    is_tied = set(np.concatenate([to_class(ids) for ids in tied]).tolist()) if tied else set()
    reasons: dict[int, KeepReason] = {}
    for ids, reason in kept:
        for c in to_class(ids).tolist():
            reasons.setdefault(c, reason)
    return Spaces(_group(blocks, classes, len(names), is_tied, reasons), classes, len(names))


def _group(
    blocks: Blocks, classes: tuple[np.ndarray, ...], count: int, tied: set[int], reasons: dict[int, KeepReason]
) -> tuple[Space, ...]:
    """Classes with the same producers, judges, slices, ties and reason to be kept form a space."""
    producers: list[list[int]] = [[] for _ in range(count)]
    judges: list[list[int]] = [[] for _ in range(count)]
    slices: list[list[int]] = [[] for _ in range(count)]  # a slice that lost all its channels would leave its readers without input
    for index, block in enumerate(blocks):
        for c in classes[index].tolist() if block.kind in ("input", "convolutional") else ():
            producers[c].append(index)
        for c in classes[index].tolist() if block.kind in ("convolutional", "batchnorm") else ():
            judges[c].append(index)
        for c in classes[index].tolist() if block.slice is not None else ():
            slices[c].append(index)
    groups: dict[tuple, list[int]] = {}
    for c in range(count):
        groups.setdefault((tuple(producers[c]), tuple(judges[c]), tuple(slices[c]), c in tied, reasons.get(c)), []).append(c)
    spaces = []
    for (made_by, judged_by, _, is_tied, reason), ids in groups.items():
        ids = np.array(ids)
        members = tuple((i, _positions(classes[i], ids)) for i in dict.fromkeys(judged_by))
        spaces.append(Space(ids, tuple(dict.fromkeys(made_by)), members, is_tied, reason))
    return tuple(spaces)


def _positions(channels: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Where each of `ids` stands in `channels`: (n, k); each stands there equally often."""
    order = np.argsort(channels, kind="stable")
    first, last = (np.searchsorted(channels[order], ids, side) for side in ("left", "right"))
    return order[first[:, None] + np.arange(last[0] - first[0])[None]]
