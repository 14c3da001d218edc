"""Hyper-parameter files: the published values, what is refused, and that each one trains."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from engine.options import TrainOptions
from engine.session import train
from models.cfg import read_cfg_text, write_cfg
from models.checkpoint import load_model
from models.network import Network, with_placeholder_anchors
from tests.helpers import small, stock, write_dataset
from utils import plots
from utils.anchors import autoanchor
from utils.errors import InputError
from utils.hyp import DEFAULTS, HYPS, read_hyp


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of the time of a tiny training; pictures are tested in tests/test_plots.py."""
    for name in [name for name in vars(plots) if name.startswith("plot_")]:
        monkeypatch.setattr(plots, name, lambda *args, **kwargs: None)


SHIPPED = sorted(path.name for path in HYPS.glob("*.yaml"))
# YOLOv5's published values (v7.0; no-augmentation came later), where they differ from hyp.scratch-low.
PUBLISHED = {
    "no-augmentation": {
        "lrf": 0.1, "cls": 0.3, "obj": 0.7, "hsv_h": 0.0, "hsv_s": 0.0, "hsv_v": 0.0, "translate": 0.0, "scale": 0.0, "fliplr": 0.0, "mosaic": 0.0,
    },
    "VOC": {
        "lr0": 0.00334, "lrf": 0.15135, "momentum": 0.74832, "weight_decay": 0.00025, "warmup_epochs": 3.3835, "warmup_momentum": 0.59462,
        "warmup_bias_lr": 0.18657, "box": 0.02, "cls": 0.21638, "cls_pw": 0.5, "obj": 0.51728, "obj_pw": 0.67198, "anchor_t": 3.3744, "anchors": 3.412,
        "hsv_h": 0.01041, "hsv_s": 0.54703, "hsv_v": 0.27739, "translate": 0.04591, "scale": 0.75544, "mosaic": 0.85834, "mixup": 0.04266,
    },
    "Objects365": {
        "lr0": 0.00258, "lrf": 0.17, "momentum": 0.779, "weight_decay": 0.00058, "warmup_epochs": 1.33, "warmup_momentum": 0.86, "warmup_bias_lr": 0.0711,
        "box": 0.0539, "cls": 0.299, "cls_pw": 0.825, "obj": 0.632, "anchor_t": 3.44, "anchors": 3.2, "hsv_h": 0.0188, "hsv_s": 0.704, "hsv_v": 0.36,
        "translate": 0.0902, "scale": 0.491,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_values(name: str) -> None:
    assert read_hyp(f"hyp.{name}.yaml") == DEFAULTS | PUBLISHED[name]


@pytest.mark.parametrize("name", SHIPPED)
def test_each_file_says_what_it_is_for(name: str) -> None:
    lines = (HYPS / name).read_text().splitlines()
    assert lines[0].startswith("# ") and "python " in lines[1] and name in lines[1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("anchors: 0.3", "anchors=0.3 must be 1 to 20 anchors per level, or 0"),
        ("anchors: -3", "anchors=-3 must be"),
        ("anchors: 400", "anchors=400 must be"),
        ("anchors: [3]", "must be a number"),
        ("lr0: .nan", "lr0=nan must be a finite number"),
        ("box: .inf", "box=inf must be a finite number"),
        ("anchor: 3", "unknown hyper-parameter 'anchor'; did you mean anchor"),
    ],
)
def test_bad_values_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "h.yaml").write_text(text)
    with pytest.raises(InputError) as error:
        read_hyp(tmp_path / "h.yaml")
    assert message in str(error.value) and "h.yaml" in str(error.value) and "\n" not in str(error.value)


# ---- anchors -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3, 5])
def test_another_number_of_anchors_widens_every_head(count: int) -> None:
    blocks = with_placeholder_anchors(stock("n", nc=4), count)
    heads = [b for b in blocks if b.kind == "yolo"]
    assert [len(b.anchors) for b in heads] == [count] * 3 and heads[0].anchors[0] == (0.0, 1.0)
    assert [blocks[b.inputs[0]].channels for b in heads] == [count * 9] * 3
    assert read_cfg_text(write_cfg(blocks)) == blocks
    maps = Network(blocks).eval()(torch.zeros(1, 3, 64, 64))
    assert [m.shape[1] for m in maps] == [count * 9] * 3


