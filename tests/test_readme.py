"""The README says what the project does: its table is the demo's, its files and flags exist."""

from __future__ import annotations

import json
import re
from importlib import import_module

import pytest

from engine.demo_report import table
from tests.helpers import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = ROOT / "docs" / "demo" / "results.json"


def test_the_table_is_generated_from_the_demo() -> None:
    assert table(json.loads(RESULTS.read_text())) in README, "run: python demo.py --publish"


def test_the_demo_showed_what_it_promises() -> None:
    r = json.loads(RESULTS.read_text())
    base, tuned = r["rows"]["base"], r["rows"]["distill"]
    assert base["map50"] >= 0.90
    assert tuned["params"] <= 0.45 * base["params"] and tuned["gflops"] <= 0.55 * base["gflops"]
    assert max(tuned["map50"], r["rows"]["finetune"]["map50"]) >= base["map50"] - 0.01
    assert r["rows"]["sparse"]["map50"] >= base["map50"] - 0.02
    assert r["sparsity"]["sparse"] >= 0.40 and r["sparsity"]["base"] < 0.05
    assert r["first_epoch_map50"] < 0.5
    assert all(tuned["latency_ms"][size] < base["latency_ms"][size] for size in ("128", "640"))


def test_no_placeholder_is_left() -> None:
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        assert not re.search(r"\b(PLACEHOLDER|TODO|SPARSITY_ROWS|OVERHEAD|REFERENCE_\w+)\b", path.read_text(encoding="utf-8")), path.name


def test_every_file_that_is_named_exists() -> None:
    for name in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("line", sorted(set(re.findall(r"^python (\w+)\.py (.+)$", README, re.M))))
def test_every_command_parses(line: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    import shlex

    from utils.errors import InputError
    from utils.flags import Parser

    class Parsed(Exception):
        pass

    original = Parser.parse_args
    monkeypatch.setattr(Parser, "parse_args", lambda self, argv=None: (original(self, argv), (_ for _ in ()).throw(Parsed()))[0])
    with pytest.raises((Parsed, InputError)):
        import_module(line[0]).main(shlex.split(line[1], comments=True))
