"""Which models have an exact plain Darknet form, and the rewrites on which that answer counts, each against torch or OpenCV."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.blocks import Block, check
from models.darknet import darknet_obstacles
from models.network import _focus
from models.yaml_reader import read_yaml
from tests.helpers import ROOT, small, with_module

STOCK_YAMLS = sorted((ROOT / "models").rglob("*.yaml"))


@pytest.mark.parametrize("path", STOCK_YAMLS, ids=lambda p: p.stem)
def test_all_stock_models_but_the_hardswish_ones_have_a_darknet_form(path) -> None:
    blocks = read_yaml(path)
    hardswish = [f"block {i} ({b.name}): Darknet has no Hardswish" for i, b in enumerate(blocks) if b.activation == "hardswish"]
    assert darknet_obstacles(blocks) == hardswish
    assert len(hardswish) == (51 if path.stem == "yolov5s-v3.1" else 0)


def test_uneven_slices_are_named() -> None:
    blocks = with_module("C2f", [24, True])
    assert darknet_obstacles(blocks) == []
    cut = next(i for i, b in enumerate(blocks) if b.slice == (0, 12))
    uneven = [replace(b, slice=(0, 7), channels=7) if i == cut else b for i, b in enumerate(blocks)]
    assert darknet_obstacles(tuple(uneven)) == [f"block {cut} (route): channels 0:7 of 24 are not one of several equal parts"]


@pytest.mark.parametrize(
    ("pads", "said"), [((0, 1, 0, 1), []), ((2, 0, 1, 1), []), ((1, 1, 0, 0), ["zeros widen the map by 2 and heighten it by 0"])]
)
def test_zero_padding_has_a_form_where_it_is_alike_on_both_axes(pads: tuple, said: list) -> None:
    found = darknet_obstacles(with_module("nn.ZeroPad2d", [list(pads)]))
    assert len(found) == 3 * len(said) and all(reason in line for reason in said for line in found)


def test_what_reads_the_image_a_focus_or_the_logits_is_checked() -> None:
    conv = {"activation": "silu", "batch_norm": True}
    head = [Block("convolutional", "h.m.0", (4,), 21, bias=True), Block("yolo", "h", (5,), 21, anchors=((8.0, 9.0),) * 3, classes=2)]
    twice = [
        Block("input", channels=3), Block("focus", "", (0,), 12), Block("convolutional", "a", (1,), 8, **conv),
        Block("convolutional", "b", (1,), 8, **conv), Block("route", "", (2, 3), 16), *head,
    ]  # fmt: skip
    assert darknet_obstacles(check(twice)) == ["block 0 (input): 2 blocks read the image; only the first section of a cfg can"]
    pooled = [*twice[:3], Block("maxpool", "", (1,), 12, 3, 1, 1), Block("route", "", (2, 3), 20), *head]
    assert any("a focus read by anything but ungrouped convolutions" in line for line in darknet_obstacles(check(pooled)))
    blocks = list(small())
    logits = next(b.inputs[0] for b in blocks if b.kind == "yolo")
    blocks[logits] = replace(blocks[logits], activation="leaky")
    assert "its logits do not come from a linear convolution" in darknet_obstacles(tuple(blocks))[0]


# ---- the rewrites --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pads", [(0, 1, 0, 1), (2, 0, 1, 1), (1, 1, 1, 1), (0, 3, 2, 1)])
def test_zeros_are_a_depthwise_convolution(pads: tuple[int, int, int, int]) -> None:
    left, right, above, _ = pads
    x, p = torch.randn(1, 3, 5, 7), max(pads)
    weight = torch.zeros(3, 1, 2 * p + 1 - left - right, 2 * p + 1 - left - right)
    weight[:, :, p - above, p - left] = 1
    assert torch.equal(F.conv2d(x, weight, padding=p, groups=3), F.pad(x, pads))


@pytest.mark.parametrize(("size", "padding"), [(1, 0), (3, 1)])
def test_a_focus_goes_into_a_convolution_of_twice_the_size(size: int, padding: int) -> None:
    x, weight = torch.randn(2, 3, 16, 12), torch.randn(8, 12, size, size)
    wide = torch.zeros(8, 3, 2 * size, 2 * size)
    for part, (row, column) in enumerate(((0, 0), (1, 0), (0, 1), (1, 1))):
        wide[:, :, row::2, column::2] = weight[:, 3 * part : 3 * part + 3]
    torch.testing.assert_close(F.conv2d(x, wide, stride=2, padding=2 * padding), F.conv2d(_focus(x), weight, padding=padding))


def test_a_batch_norm_is_a_depthwise_convolution_with_one() -> None:
    bn, x = nn.BatchNorm2d(6).eval(), torch.randn(2, 6, 4, 4)
    nn.init.normal_(bn.weight)
    assert torch.equal(bn(F.conv2d(x, torch.ones(6, 1, 1, 1), groups=6)), bn(x))


def test_opencv_reads_the_zero_padded_pool_of_the_tiny_model() -> None:
    """As a depthwise 2x2 convolution and a pool without padding; a pool with Darknet's own padding gives something else."""

    def run(sections: str, weights: np.ndarray) -> np.ndarray:
        cfg = f"[net]\nwidth=6\nheight=6\nchannels=3\n\n{sections}"
        header = np.array([0, 2, 0, 0, 0], dtype=np.int32).tobytes()
        net = cv2.dnn.readNetFromDarknet(bytearray(cfg.encode()), bytearray(header + weights.astype(np.float32).tobytes()))
        net.setInput(x.numpy())
        return net.forward()

    x = torch.randn(1, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    one = np.zeros((3, 1, 2, 2))
    one[:, :, 1, 1] = 1
    pad = "[convolutional]\nfilters=3\nsize=2\nstride=1\npad=0\npadding=1\ngroups=3\nactivation=linear\n\n"
    got = run(pad + "[maxpool]\nsize=2\nstride=1\npadding=0\n", np.concatenate([np.zeros(3), one.ravel()]))
    wanted = F.max_pool2d(F.pad(x, (0, 1, 0, 1)), 2, 1).numpy()
    assert np.array_equal(got, wanted)
    same = "[convolutional]\nfilters=3\nsize=1\nstride=1\npad=0\ngroups=3\nactivation=linear\n\n"
    other = run(same + "[maxpool]\nsize=2\nstride=1\n", np.concatenate([np.zeros(3), np.ones(3)]))
    assert other.shape == wanted.shape and not np.array_equal(other, wanted)
