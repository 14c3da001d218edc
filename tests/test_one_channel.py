"""Models that read grey images (`ch: 1`): from the yaml through training, evaluation, pruning and the cfg."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml

from engine.latency import latency_ms
from models.blocks import flops
from models.cfg import read_cfg_text, write_cfg
from models.checkpoint import load_model, transfer
from models.network import Network
from models.yaml_reader import from_spec
from tests.helpers import SMALL_YAML, small, write_dataset
from utils.augment import AugmentOptions
from utils.dataset import DatasetOptions, DetectionDataset
from utils.errors import InputError
from utils.labels import scan_labels
from utils.planes import to_bgr, to_planes
from utils.plots import plot_images

GREY_YAML = SMALL_YAML | {"ch": 1}


def test_planes_round_trip_and_are_opencvs_grey() -> None:
    image = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    colour, grey = to_planes(image, 3), to_planes(image, 1)
    assert np.array_equal(colour, image[..., ::-1].transpose(2, 0, 1)) and np.array_equal(to_bgr(colour), image)
    assert grey.shape == (1, 6, 8) and np.array_equal(grey[0], cv2.cvtColor(image, cv2.COLOR_BGR2GRAY))
    assert np.array_equal(to_bgr(grey), np.repeat(grey[0][..., None], 3, 2))
    assert colour.transpose(1, 2, 0).flags.c_contiguous and grey.flags.c_contiguous


def test_the_first_convolution_and_the_cfg_follow_ch() -> None:
    blocks = from_spec(GREY_YAML, "grey")
    network = Network(blocks)
    assert network.channels == 1 and network.state_dict()["model.0.conv.weight"].shape[1] == 1
    assert read_cfg_text(write_cfg(blocks)) == blocks and "channels=1" in write_cfg(blocks)
    colour = from_spec(SMALL_YAML, "colour")
    assert 3 * flops(blocks)[1] == flops(colour)[1] and sum(flops(colour)) - sum(flops(blocks)) == 2 * flops(blocks)[1]
    assert latency_ms({"grey": network}, 64, torch.device("cpu"), repeats=1)["grey"] > 0


@pytest.mark.parametrize("ch", [0, 2, 4, "one", True])
def test_other_numbers_of_channels_are_refused(ch: object) -> None:
    with pytest.raises(InputError, match=rf"grey\.yaml: ch={ch}: .* 3 channels \(colour\) or 1 \(grey\)"):
        from_spec(GREY_YAML | {"ch": ch}, "grey.yaml")


def test_a_cfg_of_four_channels_is_refused() -> None:
    with pytest.raises(InputError, match=r"four\.cfg \[net\]: channels=4"):
        read_cfg_text(write_cfg(small()).replace("channels=3", "channels=4"), "four.cfg")


def test_colour_weights_move_into_a_grey_model_but_for_the_first_convolution() -> None:
    grey, colour = Network(from_spec(GREY_YAML, "grey")), Network(small())
    first = grey.state_dict()["model.0.conv.weight"].clone()
    total = len(grey.state_dict())
    assert transfer(colour.state_dict(), grey) == f"transferred {total - 1}/{total} tensors"
    assert torch.equal(grey.state_dict()["model.0.conv.weight"], first)
    assert torch.equal(grey.state_dict()["model.1.conv.weight"], colour.state_dict()["model.1.conv.weight"])


@pytest.mark.parametrize("augment", [None, AugmentOptions(mosaic=1.0, mixup=0.5), AugmentOptions(mosaic=0.0)])
def test_a_grey_sample_is_the_colour_sample_turned_grey(augment: AugmentOptions | None, tmp_path: Path) -> None:
    write_dataset(tmp_path, images=4)
    labels = scan_labels(tmp_path / "images/train")
    colour, grey = (DetectionDataset(labels, DatasetOptions(64, augment, channels=channels)) for channels in (3, 1))
    for index in range(4):
        a, b = colour[0, index], grey[0, index]
        assert np.array_equal(b.image.numpy(), to_planes(to_bgr(a.image.numpy()), 1)) and torch.equal(a.labels, b.labels)


def test_a_mosaic_of_grey_images_is_drawn(tmp_path: Path) -> None:
    plot_images(np.full((2, 1, 32, 32), 77, np.uint8), [np.zeros((0, 5))] * 2, ["a"], tmp_path / "m.png")
    picture = cv2.imread(str(tmp_path / "m.png"))
    assert picture.shape == (32, 64, 3) and (picture[16, 16] == 77).all()


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A grey model trained for an epoch (`grey/weights/last.pt`), and its dataset."""
    root = tmp_path_factory.mktemp("grey")
    write_dataset(root / "data", images=4)
    (root / "grey.yaml").write_text(yaml.safe_dump(GREY_YAML))
    _call("train", "--cfg", root / "grey.yaml", "--data", root / "data/data.yaml", "--img", 64, "--batch", 4, "--epochs", 1,
          "--workers", 0, "--device", "cpu", "--project", root, "--name", "grey")  # fmt: skip
    return root


def _call(script: str, *args: object) -> None:
    import_module(script).main([str(a) for a in args])


def test_a_grey_model_trains_evaluates_prunes_and_detects(work: Path) -> None:
    weights, data = work / "grey/weights/last.pt", work / "data/data.yaml"
    assert load_model(weights).blocks[0].channels == 1
    common = ["--device", "cpu", "--project", work]
    _call("val", "--weights", weights, "--data", data, "--workers", 0, *common, "--name", "val")
    measured = json.loads((work / "val/metrics.json").read_text())
    assert measured["images"] == 4
    _call("slim_prune", "--weights", weights, "--data", data, "--global_percent", 0.4, "--workers", 0, *common, "--name", "pruned")
    report = json.loads((work / "pruned/report.json").read_text())
    assert report["before"]["map50"] == pytest.approx(measured["map50"], abs=1e-6)
    assert report["oracle"]["difference"] <= report["oracle"]["bound"] and report["oracle"]["images"] == 4
    pair = next((work / "pruned").glob("*.pt"))
    assert load_model(pair, pair.with_suffix(".cfg")).blocks[0].channels == 1
    _call("prune_detect", "--weights", pair, "--source", work / "data/images/val", "--conf", 0.001, *common, "--name", "found")
    assert len(list((work / "found").glob("*.png"))) == 4


def test_a_colour_teacher_is_refused_for_a_grey_student(work: Path) -> None:
    from models.checkpoint import Model, save_model

    network = Network(small())
    save_model(work / "colour.pt", Model(network.blocks, network.state_dict(), ("a", "b", "c")))
    with pytest.raises(InputError, match=r"--t_weight .*colour\.pt: the teacher reads images of 3 channels, the student of 1"):
        _call("finetune_pruned", "--weights", work / "grey/weights/last.pt", "--data", work / "data/data.yaml", "--img", 64, "--batch", 4,
              "--epochs", 1, "--workers", 0, "--device", "cpu", "--distill", "--t_weight", work / "colour.pt", "--project", work)  # fmt: skip
