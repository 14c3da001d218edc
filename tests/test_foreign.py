"""cfg files and weights of other programs: Darknet's own beside OpenCV, the pruning repositories' beside the networks they came from."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

import detect
import val
from models.blocks import Blocks
from models.checkpoint import Model, load_model, save_model
from models.foreign import ForeignCfg, dialect_of, read_foreign
from models.network import Network
from models.yaml_reader import from_spec
from tests.helpers import ROOT, alive, write_dataset
from tests.prune_cfg import PruneCfg, p5, p6
from tests.test_darknet_opencv import assert_equal, by_network, by_opencv
from utils import plots
from utils.errors import InputError

TINY = """[net]
# a small network in the manner of yolov4-tiny
batch=64
width=96
height=64
channels=3
learning_rate=0.00261
policy=steps
steps=400,450

{conv:8,3,2}
{conv:16,3,2}
{conv:16,3,1}

[route]
layers=-1
groups=2
group_id=1

{conv:8,3,1}
{conv:8,3,1}

[route]
layers=-1,-2

{conv:16,1,1}

[route]
layers=-6,-1

[maxpool]
size=2
stride=2

{conv:32,3,1}

[maxpool]
size=2
stride=2

[convolutional]
batch_normalize=1
size=3
stride=2
pad=1
filters=32
activation=mish

{conv:32,3,1}

[shortcut]
from=-2
activation=linear

{head:24}

[yolo]
mask = 3,4,5
anchors = 10,14,  23,27,  37,58,  81,82,  135,169,  344,319
classes=3
num=6
jitter=.3
scale_x_y = 1.05
ignore_thresh = .7
thresh = 0
nms_kind=greedynms

[route]
layers = -4

{conv:16,1,1}

[upsample]
stride=2

[route]
layers = -1, 11

{conv:24,3,1}
{head:24}

[yolo]
mask = 0,1,2
anchors = 10,14,  23,27,  37,58,  81,82,  135,169,  344,319
classes=3
num=6
thresh = 0
"""


def tiny_cfg() -> str:
    """TINY with its shorthands written out."""
    lines = []
    for line in TINY.splitlines():
        if line.startswith("{conv:"):
            filters, size, stride = line[6:-1].split(",")
            line = f"[convolutional]\nbatch_normalize=1\nfilters={filters}\nsize={size}\nstride={stride}\npad=1\nactivation=leaky\n"
        elif line.startswith("{head:"):
            line = f"[convolutional]\nsize=1\nstride=1\npad=1\nfilters={line[6:-1]}\nactivation=linear\n"
        lines.append(line)
    return "\n".join(lines) + "\n"


def random_weights(cfg: ForeignCfg, seed: int = 0) -> np.ndarray:
    """Numbers for every convolution of `cfg`, in Darknet's order."""
    rng, parts = np.random.default_rng(seed), []
    for block in cfg.blocks:
        if block.kind == "convolutional":
            fan = cfg.blocks[block.inputs[0]].channels * block.size**2
            parts.append(rng.normal(0, 0.5, block.channels))
            if block.batch_norm:
                parts += [rng.uniform(0.5, 1.5, block.channels), rng.normal(0, 0.2, block.channels), rng.uniform(0.5, 1.5, block.channels)]
            parts.append(rng.normal(0, (2 if block.batch_norm else 0.1) / fan**0.5, block.channels * fan))
    return np.concatenate(parts).astype("<f4")


def darknet_files(folder: Path, version: tuple[int, int] = (0, 2)) -> Path:
    """A cfg and `.weights` as Darknet writes them; returns the weights' path."""
    text = tiny_cfg()
    (folder / "tiny.cfg").write_text(text)
    header = np.array([*version, 5], "<i4").tobytes() + (np.array(32013312, "<i8" if version >= (0, 2) else "<i4")).tobytes()
    weights = folder / "tiny.weights"
    weights.write_bytes(header + random_weights(read_foreign(text, "tiny", "darknet")).tobytes())
    return weights


def images() -> Tensor:
    x = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(3))
    x[1] *= 0.3
    return x


