"""What each flag of the training scripts does, through `train.py` itself, with a tiny model at 64 px."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import engine.session as session
from models.checkpoint import Model, load_model, save_model
from models.network import Network
from tests.helpers import SMALL_YAML, small, write_dataset
from utils.errors import InputError


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    (root / "small.yaml").write_text(yaml.safe_dump(SMALL_YAML))
    return write_dataset(root, images=9)


def train(data: Path, folder: Path, *flags: object, weights: Path | None = None, batch: int = 4) -> Path:
    """Train one epoch; return the run folder."""
    start = ["--weights", weights] if weights else ["--cfg", data.parent / "small.yaml"]
    common = ["--data", data, "--img", 64, "--batch", batch, "--epochs", 1, "--workers", 0, "--project", folder, "--device", "cpu"]
    import_module("train").main([str(a) for a in (*start, *common, *flags)])
    return folder / "exp"


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list:
    """The batches that the loop trains on: (image shape, dataset indices)."""
    seen: list = []
    original = session.Loop._batch

    def spy(self, epoch, index, images, targets, repeats=1):
        seen.append(tuple(images.shape))
        return original(self, epoch, index, images, targets, repeats)

    monkeypatch.setattr(session.Loop, "_batch", spy)
    return seen


def test_plain_batches_are_square_and_the_last_one_short(data: Path, tmp_path: Path, batches: list) -> None:
    train(data, tmp_path)
    assert batches == [(4, 3, 64, 64), (4, 3, 64, 64), (1, 3, 64, 64)]


def test_quad_makes_one_image_of_four_at_twice_the_size(data: Path, tmp_path: Path, batches: list) -> None:
    train(data, tmp_path, "--quad")
    assert batches == [(1, 3, 128, 128), (1, 3, 128, 128)]


def test_quad_weighs_the_loss_by_the_samples_in_it() -> None:
    network = Network(small())
    anchors, strides = network.anchors, network.strides
    plain, quad = (session.DetectionLoss(anchors, strides, 3, 64, samples=n) for n in (1, 4))
    maps, targets = network(torch.rand(2, 3, 64, 64)), torch.tensor([[0, 1, 0.4, 0.5, 0.3, 0.4]])
    assert quad(maps, targets)[0].item() == pytest.approx(4 * plain(maps, targets)[0].item())
    assert torch.equal(quad(maps, targets)[1], plain(maps, targets)[1])


def test_multi_scale_trains_at_several_sizes(data: Path, tmp_path: Path, batches: list) -> None:
    train(data, tmp_path, "--multi-scale", "--img", 128, batch=1)
    sides = {shape[2] for shape in batches}
    assert sides <= {64, 96, 128, 160, 192} and len(sides) > 1 and all(s[2] == s[3] for s in batches)


def test_image_weights_draw_with_replacement(data: Path, tmp_path: Path, batches: list, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    original = session.EpochLoader.draw
    monkeypatch.setattr(session.EpochLoader, "draw", lambda self, positions: (drawn.append(positions), original(self, positions))[1])
    train(data, tmp_path, "--image-weights")
    assert len(drawn[0]) == 9 and len(set(drawn[0].tolist())) < 9 and sum(shape[0] for shape in batches) == 9
    with pytest.raises(InputError, match="--image-weights"):
        train(data, tmp_path, "--image-weights", "--rect")


def test_frozen_layers_keep_their_weights_and_move_their_statistics(data: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    start = tmp_path / "start.pt"
    network = Network(small())
    save_model(start, Model(network.blocks, network.state_dict(), ("a", "b", "c"), 64))
    before = load_model(start).state
    for flags, frozen in ((("--freeze", 3), (0, 1, 2)), (("--freeze", 1, 4), (1, 4))):
        folder = train(data, tmp_path / str(len(frozen)), *flags, weights=start)
        after = load_model(folder / "weights" / "last.pt").state
        for key, value in after.items():
            layer = int(key.split(".")[1])
            if layer in frozen and key.endswith(("weight", "bias")):
                assert torch.equal(value, before[key]), key
        moved = {
            int(k.split(".")[1]) for k, v in after.items() if k.endswith(("conv.weight", "bn.weight")) and not torch.equal(v, before[k])
        }
        assert moved and not moved & set(frozen)
        assert not torch.equal(after["model.1.bn.running_mean"], before["model.1.bn.running_mean"])


def test_single_cls_trains_one_class(data: Path, tmp_path: Path) -> None:
    model = load_model(train(data, tmp_path, "--single-cls") / "weights" / "last.pt")
    assert model.names == ("item",) and {b.classes for b in model.blocks if b.kind == "yolo"} == {1}


@pytest.mark.parametrize("flags", [("--rect",), ("--cache", "disk"), ("--cache",), ("--cos-lr", "--label-smoothing", 0.1)])
def test_these_run_to_the_end_and_learn_something(data: Path, tmp_path: Path, flags: tuple) -> None:
    folder = train(data, tmp_path, *flags)
    row = np.loadtxt(folder / "results.csv", delimiter=",", skiprows=1)
    assert np.isfinite(row).all()
    cached = sorted((data.parent / "images" / "train").glob("*.npy"))
    assert len(cached) == (9 if "disk" in flags else 0)
    for path in data.parent.rglob("*.npy"):
        path.unlink()


def test_an_automatic_batch_on_a_cpu_is_yolov5s_sixteen(data: Path, tmp_path: Path, batches: list, capsys) -> None:
    folder = train(data, tmp_path, batch=-1)
    assert batches == [(9, 3, 64, 64)] and "on the CPU the batch size is 16" in capsys.readouterr().out
    assert yaml.safe_load((folder / "opt.yaml").read_text())["batch_size"] == 16
