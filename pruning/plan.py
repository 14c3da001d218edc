"""Per-layer control: a list in the style of NNI's compression config specification -> shares of channels, layer by layer.

    - {sparsity_per_layer: 0.3, op_types: [Conv2d]}
    - {sparsity_per_layer: 0.6, op_names: [model.8.cv3, model.9.cv1]}
    - {total_sparsity: 0.5, max_sparsity_per_layer: 0.8, op_partial_names: [model.2]}
    - {exclude: true, op_names: [model.4.cv3]}

An entry speaks of the layers that meet all its `op_*` keys; a later entry takes a layer over from an earlier one. Layers that no entry asks
for stay whole. YAML or JSON; the list may also be the value of `config_list` in a file that says more, as sensitivity.py writes it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from models.blocks import Block, Blocks
from utils.errors import InputError, did_you_mean
from utils.files import existing

_AMOUNTS = ("sparsity", "sparsity_per_layer", "total_sparsity")
_SELECTORS = ("op_types", "op_names", "op_partial_names")
_KEYS = (*_AMOUNTS, "max_sparsity_per_layer", *_SELECTORS, "exclude")
_TYPES = {
    "default": lambda block: block.kind == "convolutional",
    "Conv2d": lambda block: block.kind == "convolutional",
    "BatchNorm2d": lambda block: block.has_gamma,
}


@dataclass(frozen=True)
class Quota:
    """What an entry asks for: a share `ratio` of each layer's channels, or with `total` of all its layers' together, no more than `cap` of
    any. `entry`: its number in the file."""

    ratio: float
    total: bool = False
    cap: float = 1.0
    entry: int = 0


@dataclass(frozen=True)
class LayerPlan:
    """Quotas, and which one rules each layer. `assigned`: block index -> number of its quota. `excluded`: block indices that stay whole."""

    quotas: tuple[Quota, ...]
    assigned: Mapping[int, int] = field(default_factory=dict)
    excluded: frozenset[int] = frozenset()

    def quota_of(self, member: int, producers: Collection[int]) -> int | None:
        """The quota of a space's `member`. A batch norm over a concat has that of the convolutions (`producers`) in front of it."""
        if member in self.assigned or member in producers:
            return self.assigned.get(member)
        return self.quota_of_any(producers)

    def quota_of_any(self, blocks: Collection[int]) -> int | None:
        """The quota of the first of `blocks` that has one."""
        return next((self.assigned[i] for i in blocks if i in self.assigned), None)

    def scaled(self, factor: float) -> LayerPlan:
        """The plan with every ratio times `factor`, below 1."""
        return replace(self, quotas=tuple(replace(q, ratio=min(q.ratio * factor, 0.9999)) for q in self.quotas))

    @property
    def most(self) -> float:
        """The factor at which every quota asks for all it can."""
        return max((1 / q.ratio for q in self.quotas if q.ratio), default=1.0)


def read_plan(path: str | Path, blocks: Blocks) -> LayerPlan:
    """Read a config file for the network of `blocks`; raise `InputError` naming the file and the entry."""
    path = existing(path, "--config")
    try:
        text = path.read_text(encoding="utf-8")
        entries = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"--config {path}: not readable: {' '.join(str(error).split())}") from None
    if isinstance(entries, dict) and "config_list" in entries:
        entries = entries["config_list"]
    return make_plan(entries, blocks, f"--config {path}")


def make_plan(entries: Any, blocks: Blocks, source: str = "config") -> LayerPlan:
    """The plan of a list of entries (see the module's docstring); `source` begins every error."""
    if not isinstance(entries, list) or not entries or not all(isinstance(e, dict) for e in entries):
        raise InputError(f"{source}: expected a list of entries such as {{sparsity_per_layer: 0.5, op_types: [Conv2d]}}")
    quotas: list[Quota] = []
    assigned: dict[int, int] = {}
    excluded: set[int] = set()
    for number, entry in enumerate(entries, start=1):
        where = f"{source} entry {number}"
        quota = _quota(entry, where)
        layers = _matched(entry, blocks, where)
        if quota is None:
            excluded |= layers
            assigned = {i: q for i, q in assigned.items() if i not in layers}
        else:
            excluded -= layers
            assigned |= dict.fromkeys(sorted(layers), len(quotas))
            quotas.append(replace(quota, entry=number))
    if not quotas:
        raise InputError(f"{source}: every entry excludes; give one with a sparsity, or use --exclude")
    return LayerPlan(tuple(quotas), assigned, frozenset(excluded))


