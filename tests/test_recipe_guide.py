"""Whole runs by recipes: the listings of SparseML's guide as printed and at full length on a tiny set; two processes against one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from engine.session import train
from models.checkpoint import load_model
from tests.helpers import ROOT, without_pictures_and_timings
from tests.test_distributed import TORCHRUN, run
from tests.test_recipe_training import BOTH, Place


@pytest.mark.slow
def test_the_guides_listings_run_at_full_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_pictures_and_timings(monkeypatch)
    place = Place(tmp_path)
    sparse = train(place.options("guide_gmp", (ROOT / "recipes/guide_gmp.yaml").read_text()))
    assert len((sparse / "results.csv").read_text().splitlines()) == 1 + 50
    pruned = load_model(sparse / "weights/last.pt")
    weights = [v for k, v in pruned.state.items() if v.dim() == 4]
    assert sum(int((v == 0).sum()) for v in weights) / sum(v.numel() for v in weights) == pytest.approx(0.8, abs=1e-3)
    listing = (ROOT / "recipes/guide_qat.yaml").read_text()
    quantized = train(place.options("guide_qat", listing, weights=str(sparse / "weights/last.pt")))
    assert len((quantized / "results.csv").read_text().splitlines()) == 1 + 5
    assert pruned.quantization is None and load_model(quantized / "weights/last.pt").quantization is not None


@pytest.mark.slow
def test_two_processes_prune_and_quantise_as_one(tmp_path: Path) -> None:
    place = Place(tmp_path)
    flags = [
        *("--weights", place.root / "start.pt", "--data", place.data, "--hyp", place.root / "hyp.yaml", "--recipe", place.recipe(BOTH)),
        *"--img 64 --batch-size 4 --workers 0 --device cpu --optimizer AdamW --seed 1 --noautoanchor --patience 0".split(),
        *("--project", place.root),
    ]
    models = []
    for name, program in (("one", [sys.executable]), ("two", TORCHRUN)):
        done = run(*program, ROOT / "train.py", *flags, "--name", name)
        assert done.returncode == 0, done.stderr
        models.append(load_model(place.root / name / "weights/last.pt"))
    zeros = [sum(int((v == 0).sum()) for v in model.state.values() if v.dim() == 4) for model in models]
    assert zeros[0] == zeros[1] > 0 and all(model.quantization is not None for model in models)
