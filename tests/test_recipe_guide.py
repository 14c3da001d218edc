"""The listings of SparseML's guide, as printed and at full length, one after the other on a tiny set."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.session import train
from models.checkpoint import load_model
from tests.helpers import ROOT, without_pictures_and_timings
from tests.test_recipe_training import Place


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