def _quota(entry: Mapping[str, Any], where: str) -> Quota | None:
    """What the entry asks for; None where it excludes."""
    for key in entry:
        if key not in _KEYS:
            raise InputError(f"{where}: unknown key {key!r}{did_you_mean(str(key), _KEYS)}; known: {', '.join(_KEYS)}")
    amounts = [key for key in _AMOUNTS if key in entry]
    exclude = entry.get("exclude", False)
    if not isinstance(exclude, bool):
        raise InputError(f"{where}: exclude must be true or false, got {exclude!r}")
    if exclude:
        if amounts:
            raise InputError(f"{where}: excludes and gives {amounts[0]}; it can do one of them")
        return None
    if len(amounts) != 1:
        raise InputError(f"{where}: needs exactly one of {', '.join(_AMOUNTS)}, or exclude: true; it has {', '.join(amounts) or 'none'}")
    ratio = _share(entry[amounts[0]], f"{where}: {amounts[0]}")
    total = amounts[0] == "total_sparsity"
    if "max_sparsity_per_layer" not in entry:
        return Quota(ratio, total)
    if not total:
        raise InputError(f"{where}: max_sparsity_per_layer goes with total_sparsity; {amounts[0]} already says each layer's share")
    return Quota(ratio, total, _share(entry["max_sparsity_per_layer"], f"{where}: max_sparsity_per_layer"))


def _share(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise InputError(f"{where} must be a number of at least 0 and below 1, got {value!r}")
    return float(value)


def _matched(entry: Mapping[str, Any], blocks: Blocks, where: str) -> set[int]:
    """Indices of the blocks with channels of their own that meet all of the entry's `op_*` keys."""
    layers = {i: b for i, b in enumerate(blocks) if b.kind in ("convolutional", "batchnorm")}
    given = [key for key in _SELECTORS if key in entry]
    if not given:
        raise InputError(f"{where}: names no layers; give {', '.join(_SELECTORS)}, such as op_types: [default]")
    found = set(layers)
    for key in given:
        values = entry[key]
        if not isinstance(values, list) or not values or not all(isinstance(v, str) for v in values):
            raise InputError(f"{where}: {key} must be a list of names, got {values!r}")
        found &= set().union(*(_MATCHERS[key](layers, value, where) for value in values))
    if not found:
        raise InputError(f"{where}: no layer meets {' and '.join(given)} together")
    return found


def _by_type(layers: Mapping[int, Block], value: str, where: str) -> set[int]:
    if value not in _TYPES:
        raise InputError(f"{where}: op_types has {value!r}{did_you_mean(value, _TYPES)}; channels are pruned of {', '.join(_TYPES)}")
    return {i for i, block in layers.items() if _TYPES[value](block)}


def _by_name(layers: Mapping[int, Block], value: str, where: str) -> set[int]:
    """A layer's own name or that of its parts (`model.4.cv1.conv`, `.bn`), or that of a module that holds it."""
    found = {i for i, b in layers.items() if value in (b.name, b.conv_path, b.bn_path) or b.name.startswith(value + ".")}
    if not found:
        names = [b.name for b in layers.values()]
        raise InputError(
            f"{where}: op_names has {value!r}, which is no layer of this model{did_you_mean(value, names)}; a name looks like {names[-1]}"
        )
    return found


def _by_part(layers: Mapping[int, Block], value: str, where: str) -> set[int]:
    found = {i for i, b in layers.items() if value in b.name}
    if not found:
        parts = {".".join(b.name.split(".")[:k]) for b in layers.values() for k in range(1, b.name.count(".") + 2)}
        raise InputError(f"{where}: op_partial_names has {value!r}, which is part of no layer's name{did_you_mean(value, sorted(parts))}")
    return found


_MATCHERS = {"op_types": _by_type, "op_names": _by_name, "op_partial_names": _by_part}
