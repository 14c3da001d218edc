"""Magnitude pruning: ramps against their formulas, and masks: exact, nested, in the shape asked for, whatever ties and memory layouts there are."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from pruning.magnitude import RAMPS, MaskType, magnitude_masks, misfits, ramp, sparsity_at

KINDS = ("unstructured", "block4", "2,1", "2,4", "2:4", "1:2", "1:4")
EPOCHS = (0, 1, 5, 10, 15, 20, 25, 29, 30)
ANCHORS = {  # of 0.05 -> 0.80 over 30 epochs
    "linear": (0.05, 0.075, 0.175, 0.30, 0.425, 0.55, 0.675, 0.775, 0.80),
    "cubic": (0.05, 0.1225, 0.366, 0.5778, 0.7063, 0.7722, 0.7965, 0.80, 0.80),
    "inverse_cubic": (0.05, 0.0584, 0.0942, 0.1448, 0.2047, 0.28, 0.3873, 0.5586, 0.80),
}


def weights_of(seed: int = 0, ties: bool = True) -> dict[str, Tensor]:
    """Random weights of convolutions, many of them equal with `ties`, one of them laid out channels last."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (8, 4, 3, 3), "b": (16, 8, 1, 1), "c": (4, 8, 5, 5), "d": (8, 12, 3, 3)}
    drawn = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    if ties:
        drawn = {name: (w * 4).round() / 4 for name, w in drawn.items()}
    return drawn | {"d": drawn["d"].contiguous(memory_format=torch.channels_last)}


def share(masks: dict[str, Tensor]) -> float:
    return sum(int(m.sum()) for m in masks.values()) / sum(m.numel() for m in masks.values())


# ---- ramps ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", RAMPS)
def test_the_ramps_have_their_published_values(kind: str) -> None:
    got = [sparsity_at(epoch, 0, 30, 0.05, 0.80, kind) for epoch in EPOCHS]
    assert got == pytest.approx(ANCHORS[kind], abs=6e-5)


@pytest.mark.parametrize("kind", RAMPS)
def test_a_ramp_rises_from_0_to_1_and_is_clamped_outside(kind: str) -> None:
    values = [ramp(i / 50, kind) for i in range(51)]
    assert values[0] == 0 and values[-1] == 1 and all(a < b for a, b in pairwise(values))
    assert ramp(-3.0, kind) == 0 and ramp(7.0, kind) == 1
    formula = {"linear": 0.3, "cubic": 1 - 0.7**3, "inverse_cubic": 1 - 0.7 ** (1 / 3)}[kind]
    assert ramp(0.3, kind) == pytest.approx(formula)


def test_the_ends_of_a_ramp_are_exact() -> None:
    assert sparsity_at(3, 4, 10, 0.1, 0.7) == 0.1 == sparsity_at(4, 4, 10, 0.1, 0.7)
    assert sparsity_at(10, 4, 10, 0.1, 0.7) == 0.7 == sparsity_at(11, 4, 10, 0.1, 0.7)
    with pytest.raises(ValueError, match="'square' is none of linear, cubic, inverse_cubic"):
        ramp(0.5, "square")


# ---- mask types ----------------------------------------------------------------------------------------------------------------


def test_mask_types_are_read() -> None:
    assert MaskType.parse("unstructured") == MaskType() == MaskType.parse("1,1")
    assert MaskType.parse("block4") == MaskType(1, 4) == MaskType.parse("[1, 4]") == MaskType.parse(" 1,4 ")
    assert (
        MaskType.parse("2:4") == MaskType(keep=2, of=4) and MaskType.parse("2:4").densest == 0.5 and MaskType.parse("1:4").densest == 0.75
    )
    assert [str(MaskType.parse(text)) for text in ("unstructured", "block4", "2, 4", "1:2")] == ["unstructured", "1,4", "2,4", "1:2"]


