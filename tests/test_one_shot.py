"""A recipe applied without training: exact zeros, ranges of real images, the checkpoint and the files."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.calibrate import CalibrationOptions
from engine.export_run import ExportOptions, export
from engine.one_shot import OneShotOptions, apply_recipe, one_shot
from engine.recipe.document import read_recipe
from engine.sparsity_report import sparsity_rows, total
from models.checkpoint import Model, load_model, save_model
from models.quantization import QuantScheme, Ranges
from pruning.magnitude import magnitude_masks
from tests.helpers import ROOT, alive, small, write_dataset
from train import main as train_script
from utils.errors import InputError

NAMES = ("a", "b", "c")
PRUNE = """
modifiers:
  - !EpochRangeModifier {start_epoch: 0, end_epoch: 30}
  - !SetLearningRateModifier {start_epoch: 0, learning_rate: 0.05}
  - !GlobalMagnitudePruningModifier {init_sparsity: 0.05, final_sparsity: 0.8, start_epoch: 2, end_epoch: 20, update_frequency: 1, params: __ALL_PRUNABLE__}
"""
QUANTISE = "  - !QuantizationModifier {start_epoch: 25}\n"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"), images=5)


@pytest.fixture(scope="module")
def model() -> Model:
    network = alive(small(), calm=True)
    return Model(network.blocks, network.state_dict(), NAMES, imgsz=64, epoch=7)


def written(folder: Path, text: str, name: str = "r.yaml") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def saved(folder: Path, model: Model) -> str:
    save_model(folder / "m.pt", model)
    return str(folder / "m.pt")


def test_the_final_sparsity_at_once_of_the_smallest_weights(tmp_path: Path, model: Model, capsys) -> None:
    made = apply_recipe(model, read_recipe(written(tmp_path, PRUNE)), CalibrationOptions(""), "m.pt")
    rows = sparsity_rows(made.model.state)
    assert total(rows).zeros == round(0.8 * total(rows).weights) and set(made.pruned) == {r.name for r in rows}
    weights = {name: model.state[name] for name in made.pruned}
    masks = magnitude_masks(weights, 0.8, global_ranking=True)
    for name, value in made.model.state.items():
        assert torch.equal(value, model.state[name].masked_fill(masks[name], 0.0) if name in masks else model.state[name])
    assert made.model.quantization is None and made.model.epoch == -1 and model.epoch == 7
    said = capsys.readouterr().out
    assert "--one-shot: SetLearningRateModifier act in training alone" in said


@pytest.mark.parametrize("mask", ["unstructured", "block4", "2:4"])
def test_layer_by_layer_and_in_patterns(tmp_path: Path, model: Model, mask: str) -> None:
    share = 0.5
    fields = f"init_sparsity: 0.5, final_sparsity: {share}, start_epoch: 0, end_epoch: 4, update_frequency: 1, mask_type: '{mask}'"
    recipe = written(tmp_path, f"modifiers:\n  - !GMPruningModifier {{{fields}, params: ['re:model.[1-6]\\..*cv.*weight']}}\n")
    made = apply_recipe(model, read_recipe(recipe), CalibrationOptions(""), "m.pt")
    for row in sparsity_rows(made.model.state, made.pruned):
        assert row.share == pytest.approx(share, abs=4 / row.weights)
    others = set(model.state) - set(made.pruned)
    assert all(torch.equal(made.model.state[k], model.state[k]) for k in others)


def test_zeros_and_ranges_in_one_go(tmp_path: Path, model: Model, data: Path) -> None:
    recipe = read_recipe(written(tmp_path, PRUNE + QUANTISE))
    made = apply_recipe(model, recipe, CalibrationOptions(str(data)), "m.pt").model
    assert made.quantization.scheme == QuantScheme() and made.network().quantization.observed
    assert total(sparsity_rows(made.state)).share == pytest.approx(0.8, abs=1e-4)
    network = made.network()
    for name, weight in network.named_parameters():
        if name.endswith("conv.weight"):
            assert ((weight == 0) <= (network.quantization.rounded_weight(weight) == 0)).all()


def test_what_the_recipe_says_of_quantisation(tmp_path: Path, model: Model, data: Path) -> None:
    text = "modifiers:\n  - !QuantizationModifier {start_epoch: 0, tensorrt: True, ignore: [model.2, SiLU]}\n"
    made = apply_recipe(model, read_recipe(written(tmp_path, text)), CalibrationOptions(str(data)), "m.pt")
    assert made.model.quantization.scheme == QuantScheme(symmetric=True, ignore=("model.2",)) and made.pruned == ()


def test_export_writes_checkpoint_and_files(tmp_path: Path, model: Model, data: Path, capsys) -> None:
    pytest.importorskip("onnx", reason="requirements-export.txt is not installed")
    pytest.importorskip("onnxruntime", reason="requirements-export.txt is not installed")
    weights, recipe = saved(tmp_path, model), written(tmp_path, PRUNE + QUANTISE)
    paths = export(ExportOptions(weights, recipe=recipe, one_shot=True, data=str(data)))
    assert [p.name for p in paths] == ["m_one_shot_int8.onnx"]
    made = load_model(tmp_path / "m_one_shot.pt")
    assert made.quantization.ranges and total(sparsity_rows(made.state)).share == pytest.approx(0.8, abs=1e-3)
    said = capsys.readouterr().out
    assert "zeros in" in said and "80.0" in said and "make a file compressible" in said and "of torch's int8" in said
    float_recipe = written(tmp_path, PRUNE, "f.yaml")
    assert export(ExportOptions(weights, recipe=float_recipe, one_shot=True))[0].name == "m_one_shot.onnx"
    assert "m_one_shot.onnx: 80.0" in capsys.readouterr().out and load_model(tmp_path / "m_one_shot.pt").quantization is None
    both = export(ExportOptions(weights, recipe=float_recipe, one_shot=True, tensorrt=True, data=str(data)))
    assert both[0].name == "m_one_shot_tensorrt.onnx" and load_model(tmp_path / "m_one_shot.pt").quantization.scheme.symmetric


def test_train_writes_the_checkpoint_into_a_run_folder(tmp_path: Path, model: Model, data: Path) -> None:
    weights, recipe = saved(tmp_path, model), written(tmp_path, PRUNE + QUANTISE)
    argv = [
        "--weights",
        weights,
        "--recipe",
        recipe,
        "--one-shot",
        "--data",
        str(data),
        "--epochs",
        "9",
        "--project",
        str(tmp_path / "runs"),
    ]
    done = subprocess.run([sys.executable, "train.py", *argv], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "nothing is trained, so nothing reads --epochs" in done.stdout and "at 64x64 px" in done.stdout, "the checkpoint's own size"
    made = load_model(tmp_path / "runs/exp/weights/m_one_shot.pt")
    assert made.quantization.ranges and made.imgsz == 64 and made.training is None
    assert f"results saved to {tmp_path / 'runs/exp'}" in done.stdout
    done = subprocess.run(
        [sys.executable, "train.py", *argv, "--cfg", "yolov5n.yaml"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2 and done.stderr.startswith("error: --one-shot: takes the checkpoint")


def test_what_cannot_be_done_at_once_is_told_and_nothing_is_written(tmp_path: Path, model: Model, data: Path) -> None:
    weights = saved(tmp_path, model)
    rates = written(tmp_path, "modifiers:\n  - !SetLearningRateModifier {learning_rate: 0.1, start_epoch: 0}\n", "rates.yaml")
    both = written(tmp_path, PRUNE + QUANTISE, "both.yaml")
    before = {p.name for p in tmp_path.iterdir()}
    with pytest.raises(InputError, match=r"rates\.yaml neither prunes nor quantises"):
        export(ExportOptions(weights, recipe=rates, one_shot=True))
    with pytest.raises(InputError, match=r"both\.yaml:\d+: quantising at once needs images .* --data DATA.yaml"):
        export(ExportOptions(weights, recipe=both, one_shot=True))
    with pytest.raises(InputError, match="--recipe R --one-shot: go together"):
        ExportOptions(weights, recipe=both)
    with pytest.raises(InputError, match="--recipe R --one-shot: go together"):
        ExportOptions(weights, one_shot=True)
    with pytest.raises(InputError, match="include darknet: .* is quantised"):
        export(ExportOptions(weights, ("darknet",), recipe=both, one_shot=True, data=str(data)))
    with pytest.raises(InputError, match=r"both\.yaml:\d+: quantising at once needs images"):
        train_script(["--one-shot", "--weights", weights, "--recipe", both])  # not on the images that training takes without --data
    with pytest.raises(InputError, match="name it with --recipe"):
        OneShotOptions(weights, "")
    with pytest.raises(InputError, match="must be trained; name it with --weights"):
        OneShotOptions("", both)
    assert {p.name for p in tmp_path.iterdir()} == before
    quantized = saved(tmp_path, replace(model, quantization=Ranges(QuantScheme())))
    with pytest.raises(InputError, match=r"m\.pt is quantised already"):
        one_shot(OneShotOptions(quantized, both, str(data), project=str(tmp_path / "runs")))
    assert not (tmp_path / "runs").exists()