# ---- Darknet's own files -------------------------------------------------------------------------------------------------------


def test_darknet_files_of_others_give_what_opencv_makes_of_them(tmp_path: Path) -> None:
    weights = darknet_files(tmp_path)
    model = load_model(weights)
    assert model.names == ("class0", "class1", "class2") and model.imgsz == 96
    assert_equal(by_network(model.network(), images()), by_opencv(tmp_path / "tiny.cfg", images()))


@pytest.mark.parametrize("version", [(0, 1), (0, 2), (1, 0)])
def test_every_header_of_darknet_is_read(version: tuple[int, int], tmp_path: Path) -> None:
    state = load_model(darknet_files(tmp_path, version)).state
    (tmp_path / "other").mkdir()
    wanted = load_model(darknet_files(tmp_path / "other")).state
    assert all(torch.equal(state[k], wanted[k]) for k in wanted)


@pytest.mark.parametrize(
    ("kept", "said"),
    [(-4, r"cut short"), (-6, "cut short"), (10, "10 bytes are too few"), (0, "0 bytes are too few"), (None, "too long")],
)
def test_a_cut_file_is_one_clear_error(kept: int | None, said: str, tmp_path: Path) -> None:
    weights = darknet_files(tmp_path)
    content = weights.read_bytes()
    weights.write_bytes(content + bytes(8) if kept is None else content[:kept])
    with pytest.raises(InputError, match=said) as caught:
        load_model(weights)
    assert str(weights) in str(caught.value) and "\n" not in str(caught.value)


def test_maps_that_do_not_meet_are_one_error_with_the_file() -> None:
    with pytest.raises(InputError, match=r"^tiny\.cfg: block route: its inputs have different resolutions"):
        read_foreign(tiny_cfg().replace("layers = -1, 11", "layers = -1, 10"), "tiny.cfg", "darknet")


def test_what_is_no_weights_file_or_has_no_cfg_is_named(tmp_path: Path) -> None:
    weights = darknet_files(tmp_path)
    (tmp_path / "text.weights").write_text("this is not a weights file, whatever it is called")
    with pytest.raises(InputError, match="no text.cfg beside it; name the cfg with --cfg"):
        load_model(tmp_path / "text.weights")
    with pytest.raises(InputError, match=r"not a Darknet \.weights file"):
        load_model(tmp_path / "text.weights", tmp_path / "tiny.cfg")
    broken = bytearray(weights.read_bytes())
    broken[40:44] = np.float32("nan").tobytes()
    weights.write_bytes(bytes(broken))
    with pytest.raises(InputError, match="not finite"):
        load_model(weights)


def test_names_beside_the_weights_are_read_and_counted(tmp_path: Path) -> None:
    weights = darknet_files(tmp_path)
    (tmp_path / "tiny.names").write_text("cat\ndog\nbird\n")
    assert load_model(weights).names == ("cat", "dog", "bird")
    (tmp_path / "tiny.names").write_text("cat\ndog\n")
    with pytest.raises(InputError, match="has 2 class names, but the cfg says classes=3"):
        load_model(weights)


# ---- the pruning repositories' -------------------------------------------------------------------------------------------------


def same_model(hub: str, depth: float, classes: int = 4) -> Blocks:
    """The YOLOv5 model of a yaml at `depth`, narrow."""
    spec = yaml.safe_load((ROOT / "models" / f"{hub}.yaml").read_text())
    return from_spec(spec | {"depth_multiple": depth, "width_multiple": 0.125}, hub, classes)


DEPTHS = {"s": 0.33, "m": 0.67, "l": 1.0, "x": 1.33}
ERAS = {
    "v6": ("yolov5s", {}),
    "v5": ("hub/yolov5s-v5.0", {"old": True}),
    "v3.1": ("hub/yolov5s-v3.1", {"old": True, "csp": True, "act": "Hardswish"}),
    "v3.0": ("hub/yolov5s-v3.0", {"old": True, "csp": True, "act": "leaky"}),
    "P6": ("hub/yolov5s6", {}),
}


