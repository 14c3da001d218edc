"""The latency predictor: what a table says, how it is made monotone and calibrated. No test is timed; tables are given numbers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from engine import latency_model
from engine.latency_model import LayerTimes, Surface, settings, width_class
from models.blocks import Block, Blocks, check
from models.network import Network, fuse
from pruning.spaces import find_spaces
from pruning.surgery import narrowed
from tests.helpers import random_blocks, small, stock, with_module
from tests.test_pruning import random_mask

CPU = torch.device("cpu")


def linear_table(blocks: Blocks, imgsz: int = 64) -> LayerTimes:
    """Every setting costs 1 + (input + 2 * output channels) / 1000 ms; unaligned output widths cost a tenth more."""
    axis = (1, 1024)
    ms = tuple(tuple(1 + (i + 2 * j) / 1000 for j in axis) for i in axis)
    surface = Surface(axis, axis, ms, {"low": 1.1, "high": 1.1})
    return LayerTimes(imgsz, {s: surface for s in settings(blocks, imgsz) if s is not None})


def cut(blocks: Blocks, mask: np.ndarray) -> Blocks:
    return narrowed(blocks, find_spaces(blocks), mask)


def test_a_surface_is_read_between_its_points() -> None:
    surface = Surface((10, 20), (16, 32), ((1.0, 3.0), (2.0, 6.0)))
    assert surface(10, 16) == 1.0 and surface(20, 32) == 6.0
    assert surface(15, 16) == pytest.approx(1.5) and surface(15, 24) == pytest.approx((1 + 3 + 2 + 6) / 4)
    assert surface(5, 8) == 1.0, "below the first point the time stays"
    assert surface(30, 16) == pytest.approx(3.0) and surface(10, 48) == pytest.approx(5.0), "beyond the last it goes on"
    assert Surface((0,), (8,), ((4.0,),))(100, 200) == 4.0


def test_output_channels_are_computed_in_steps() -> None:
    surface = Surface((8,), (8, 64), ((1.0, 8.0),), {})
    assert [surface(8, c) for c in range(33, 41)] == [surface(8, 40)] * 8
    assert surface(8, 41) > surface(8, 40)
    assert surface(1, 32) == surface(100, 32)


@pytest.mark.parametrize(
    ("width", "expected"),
    [(16, ""), (64, ""), (8, "eight"), (24, "eight"), (1, "low"), (23, "low"), (25, "high"), (31, "high"), (49, "low")],
)
def test_classes_of_widths(width: int, expected: str) -> None:
    assert width_class(width) == expected


def test_measured_noise_is_made_monotone() -> None:
    rng = np.random.default_rng(0)
    true = np.add.outer(np.arange(6.0), np.arange(7.0))
    table = latency_model._monotone(true + rng.normal(0, 1, true.shape))
    assert (np.diff(table, axis=0) >= 0).all() and (np.diff(table, axis=1) >= 0).all()
    assert np.array_equal(latency_model._monotone(true), true), "what is monotone stays as it is"


@pytest.mark.parametrize("seed", range(2))
def test_narrower_is_never_predicted_slower(seed: int) -> None:
    """Exactly so for the input's channels and among output widths of one class; here all are multiples of 16."""
    blocks = stock("n", 80)
    spaces, table, rng = find_spaces(blocks), linear_table(blocks), np.random.default_rng(seed)
    mask, last = np.ones(spaces.count, dtype=bool), table.predict(blocks)
    for space in rng.permutation(np.array(spaces.spaces, dtype=object)):
        if space.keep is None and space.width > 16:
            mask[space.classes[16 * int(rng.integers(1, space.width // 16)) :]] = False
            now = table.predict(narrowed(blocks, spaces, mask))
            assert now < last
            last = now


def test_the_prediction_is_the_sum_of_the_blocks() -> None:
    blocks = cut(stock("n", 4), random_mask(find_spaces(stock("n", 4)), 0))
    table = replace(linear_table(blocks), scale=2.0, overhead=0.5)
    by_block = table.by_block(blocks)
    assert table.predict(blocks) == sum(by_block) == table.predict(blocks)
    for index, block in enumerate(blocks):
        cin = blocks[block.inputs[0]].channels if block.inputs else 0
        out, extra = (block.channels + -block.channels % 8, 1.1 if block.channels % 8 else 1.0)
        expected = 0.5 + 2 * extra * (1 + (cin + 2 * out) / 1000)
        assert by_block[index] == pytest.approx(0.0 if block.kind in ("input", "yolo") else expected)


def test_fused_and_unfused_blocks_cost_the_same() -> None:
    blocks = stock("n", 4)
    assert linear_table(blocks).predict(fuse(Network(blocks)).blocks) == linear_table(blocks).predict(blocks)


def test_calibration_is_exact_for_the_full_network_and_near_for_the_others() -> None:
    blocks = stock("n", 4)
    table, spaces = linear_table(blocks), find_spaces(blocks)
    others = [cut(blocks, random_mask(spaces, seed, 0.6)) for seed in (0, 1)]
    truth = replace(table, scale=0.7, overhead=0.01)
    again = table.calibrated([(b, truth.predict(b)) for b in (blocks, *others)])
    assert again.predict(blocks) == pytest.approx(truth.predict(blocks), rel=1e-12)
    assert (again.scale, again.overhead) == pytest.approx((0.7, 0.01))
    noisy = table.calibrated([(blocks, 300.0), (others[0], 310.0), (others[1], 305.0)])  # narrower, yet slower: a busy machine
    assert noisy.predict(blocks) == pytest.approx(300.0) and noisy.overhead == pytest.approx(0.0, abs=1e-12)
    assert noisy.predict(others[0]) < 300.0
    assert table.calibrated([(blocks, 5.0)]).predict(blocks) == pytest.approx(5.0)


def test_a_setting_that_was_not_measured_is_named() -> None:
    blocks = small()
    other = with_module("C3", [24])
    with pytest.raises(ValueError, match="was not measured"):
        linear_table(blocks).predict(other)


def padded() -> Blocks:
    """Blocks that the stock models lack: focus, a zero-padded pool, a depthwise and a grouped convolution, a norm over a concat, a slice."""

    def conv(x: int, channels: int, size: int = 1, groups: int = 1) -> Block:
        return Block("convolutional", f"model.{x}.{channels}", (x,), channels, size, 1, size // 2, groups, "silu", True)

    blocks = [
        Block("input", channels=3), Block("focus", "", (0,), 12), conv(1, 16, 3), conv(2, 16, 3, 16), conv(3, 24, 3, 4),
        Block("zeropad", "", (4,), 24, pads=(0, 1, 0, 1)), Block("maxpool", "", (5,), 24, 2, 1), Block("route", "", (6, 3), 40),
        Block("batchnorm", "model.9", (7,), 40, activation="leaky"), Block("route", "", (8,), 20, slice=(0, 20)),
        Block("convolutional", "model.13.m.0", (9,), 21, bias=True),
        Block("yolo", "model.13", (10,), 21, anchors=((8.0, 9.0), (16.0, 12.0), (30.0, 40.0)), classes=2),
    ]  # fmt: skip
    return check(blocks)


@pytest.mark.parametrize("blocks", [small(), padded(), random_blocks(3)], ids=["small", "padded", "random"])
def test_every_setting_of_a_network_can_be_measured(blocks: Blocks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency_model, "PASSES", 1)
    table = LayerTimes.measure(blocks, 64, CPU, progress=False)
    spaces = find_spaces(blocks)
    assert set(table.surfaces) == {s for s in settings(blocks, 64) if s is not None}
    for surface in table.surfaces.values():
        ms = np.array(surface.ms)
        assert ms.shape == (len(surface.cin), len(surface.cout)) and (ms > 0).all() and np.isfinite(ms).all()
        assert (np.diff(ms, axis=0) >= 0).all() and (np.diff(ms, axis=1) >= 0).all()
    narrow = cut(blocks, random_mask(spaces, 0))
    assert 0 < table.predict(narrow) == table.predict(narrow)
    predicted, measured = table.verify(narrow, CPU)
    assert predicted == table.predict(narrow) and measured > 0