@pytest.mark.parametrize("text", ["channel", "filter", "4:2", "0:4", "4:4", "0,4", "-1,1", "4", "", "1,2,3", "2:4:8"])
def test_other_mask_types_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="mask_type .* is none that masks can have"):
        MaskType.parse(text)


def test_what_does_not_fit_is_named_and_left_out() -> None:
    weights = {
        "stem": torch.randn(16, 3, 6, 6),
        "depthwise": torch.randn(8, 1, 3, 3),
        "bias": torch.randn(8),
        "conv": torch.randn(8, 8, 3, 3),
    }
    for kind in ("block4", "2:4"):
        assert misfits(weights, MaskType.parse(kind)) == {
            "stem": "3 input channels, no multiple of 4", "depthwise": "1 input channel, no multiple of 4", "bias": "it has no input channels"
        }  # fmt: skip
        assert list(magnitude_masks(weights, 0.5, MaskType.parse(kind))) == ["conv"]
    assert misfits(weights, MaskType.parse("6,1"))["conv"] == "8 output channels, no multiple of 6"
    assert misfits(weights, MaskType()) == {} and list(magnitude_masks(weights, 0.5)) == list(weights)


# ---- masks ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("sparsity", [0.0, 0.013, 0.25, 0.5, 0.8, 0.999, 1.0])
def test_counts_are_exact_layer_by_layer_and_over_all(sparsity: float, ties: bool) -> None:
    weights = weights_of(1, ties)
    for name, mask in magnitude_masks(weights, sparsity).items():
        assert int(mask.sum()) == round(mask.numel() * sparsity)
        values = weights[name].abs()
        assert mask.all() or not mask.any() or values[mask].max() <= values[~mask].min(), "the smallest"
    pooled = magnitude_masks(weights, sparsity, global_ranking=True)
    total = sum(w.numel() for w in weights.values())
    assert sum(int(m.sum()) for m in pooled.values()) == round(total * sparsity)
    masked, kept = (torch.cat([weights[n].abs()[m if inside else ~m] for n, m in pooled.items()]) for inside in (True, False))
    assert not len(masked) or not len(kept) or masked.max() <= kept.min()


def test_each_tensor_may_have_its_own_sparsity() -> None:
    weights = weights_of()
    masks = magnitude_masks(weights, {"a": 0.25, "b": 0.5, "c": 0.75, "d": 0.0})
    assert {name: int(m.sum()) / m.numel() for name, m in masks.items()} == {"a": 0.25, "b": 0.5, "c": 0.75, "d": 0.0}
    with pytest.raises(ValueError, match="one ranking over all tensors has one sparsity"):
        magnitude_masks(weights, {"a": 0.25}, global_ranking=True)


def test_of_equal_weights_the_first_go_first_in_any_memory_layout() -> None:
    weight = torch.ones(4, 4, 3, 3)
    expected = (torch.arange(144) < 36).view(4, 4, 3, 3)
    for layout in (torch.contiguous_format, torch.channels_last):
        (mask,) = magnitude_masks({"w": weight.contiguous(memory_format=layout)}, 0.25).values()
        assert torch.equal(mask, expected) and mask.is_contiguous(memory_format=layout)
    (mask,) = magnitude_masks({"w": torch.randn(4, 3, 3, 4).permute(0, 3, 1, 2)[:, ::2]}, 0.5).values()
    assert mask.shape == (4, 2, 3, 3) and int(mask.sum()) == 36


