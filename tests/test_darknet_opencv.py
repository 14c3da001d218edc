"""OpenCV's own reader on the Darknet pairs that are written here, and this project's on the files that OpenCV reads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cv2
import pytest
import torch
from torch import Tensor

from models.blocks import Blocks, heads, image_multiple, is_classifier
from models.checkpoint import Model, load_model
from models.darknet import darknet_obstacles, write_pair
from models.network import Network
from models.yaml_reader import read_yaml
from pruning.criteria import gamma_scores
from pruning.policy import PrunePolicy, select_masks
from pruning.spaces import find_spaces
from pruning.surgery import prune
from tests.helpers import ROOT, alive, random_blocks
from utils.decode import decode
from utils.errors import InputError

STOCK_YAMLS = [path for path in sorted((ROOT / "models").rglob("*.yaml")) if not is_classifier(read_yaml(path))]
LARGE = {"yolov5l", "yolov5x", "yolov5l6", "yolov5m6", "yolov5x6", "yolov3", "yolov3-spp"} | {
    f"yolov5-{x}" for x in "bifpn fpn p2 p6 p7 panet".split()
}
POLICIES = {
    "prune": PrunePolicy(0.5, "keep"),
    "shortcut_prune": PrunePolicy(0.5, "first"),
    "slim_prune": PrunePolicy(0.5, "union", 0.01),
    "slim_prune_8x": PrunePolicy(0.5, "union", 0.01, divisor=8),
}


def by_opencv(cfg: Path, images: Tensor) -> list[Tensor]:
    """OpenCV's output of each [yolo] section, in their order: (B, rows, 5 + classes), the boxes in pixels."""
    net = cv2.dnn.readNetFromDarknet(str(cfg), str(cfg.with_suffix(".weights")))
    net.setInput(images.numpy())
    height, width = images.shape[2:]
    outputs = [torch.from_numpy(o).reshape(len(images), -1, o.shape[-1]) for o in net.forward(net.getUnconnectedOutLayersNames())]
    return [torch.cat((o[..., :4] * torch.tensor([width, height, width, height]), o[..., 4:]), -1) for o in outputs]


def by_network(network: Network, images: Tensor) -> list[Tensor]:
    """The same of `network`: rows (y, x, anchor), scores as objectness x probability."""
    with torch.no_grad():
        maps = dict(zip(network.heads, zip(network(images), network.levels)))
    found = []
    for index in sorted(maps):
        raw, level = maps[index]
        rows = decode([raw], [level]).view(len(images), len(level.anchors), *raw.shape[2:], -1).permute(0, 2, 3, 1, 4).flatten(1, 3)
        found.append(torch.cat((rows[..., :5], rows[..., 5:] * rows[..., 4:5]), -1))
    return found


def assert_equal(got: list[Tensor], wanted: list[Tensor]) -> None:
    assert [g.shape for g in got] == [w.shape for w in wanted]
    for g, w in zip(got, wanted):
        assert (w[0, :, :4] - w[1, :, :4]).abs().max() > 0.5, "the images make no difference"
        assert (g[..., :4] - w[..., :4]).abs().max() <= 0.05
        assert (g[..., 4:] - w[..., 4:]).abs().max() <= 1e-3


def lively(blocks: Blocks) -> Network:
    """A calm network whose heads tell images apart by pixels."""
    network = alive(blocks, size=max(64, 2 * image_multiple(blocks)), calm=True)
    for i in heads(blocks):
        network.get_submodule(blocks[blocks[i].inputs[0]].conv_path).weight.data *= 3
    return network


def images_for(blocks: Blocks) -> Tensor:
    """Two images, wider than high, of unlike brightness."""
    step = image_multiple(blocks)
    side = max(64, 2 * step)
    images = torch.rand(2, 3, side, side + step, generator=torch.Generator().manual_seed(1))
    images[1] *= 0.3
    return images


def model_of(network: Network) -> Model:
    classes = network.blocks[network.heads[0]].classes
    return Model(network.blocks, network.state_dict(), tuple(f"class{i}" for i in range(classes)))


def check_pair(network: Network, cfg: Path) -> None:
    """The pair in OpenCV is the network, and read again it is the network too."""
    images = images_for(network.blocks)
    write_pair(model_of(network), cfg, *images.shape[2:])
    wanted = by_network(network, images)
    assert_equal(by_opencv(cfg, images), wanted)
    again = load_model(cfg.with_suffix(".weights")).network()
    assert_equal(by_network(again, images), wanted)


def _parameters() -> list:
    return [
        pytest.param(p, id=p.stem, marks=[pytest.mark.slow] if p.stem in LARGE else []) for p in STOCK_YAMLS if p.stem != "yolov5s-v3.1"
    ]


@pytest.mark.parametrize("path", _parameters())
def test_opencv_gives_the_boxes_of_every_stock_model(path: Path, tmp_path: Path) -> None:
    check_pair(lively(read_yaml(path)), tmp_path / "pair.cfg")


def test_a_model_without_a_form_is_refused_by_its_blocks_and_leaves_no_file(tmp_path: Path) -> None:
    blocks = read_yaml(ROOT / "models" / "hub" / "yolov5s-v3.1.yaml")
    network = Network(blocks)
    with pytest.raises(
        InputError,
        match=r"pair\.cfg: no exact Darknet cfg can be written: block 2 \(model\.0\.conv\): Darknet has no Hardswish; .*; and 47 more blocks",
    ):
        write_pair(model_of(network), tmp_path / "pair.cfg", 64, 64)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("strategy", POLICIES)
@pytest.mark.parametrize("name", ["yolov5n", "hub/yolov5n6", "hub/yolov5s-ghost", "hub/yolov5s-v3.0"])
def test_opencv_gives_the_boxes_of_pruned_models(name: str, strategy: str, tmp_path: Path) -> None:
    network = lively(read_yaml(ROOT / "models" / f"{name}.yaml"))
    blocks, state = network.blocks, network.state_dict()
    spaces = find_spaces(blocks)
    selection = select_masks(spaces, gamma_scores(blocks, state), POLICIES[strategy])
    cut, tensors = prune(blocks, state, spaces, selection.mask)
    assert sum(b.channels for b in cut) < 0.8 * sum(b.channels for b in blocks)
    narrow = Network(cut)
    narrow.load_state_dict(tensors)
    check_pair(narrow.eval(), tmp_path / "pair.cfg")


@pytest.mark.parametrize("seed", range(12))
def test_opencv_gives_the_boxes_of_random_models(seed: int, tmp_path: Path) -> None:
    blocks = tuple(replace(b, activation="silu") if b.activation == "hardswish" else b for b in random_blocks(seed))
    uneven = darknet_obstacles(blocks)
    if uneven:
        with pytest.raises(InputError, match="are not one of several equal parts"):
            write_pair(model_of(Network(blocks)), tmp_path / "pair.cfg", 64, 64)
    else:
        check_pair(lively(blocks), tmp_path / "pair.cfg")
