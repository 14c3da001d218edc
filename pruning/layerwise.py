"""One layer at a time: which layers can be pruned alone, the mask that does it, and from the losses measured so the shares of a `--config`.

A layer here is what is decided alone: a channel space that can be pruned, or several whose channels one convolution makes. Convolutions tied by
a shortcut are one layer, named by the first of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import floor
from typing import Any

import numpy as np

from models.blocks import Blocks
from pruning.criteria import Scores
from pruning.plan import LayerPlan, Quota
from pruning.policy import PrunePolicy, Selector
from pruning.spaces import Space, Spaces

DECIMALS = 3  # of the shares that are proposed


@dataclass(frozen=True, eq=False)
class PrunableLayer:
    """`producers`: the convolutions (block indices) whose channels it has, `members` their names; `name` is the first of them.
    `classes`: ids of its channel classes."""

    name: str
    members: tuple[str, ...]
    producers: tuple[int, ...]
    classes: np.ndarray

    @property
    def width(self) -> int:
        """Number of channels that are decided."""
        return len(self.classes)


def prunable_layers(blocks: Blocks, spaces: Spaces, scores: Scores, policy: PrunePolicy) -> list[PrunableLayer]:
    """The layers that `policy` may prune, in network order; raises `InputError` where there is none."""
    groups: list[list[Space]] = []
    for space in Selector(spaces, scores, policy).free:
        together = [g for g in groups if any(set(space.producers) & set(other.producers) for other in g)]
        groups = [g for g in groups if g not in together] + [sum(together, []) + [space]]
    layers = []
    for group in groups:
        producers = tuple(sorted({p for space in group for p in space.producers}))
        names = tuple(blocks[p].name for p in producers)
        layers.append(PrunableLayer(names[0], names, producers, np.concatenate([space.classes for space in group])))
    return sorted(layers, key=lambda layer: layer.producers)


def mask_alone(layer: PrunableLayer, ratio: float, spaces: Spaces, scores: Scores, policy: PrunePolicy) -> np.ndarray:
    """The mask (classes,) under which `layer` loses `ratio` of its channels and every other layer stays whole.

    It is what `--config` does with the one entry `{sparsity_per_layer: ratio, op_names: members}`. Under `union` the members of a group may agree on
    fewer channels than that.
    """
    plan = LayerPlan((Quota(ratio),), dict.fromkeys(layer.producers, 0))
    return Selector(spaces, scores, replace(policy, plan=plan)).select().mask


def tolerated(ratios: Sequence[float], drops: Sequence[float], tolerance: float) -> float:
    """The largest share up to which a layer's loss stays within `tolerance`, by linear interpolation between the measured `ratios` (ascending).

    Nothing pruned (0) loses nothing; beyond the last measured ratio nothing is assumed. A loss counts from the ratio at which it is first met, so a
    lucky larger ratio does not excuse a smaller one. Rounded down to 3 decimals.

    >>> tolerated([0.2, 0.4], [0.0, 0.02], 0.01)
    0.3
    """
    x = np.array([0.0, *ratios])
    y = np.maximum.accumulate([0.0, *drops])
    if y[-1] <= tolerance:
        return float(x[-1])
    above = int(np.argmax(y > tolerance))
    share = (tolerance - y[above - 1]) / (y[above] - y[above - 1])
    found = x[above - 1] + max(share, 0.0) * (x[above] - x[above - 1])
    return floor(found * 10**DECIMALS + 1e-9) / 10**DECIMALS


def config_list(layers: Sequence[PrunableLayer], ratios: Sequence[float]) -> list[dict[str, Any]]:
    """The layers' shares as a list that `--config` takes. Layers whose share is less than one channel are excluded."""
    entries = [
        {"sparsity_per_layer": ratio, "op_names": list(layer.members)} for layer, ratio in zip(layers, ratios) if ratio * layer.width >= 1
    ]
    whole = [name for layer, ratio in zip(layers, ratios) if ratio * layer.width < 1 for name in layer.members]
    return [*entries, *([{"exclude": True, "op_names": whole}] if whole else [])]