@pytest.mark.parametrize("kind", ["block4", "2,1", "2,4"])
@pytest.mark.parametrize("pooled", [False, True])
def test_blocks_are_tiles_of_output_by_input_channels_at_one_tap(kind: str, pooled: bool) -> None:
    mask_type = MaskType.parse(kind)
    weights = weights_of(2, ties=False)
    masks = magnitude_masks(weights, 0.6, mask_type, pooled)
    count = blocks = 0
    means: dict[bool, list[float]] = {True: [], False: []}
    for name, mask in masks.items():
        outputs, inputs, *kernel = mask.shape
        rows, columns = mask_type.rows, mask_type.columns
        if not pooled:
            count, blocks, means = 0, 0, {True: [], False: []}
        for o in range(0, outputs, rows):
            for i in range(0, inputs, columns):
                for y in range(kernel[0]):
                    for x in range(kernel[1]):
                        tile = mask[o : o + rows, i : i + columns, y, x]
                        assert tile.all() or not tile.any()
                        means[bool(tile.all())].append(float(weights[name][o : o + rows, i : i + columns, y, x].abs().mean()))
                        count, blocks = count + int(tile.all()), blocks + 1
        assert pooled or (count == round(blocks * 0.6) and max(means[True]) <= min(means[False]) + 1e-6)
    assert count == round(blocks * 0.6) and max(means[True]) <= min(means[False]) + 1e-6


@pytest.mark.parametrize("kind", ["2:4", "1:4", "1:2", "3:4"])
@pytest.mark.parametrize("pooled", [False, True])
def test_n_of_m_holds_at_every_tap(kind: str, pooled: bool) -> None:
    mask_type = MaskType.parse(kind)
    weights = weights_of(3)
    for name, mask in magnitude_masks(weights, mask_type.densest, mask_type, pooled).items():
        for group in mask.split(mask_type.of, 1):
            assert (group.sum(1) == mask_type.of - mask_type.keep).all()
        for values, group in zip(weights[name].abs().split(mask_type.of, 1), mask.split(mask_type.of, 1)):
            largest_masked = values.masked_fill(~group, -1).amax(1)
            assert (largest_masked <= values.masked_fill(group, torch.inf).amin(1)).all(), "the smallest of each group"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_masks_only_grow_over_a_ramp_while_the_weights_move(kind: str, pooled: bool, seed: int) -> None:
    mask_type, weights = MaskType.parse(kind), weights_of(seed)
    generator = torch.Generator().manual_seed(seed)
    masks: dict[str, Tensor] = {}
    final = min(0.9, mask_type.densest)
    for epoch in range(9):
        sparsity = sparsity_at(epoch, 0, 8, 0.1, final)
        before, masks = masks, magnitude_masks(weights, sparsity, mask_type, pooled, masks)
        assert all((masks[name] | old).equal(masks[name]) for name, old in before.items())
        assert share(masks) == pytest.approx(sparsity, abs=0.005)
        for name, weight in weights.items():  # a step of training: the masked stay zero, the others go anywhere
            weight.add_(torch.randn(weight.shape, generator=generator)).masked_fill_(masks[name], 0.0)
            assert not mask_type.of or (masks[name].unflatten(1, (-1, mask_type.of)).sum(2) <= mask_type.of - mask_type.keep).all()
    if mask_type.of:
        assert share(masks) == final


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_masked_stays_even_where_that_is_more(kind: str) -> None:
    mask_type, weights = MaskType.parse(kind), weights_of(4)
    before = {name: torch.rand(w.shape) < 0.7 for name, w in weights.items()}
    masks = magnitude_masks(weights, mask_type.densest if mask_type.of else 0.3, mask_type, previous=before)
    for name, mask in masks.items():
        assert (mask | before[name]).equal(mask)
        if mask_type.of:
            assert (mask.unflatten(1, (-1, mask_type.of)).sum(2) >= mask_type.of - mask_type.keep).all()
        if mask_type.unstructured:
            assert mask.equal(before[name])


def test_weights_are_left_as_they_were_and_may_be_parameters() -> None:
    weight = torch.nn.Parameter(torch.randn(8, 8, 3, 3))
    copy = weight.detach().clone()
    (mask,) = magnitude_masks({"w": weight}, 0.5).values()
    assert torch.equal(weight, copy) and mask.dtype == torch.bool and not mask.requires_grad