def their_cfg(era: str, depth: float, classes: int = 4) -> PruneCfg:
    return p6(depth, 0.125, classes) if era == "P6" else p5(depth, 0.125, classes, **ERAS[era][1])


@pytest.mark.parametrize("size", ["s", *(pytest.param(size, marks=pytest.mark.slow) for size in "mlx")])
@pytest.mark.parametrize("era", ERAS)
def test_a_cfg_of_theirs_with_a_checkpoint_gives_equal_outputs(era: str, size: str, tmp_path: Path) -> None:
    blocks = same_model(ERAS[era][0], DEPTHS[size])
    network = alive(blocks, size=128)
    save_model(tmp_path / "own.pt", Model(blocks, network.state_dict(), tuple("abcd"), training={}))
    (tmp_path / "theirs.cfg").write_text(their_cfg(era, DEPTHS[size]).text())
    model = load_model(tmp_path / "own.pt", tmp_path / "theirs.cfg")
    assert [b.name for b in model.blocks if b.kind == "convolutional"] != [b.name for b in blocks if b.kind == "convolutional"]
    x = torch.rand(2, 3, 128, 192)
    with torch.no_grad():
        for got, wanted in zip(model.network()(x), network(x), strict=True):
            assert torch.equal(got, wanted)


@pytest.mark.parametrize("dialect", ["auto", "yolov5_prune"])
def test_the_dialect_is_told_by_its_keys(dialect: str) -> None:
    text = their_cfg("v6", 0.33).text()
    assert dialect_of(text, "x") == "yolov5_prune" and dialect_of(tiny_cfg(), "x") == "darknet"
    assert dialect_of((ROOT / "cfg" / "yolov5n.cfg").read_text(), "x") == "ours"


def test_swapped_convolutions_of_equal_shape_are_refused(tmp_path: Path) -> None:
    """cv1 and cv2 of a C3 have one shape: order and wiring tell them apart, shapes would not."""
    blocks = same_model("yolov5s", 0.33)
    save_model(tmp_path / "own.pt", Model(blocks, alive(blocks).state_dict(), tuple("abcd"), training={}))
    cfg = their_cfg("v6", 0.33)
    at = next(i for i, s in enumerate(cfg.sections) if "layers = -2" in s)
    cfg.sections[at + 4] = cfg.sections[at + 4].replace("from=-3", "from=-5")
    (tmp_path / "theirs.cfg").write_text(cfg.text())
    with pytest.raises(InputError, match="read other blocks in the cfg than in the weights|is .*, model"):
        load_model(tmp_path / "own.pt", tmp_path / "theirs.cfg")


def test_a_cfg_of_another_depth_is_refused(tmp_path: Path) -> None:
    blocks = same_model("yolov5s", 0.33)
    save_model(tmp_path / "own.pt", Model(blocks, alive(blocks).state_dict(), tuple("abcd"), training={}))
    (tmp_path / "theirs.cfg").write_text(their_cfg("v6", 0.67).text())
    with pytest.raises(InputError, match="the depth of the model differs"):
        load_model(tmp_path / "own.pt", tmp_path / "theirs.cfg")


def their_pair(folder: Path, era: str, narrow: bool = True) -> tuple[Path, Network]:
    """A pruned pair of theirs (every third convolution of a C3's inside narrower than the template), and the network that it says."""
    cfg = their_cfg(era, 0.33)
    for i, section in enumerate(cfg.sections):
        inside = i + 2 < len(cfg.sections) and cfg.sections[i + 1].startswith("[convolutional]") and "size=3" in cfg.sections[i + 1]
        if narrow and inside and cfg.sections[i + 2].startswith("[shortcut]"):  # m.cv1, whose width nothing else shares
            cfg.sections[i] = "\n".join(
                f"filters={int(line[8:]) - 3}" if line.startswith("filters=") else line for line in section.splitlines()
            )
    (folder / "pruned.cfg").write_text(cfg.text())
    theirs = read_foreign(cfg.text(), "pruned", "yolov5_prune")
    network = alive(theirs.blocks, size=128)
    tensors: dict[str, Tensor] = {}
    for block, section in zip(theirs.blocks, theirs.sections):
        for path, module in ((block.conv_path, "Conv2d"), (block.bn_path, "BatchNorm2d")):
            if (block.kind == "convolutional" and (module == "Conv2d" or block.batch_norm)) or (
                block.kind == "batchnorm" and module != "Conv2d"
            ):
                found = {k[len(path) + 1 :]: v for k, v in network.state_dict().items() if k.startswith(f"{path}.")}
                tensors |= {f"module_list.{section}.{module}.{k}": v for k, v in found.items() if k != "num_batches_tracked"}
    content = {"epoch": -1, "best_fitness": None, "training_results": None, "model": tensors, "optimizer": None}
    torch.save(content, folder / "pruned.pt")
    return folder / "pruned.pt", network


