"""Recipes that tests write, and the error that reading one gives."""

from __future__ import annotations

from typing import Any

import pytest

from engine.recipe.document import recipe_of
from utils.errors import InputError


def tag(name: str, *fields: str) -> str:
    return f"modifiers:\n  - !{name}\n" + "".join(f"    {field}\n" for field in fields)


def pruning(**changed: Any) -> str:
    """A recipe of one GMPruningModifier, but for what is `changed`; its own fields stand in lines 3 to 8, others after these."""
    usual = {"init_sparsity": 0.05, "final_sparsity": 0.8, "start_epoch": 0, "end_epoch": 3, "update_frequency": 1, "params": []}
    return tag("GMPruningModifier", *(f"{name}: {value}" for name, value in (usual | changed).items()))


def error_of(text: str, args: str = "", markdown: bool = False) -> str:
    """The message, which must be one line, that `text` is refused with."""
    with pytest.raises(InputError) as error:
        recipe_of(text, "r.yaml", args, markdown)
    assert "\n" not in str(error.value)
    return str(error.value)
