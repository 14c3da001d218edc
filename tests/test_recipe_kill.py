"""Runs by a recipe that are killed in the ramp, at the start of quantisation and in it: resumed, they give the files of the run that was not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.session import train
from models.checkpoint import load_model
from tests.test_recipe_training import BOTH
from tests.test_resume_kill import Place, assert_equal, killed_and_resumed, one_thread  # noqa: F401 - the fixture acts here too

BATCHES = 6  # per epoch
AT = {
    "in the ramp": f"engine.loop Loop._batch {BATCHES + 4} kill",
    "at the start of quantisation": "engine.recipe.transition QuantizationTransition._quantize 1 kill",
    "in quantisation": f"engine.loop Loop._batch {4 * BATCHES + 4} kill",
    "best of the phase before not kept": "engine.observers Checkpoints._keep_best 2 kill",
    "half of the first quantised last.pt": "torch save 4 half",
    "sparsity not counted": "engine.recipe.run report_sparsity 1 kill",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    found = Place(tmp_path_factory.mktemp("recipe_kill"))
    (found.root / "both.yaml").write_text(BOTH)
    return found


@pytest.fixture(scope="module")
def whole(place: Place) -> Path:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = train(place.options("whole", recipe=f"{place.root}/both.yaml"))
    torch.set_num_threads(threads)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("where", AT)
def test_a_run_by_a_recipe_that_is_killed_resumes_to_the_same_sparsity_scales_and_weights(where: str, place: Place, whole: Path) -> None:
    options = place.options(where.replace(" ", "_"), recipe=f"{place.root}/both.yaml")
    folder = killed_and_resumed(place, options, AT[where])
    assert_equal(whole, folder)
    for name in ("last.pt", "best.pt", "best_pruned.pt"):
        one, two = (load_model(run / "weights" / name) for run in (whole, folder))
        assert one.quantization == two.quantization and (one.quantization is None) == (name == "best_pruned.pt")
        assert all(torch.equal(one.state[k], two.state[k]) for k in one.state)
    assert (folder / "sparsity.json").exists()