@pytest.mark.parametrize("era", ERAS)
def test_a_pruned_pair_of_theirs_gives_equal_outputs_under_yolov5s_names(era: str, tmp_path: Path) -> None:
    weights, network = their_pair(tmp_path, era)
    model = load_model(weights)
    assert all(b.bn_eps == 1e-3 for b in model.blocks if b.has_gamma)
    assert model.blocks[2 if "v6" in era or era == "P6" else 3].name == "model.1"
    x = torch.rand(2, 3, 128, 192)
    with torch.no_grad():
        for got, wanted in zip(model.network()(x), network(x), strict=True):
            assert torch.equal(got, wanted)


def test_a_pair_of_theirs_with_another_cfg_is_refused(tmp_path: Path) -> None:
    weights, _ = their_pair(tmp_path, "v6")
    other = tmp_path / "other.cfg"
    other.write_text(their_cfg("v6", 0.33).text())
    with pytest.raises(InputError, match=r"other\.cfg does not fit .*pruned\.pt"):
        load_model(weights, other)
    weights.with_suffix(".cfg").unlink()
    with pytest.raises(InputError, match="name the cfg with --cfg"):
        load_model(weights)


def test_an_own_model_keeps_its_anchors_under_a_cfg_of_theirs(tmp_path: Path) -> None:
    blocks = same_model("yolov5s", 0.33)
    moved = tuple(replace(b, anchors=tuple((w + 1.5, h) for w, h in b.anchors)) if b.kind == "yolo" else b for b in blocks)
    save_model(tmp_path / "own.pt", Model(moved, alive(moved).state_dict(), tuple("abcd"), training={}))
    (tmp_path / "theirs.cfg").write_text(their_cfg("v6", 0.33).text())
    model = load_model(tmp_path / "own.pt", tmp_path / "theirs.cfg")
    assert [b.anchors for b in model.blocks if b.kind == "yolo"] == [b.anchors for b in moved if b.kind == "yolo"]


# ---- through the scripts -------------------------------------------------------------------------------------------------------


def test_detect_takes_files_of_darknet_and_val_a_pair_of_theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (name for name in dir(plots) if name.startswith("plot_")):
        monkeypatch.setattr(plots, name, lambda *args, **kwargs: None)
    data = write_dataset(tmp_path / "data", images=2, nc=4)
    common = ["--project", str(tmp_path / "runs"), "--device", "cpu"]
    weights = darknet_files(tmp_path)
    source = ["--source", str(data.parent / "images" / "val"), "--save-txt", "--conf", "0.01", "--img", "96"]
    detect.main(
        ["--weights", str(weights), "--cfg", str(tmp_path / "tiny.cfg"), "--dialect", "darknet", "--name", "detect", *source, *common]
    )
    assert len(list((tmp_path / "runs" / "detect" / "labels").glob("*.txt"))) == 2

    pair, network = their_pair(tmp_path, "v6")
    flags = [
        "--weights",
        str(pair),
        "--cfg",
        str(pair.with_suffix(".cfg")),
        "--data",
        str(data),
        "--img",
        "64",
        "--workers",
        "0",
        "--name",
        "val",
    ]
    val.main([*flags, *common])
    written = json.loads((tmp_path / "runs" / "val" / "metrics.json").read_text())
    assert written["params"] == sum(p.numel() for p in network.parameters()) and written["images"] == 2
