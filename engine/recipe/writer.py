"""A recipe as YAML text again, with everything evaluated: what a checkpoint keeps, and what reads as the same modifiers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import yaml

from engine.recipe.modifiers import FROM_PARAM, GMPruningModifier, Modifier, QuantizationModifier, Recipe

_NAMES = {
    "modules": "submodules",
    "symmetric": "tensorrt",
    "observer_stop": "disable_quantization_observer_epoch",
    "norm_freeze": "freeze_bn_stats_epoch",
    "calibration_steps": "num_calibration_steps",
}


def to_yaml(recipe: Recipe) -> str:
    """The text of a recipe, one group of modifiers in order. `document.recipe_of` reads equal modifiers from it."""
    out = ["modifiers:"]
    for modifier in recipe.modifiers:
        out.append(f"  - !{modifier.tag}")
        out += [f"    {name}: {_scalar(value)}" for name, value in _fields(modifier).items()]
    return "\n".join(out) + "\n"


def _fields(modifier: Modifier) -> dict[str, Any]:
    """The fields by the recipe's names; those that say nothing are left out."""
    made = {f.name: getattr(modifier, f.name) for f in fields(modifier) if f.name != "where"}
    if isinstance(modifier, GMPruningModifier):
        if modifier.init_sparsity is None:
            made["init_sparsity"] = FROM_PARAM
        targets = made.pop("targets")
        if targets:
            made["final_sparsity"], made["params"] = dict(targets), []
        elif not modifier.params:
            made["params"] = []
    names = _NAMES if isinstance(modifier, QuantizationModifier) else {}
    said = {name: value for name, value in made.items() if value not in (None, ())}
    return {names.get(name, name): _plain(value) for name, value in said.items()}


def _plain(value: Any) -> Any:
    """Tuples as lists and mappings as dicts, which YAML has."""
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    return {k: _plain(v) for k, v in value.items()} if isinstance(value, Mapping) else value


def _scalar(value: Any) -> str:
    """A value on one line, such that YAML reads it as what it is."""
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6, allow_unicode=True).removesuffix("...\n").strip()