def test_placeholders_are_always_refitted() -> None:
    """Some placeholders fit small labels well; one with a side of zero must not stay for that."""
    anchors = np.arange(12.0).reshape(2, 3, 2)
    wh = np.random.default_rng(0).uniform(3, 9, (50, 2))
    with np.errstate(all="raise"):
        found = autoanchor(anchors, wh, 4.0)
    assert found.shape == (2, 3, 2) and found.min() >= 2


def options(tmp_path: Path, **changes: object) -> TrainOptions:
    (tmp_path / "small.cfg").write_text(write_cfg(small()))
    base = TrainOptions(
        data=str(write_dataset(tmp_path / "set")), cfg=str(tmp_path / "small.cfg"), epochs=1, batch_size=4, imgsz=64, workers=0, device="cpu",
        project=str(tmp_path / "runs"),
    )  # fmt: skip
    return replace(base, **changes)


@pytest.mark.parametrize("name", SHIPPED)
def test_an_epoch_with_each_file(tmp_path: Path, name: str) -> None:
    run = train(options(tmp_path, hyp=name))
    model = load_model(run / "weights" / "last.pt")
    assert all(torch.isfinite(v).all() for v in model.state.values() if v.is_floating_point())
    anchors = [side for b in model.blocks for anchor in b.anchors for side in anchor]
    assert len(anchors) == 12 and min(anchors) >= 2  # two levels of three, none a placeholder
    assert yaml.safe_load((run / "hyp.yaml").read_text()) == read_hyp(name)


def hyp_with_anchors(tmp_path: Path, count: float) -> str:
    (tmp_path / "hyp.yaml").write_text(f"anchors: {count}\n")
    return str(tmp_path / "hyp.yaml")


def test_fine_tuning_with_another_number_of_anchors(tmp_path: Path) -> None:
    """The heads are new, everything else is transferred; a rate of zero keeps it as it was."""
    first = train(options(tmp_path))
    (tmp_path / "hyp.yaml").write_text("anchors: 4.4\nlr0: 0\nwarmup_bias_lr: 0\n")
    weights = first / "weights" / "last.pt"
    second = train(options(tmp_path, weights=str(weights), cfg="", hyp=str(tmp_path / "hyp.yaml")))
    old, new = load_model(weights), load_model(second / "weights" / "last.pt")
    assert [len(b.anchors) for b in new.blocks if b.kind == "yolo"] == [4, 4]
    moved = [k for k, v in new.state.items() if k.endswith("weight") and not (v.shape == old.state[k].shape and v.equal(old.state[k]))]
    assert moved == ["model.14.m.0.weight", "model.14.m.1.weight"] and new.state[moved[0]].shape[0] == 4 * 8


def test_no_autoanchor_keeps_the_models_anchors(tmp_path: Path) -> None:
    run = train(options(tmp_path, hyp=hyp_with_anchors(tmp_path, 3.4), noautoanchor=True))
    assert [b.anchors for b in load_model(run / "weights" / "last.pt").blocks] == [b.anchors for b in small()]


@pytest.mark.parametrize(
    ("count", "message"), [(5, "--noautoanchor: .* asks for 5 anchors per level, but the model has 3"), (0, "only placeholders")]
)
def test_no_autoanchor_needs_anchors_to_keep(tmp_path: Path, count: int, message: str) -> None:
    wanted = options(tmp_path, hyp=hyp_with_anchors(tmp_path, count), noautoanchor=True)
    if not count:
        (tmp_path / "small.cfg").write_text(write_cfg(with_placeholder_anchors(small(), 3)))
    with pytest.raises(InputError, match=message):
        train(wanted)
    assert not (tmp_path / "runs").exists()
