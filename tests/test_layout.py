"""The house rules that a machine can hold: which way imports run, no pickle of ours, no script importing another."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.helpers import ROOT

LAYERS = ["data", "utils", "models", "pruning", "engine"]
SCRIPTS = sorted(p for p in ROOT.glob("*.py"))
SOURCES = SCRIPTS + sorted(p for layer in LAYERS for p in (ROOT / layer).rglob("*.py"))


def imports(path: Path) -> list[tuple[str, bool]]:
    """(module, inside a function) of every import in a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inner = {node for f in ast.walk(tree) if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef)) for node in ast.walk(f)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node in inner) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append((node.module, node in inner))
    return found


@pytest.mark.parametrize("layer", [layer for layer in LAYERS if layer != "data"])
def test_imports_run_one_way(layer: str) -> None:
    allowed = set(LAYERS[: LAYERS.index(layer) + 1])
    for path in (ROOT / layer).rglob("*.py"):
        for module, _ in imports(path):
            top = module.split(".")[0]
            assert top not in LAYERS or top in allowed, f"{path.name} of {layer} imports {module}"


def test_no_script_imports_another() -> None:
    names = {path.stem for path in SCRIPTS}
    for path in SCRIPTS:
        assert not names & {module.split(".")[0] for module, _ in imports(path)}, path.name


def test_scripts_parse_their_flags_before_torch_is_imported() -> None:
    """Nothing that a script imports at its top leads to torch: `--help` is instant."""
    heavy = {"torch", "torchvision", "cv2", "matplotlib", "sklearn"}

    def reached(module: str, seen: set[str]) -> set[str]:
        path = ROOT / (module.replace(".", "/") + ".py")
        if module in seen or not path.exists():
            return {module.split(".")[0]} & heavy
        seen.add(module)
        return set().union(*(reached(m, seen) for m, inner in imports(path) if not inner))

    for path in SCRIPTS:
        assert not reached(path.stem, set()), path.name


def test_nothing_pickles() -> None:
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"pickle\.(dump|load)s?\(|allow_pickle=True|weights_only=False|[^.\w]eval\(|[^.\w]exec\(", text), path
