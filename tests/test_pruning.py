"""The oracle of the design: masked equals pruned, for every policy, stock and random networks, folded and not; and what may break it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from models.blocks import Block, Blocks, check
from models.network import Network
from pruning import surgery
from pruning.criteria import gamma_scores
from pruning.masked import largest_difference, masked_network, zero_gamma
from pruning.policy import PrunePolicy, Selection, keep_reason, select_masks
from pruning.spaces import KeepReason, Spaces, find_spaces
from pruning.surgery import fold_constants, prune
from tests.helpers import alive, random_blocks, small, stock, with_module
from utils.errors import InputError

POLICIES = {
    "prune": PrunePolicy(0.5, "keep"),
    "shortcut_prune": PrunePolicy(0.5, "first"),
    "slim_prune": PrunePolicy(0.5, "union", 0.01),
    "slim_prune_8x": PrunePolicy(0.5, "union", 0.01, 8),
}


def random_mask(spaces: Spaces, seed: int, share: float = 0.4) -> np.ndarray:
    """A random mask that respects what must stay and leaves every space a channel."""
    rng = np.random.default_rng(seed)
    mask = np.ones(spaces.count, dtype=bool)
    for space in spaces.spaces:
        if space.keep is None:
            drop = rng.random(space.width) < share
            drop[rng.integers(space.width)] = False
            mask[space.classes[drop]] = False
    return mask


def assert_oracle(blocks: Blocks, network: Network, mask: np.ndarray, spaces: Spaces, size: tuple[int, int] = (64, 96)) -> None:
    """Masked = pruned with and without folding, after showing that the mask moves the logits at all."""
    state = network.state_dict()
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1))
    for tensors in (fold_constants(blocks, state, spaces, mask), state):
        masked = masked_network(blocks, tensors, spaces, mask)
        small_blocks, small_state = prune(blocks, tensors, spaces, mask)
        pruned = Network(small_blocks).eval()
        pruned.load_state_dict(small_state)
        moved, _ = largest_difference(network, masked, images)
        assert moved > 0.1, f"the mask moved the logits by {moved} only: this network proves nothing"
        difference, bound = largest_difference(masked, pruned, images)
        assert difference <= bound


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("size", ["n", "s"])
def test_oracle_of_every_script_on_stock_models(size: str, policy: str) -> None:
    blocks = stock(size, 4)
    network, spaces = alive(blocks), find_spaces(blocks)
    selection = select_masks(spaces, gamma_scores(blocks, network.state_dict()), POLICIES[policy])
    assert_oracle(blocks, network, selection.mask, spaces)


@pytest.mark.parametrize("seed", range(3))
def test_oracle_on_random_masks_of_yolov5n(seed: int) -> None:
    blocks = stock("n", 4)
    spaces = find_spaces(blocks)
    assert_oracle(blocks, alive(blocks, seed), random_mask(spaces, seed), spaces)


@pytest.mark.parametrize("seed", range(25))
def test_oracle_on_random_networks(seed: int) -> None:
    blocks = random_blocks(seed)
    spaces = find_spaces(blocks)
    assert_oracle(blocks, alive(blocks, seed), random_mask(spaces, seed), spaces)


@pytest.mark.parametrize("module", ["C3", "C2f", "BottleneckCSP", "SPP", "SPPF", "GhostConv", "GhostBottleneck", "C3Ghost", "Bottleneck"])
@pytest.mark.parametrize("policy", POLICIES)
def test_oracle_of_every_module(module: str, policy: str) -> None:
    blocks = with_module(module, [24])
    network, spaces = alive(blocks), find_spaces(blocks)
    selection = select_masks(spaces, gamma_scores(blocks, network.state_dict()), POLICIES[policy])
    assert_oracle(blocks, network, random_mask(spaces, 3), spaces)
    if not selection.mask.all():
        state = fold_constants(blocks, network.state_dict(), spaces, selection.mask)
        pruned = prune(blocks, state, spaces, selection.mask)[0]
        assert sum(b.channels for b in pruned) < sum(b.channels for b in blocks)


def pointwise() -> Blocks:
    """A detector whose constants pass through every kind of block and whose convolutions never see a padded border."""

    def conv(name: int, x: int, channels: int, size: int = 1) -> Block:
        return Block("convolutional", f"model.{name}", (x,), channels, size, size, 0, 1, "silu", True)

    blocks = [
        Block("input", channels=3), conv(1, 0, 16, 4), conv(2, 1, 16), Block("shortcut", "", (2, 1), 16), conv(4, 3, 12),
        Block("maxpool", "", (4,), 12, 5, 1, 2), Block("route", "", (4, 5), 24), conv(7, 6, 16), conv(8, 7, 16, 2), conv(9, 8, 12),
        Block("upsample", "", (9,), 12, stride=2), Block("route", "", (10, 7), 28), conv(12, 11, 16),
        Block("convolutional", "model.13.m.0", (12,), 21, bias=True),
        Block("yolo", "model.13", (13,), 21, anchors=((8.0, 9.0), (16.0, 12.0), (30.0, 40.0)), classes=2),
    ]  # fmt: skip
    return check(blocks)


def gap_to_zeroed(blocks: Blocks) -> float:
    """max |difference| / bound between the network with gamma at zero in the removed channels and the folded, pruned one."""
    network, spaces = alive(blocks), find_spaces(blocks)
    mask, state = random_mask(spaces, 0), network.state_dict()
    zeroed = Network(blocks).eval()
    zeroed.load_state_dict(zero_gamma(blocks, state, spaces, mask))
    small_blocks, small_state = prune(blocks, fold_constants(blocks, state, spaces, mask), spaces, mask)
    pruned = Network(small_blocks).eval()
    pruned.load_state_dict(small_state)
    difference, bound = largest_difference(zeroed, pruned, torch.rand(2, 3, 64, 64))
    return difference / bound


def test_folding_is_exact_without_padded_borders() -> None:
    """Gamma at zero leaves act(beta) behind; folded into its consumers nothing at all is lost."""
    assert gap_to_zeroed(pointwise()) <= 1


@pytest.mark.parametrize("kind", ["route", "shortcut", "upsample", "maxpool"])
def test_folding_needs_its_rule_for_every_kind(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    carry = surgery._CARRY[kind]
    monkeypatch.setitem(surgery._CARRY, kind, lambda block, inputs: torch.zeros_like(carry(block, inputs)))
    assert gap_to_zeroed(pointwise()) > 10


_original_norm, _original_conv, _original_fold = surgery._slice_norm, surgery._slice_conv, surgery._fold_into
MUTATIONS = {
    "norm rows": ("_slice_norm", lambda b, s, keep: _original_norm(b, s, np.roll(keep, 1))),
    "conv inputs": ("_slice_conv", lambda b, s, i, o: _original_conv(b, s, np.roll(i, 1) if b.groups == 1 else i, o)),
    "conv outputs": ("_slice_conv", lambda b, s, i, o: _original_conv(b, s, i, np.roll(o, 1))),
}


@pytest.mark.parametrize("rule", MUTATIONS)
def test_a_mutation_of_each_slicing_rule_fails_the_oracle(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = small()
    spaces = find_spaces(blocks)
    monkeypatch.setattr(surgery, *MUTATIONS[rule])
    with pytest.raises(AssertionError):
        assert_oracle(blocks, alive(blocks), random_mask(spaces, 0), spaces)


@pytest.mark.parametrize("kind", ["shortcut", "route"])
def test_spaces_without_a_rule_fail_the_oracle(kind: str) -> None:
    """Cut the sides of a shortcut apart, or the order of a concat wrong, and the oracle must notice."""
    blocks = small()
    spaces = find_spaces(blocks)
    mask = random_mask(spaces, 0)
    channels = list(spaces.channels)
    index = next(i for i, b in enumerate(blocks) if b.kind == kind and len(b.inputs) > 1)
    if kind == "route":
        channels[index] = channels[index][::-1]
        for reader, block in enumerate(blocks):
            if block.kind != "convolutional" and index in block.inputs:
                channels[reader] = channels[index]
    else:
        first = blocks[index].inputs[0]
        channels[first] = channels[first][::-1]
    wrong = Spaces(spaces.spaces, tuple(channels), spaces.count)
    with pytest.raises((AssertionError, RuntimeError, InputError)):
        assert_oracle(blocks, alive(blocks), mask, wrong)


# ---- spaces --------------------------------------------------------------------------------------------------------------------


def test_golden_space_table_of_yolov5n() -> None:
    blocks = stock("n")
    table = [(" + ".join(blocks[i].name for i in s.producers), s.width, s.tied) for s in find_spaces(blocks).spaces if s.keep is None]
    assert len(table) == 50
    assert sum(width for _, width, _ in table) == 4352
    assert [row for row in table if row[2]] == [
        ("model.2.cv1 + model.2.m.0.cv2", 16, True),
        ("model.4.cv1 + model.4.m.0.cv2 + model.4.m.1.cv2", 32, True),
        ("model.6.cv1 + model.6.m.0.cv2 + model.6.m.1.cv2 + model.6.m.2.cv2", 64, True),
        ("model.8.cv1 + model.8.m.0.cv2", 128, True),
    ]
    reasons = {s.keep for s in find_spaces(blocks).spaces}
    assert reasons == {None, KeepReason.INPUT, KeepReason.FEEDS_YOLO}


@pytest.mark.parametrize(("size", "members", "channels"), [("n", 57, 4752), ("s", 57, 9504)])
def test_member_counts_are_the_predecessors(size: str, members: int, channels: int) -> None:
    """57 batch norms with 9,504 channels in yolov5s; unlike the predecessors, none of them has to stay whole."""
    spaces = find_spaces(stock(size)).spaces
    assert sum(len(s.members) for s in spaces if s.keep is None) == members
    assert sum(len(s.members) * s.width for s in spaces if s.keep is None) == channels


def test_a_batch_norm_over_a_concat_is_a_member_of_both_halves() -> None:
    blocks = with_module("BottleneckCSP", [24])
    norm = next(i for i, b in enumerate(blocks) if b.kind == "batchnorm")
    holders = [s for s in find_spaces(blocks).spaces if norm in dict(s.members)]
    assert [[blocks[i].name for i in s.producers] for s in holders] == [["model.2.cv3"], ["model.2.cv2"]]


def test_slices_cut_a_space_at_the_common_refinement() -> None:
    blocks = with_module("C2f", [24, True])
    spaces = find_spaces(blocks).spaces
    first = next(i for i, b in enumerate(blocks) if b.name == "model.2.cv1")
    assert [(s.width, len(s.producers)) for s in spaces if first in s.producers] == [(12, 1), (12, 4)], (
        "the second half is tied to three bottlenecks"
    )


def test_depthwise_output_is_tied_to_its_input() -> None:
    blocks = with_module("GhostConv", [24])
    names = [[blocks[i].name for i in s.producers] for s in find_spaces(blocks).spaces]
    assert ["model.2.0.cv1", "model.2.0.cv2"] in names


def test_excluded_by_name_prefix_and_glob() -> None:
    blocks = stock("n")
    spaces = find_spaces(blocks).excluding(blocks, ("model.9", "model.*.cv3"))
    kept = {blocks[i].name for s in spaces.spaces if s.keep == KeepReason.EXCLUDED for i in s.producers}
    assert {"model.9.cv1", "model.9.cv2", "model.23.cv3"} <= kept and "model.23.cv2" not in kept


# ---- policies ------------------------------------------------------------------------------------------------------------------


def chosen(policy: PrunePolicy, seed: int = 0) -> tuple[Blocks, Spaces, dict, Selection]:
    blocks = stock("n")
    rng = np.random.default_rng(seed)
    scores = {i: rng.random(b.channels) for i, b in enumerate(blocks) if b.has_gamma}
    spaces = find_spaces(blocks)
    return blocks, spaces, scores, select_masks(spaces, scores, policy)


def test_keep_leaves_shortcut_groups_whole_and_marks_exactly_the_planned_count() -> None:
    blocks, spaces, scores, selection = chosen(POLICIES["prune"])
    for space in spaces.spaces:
        if space.tied:
            assert selection.mask[space.classes].all()
            assert keep_reason(space, scores, POLICIES["prune"]) == KeepReason.SHORTCUT
    assert selection.pool == sum(s.width for s in spaces.spaces if s.keep is None and not s.tied)
    assert (~selection.mask).sum() == selection.planned == int(selection.pool * 0.5)


def test_ties_do_not_overshoot() -> None:
    blocks = stock("n")
    spaces = find_spaces(blocks)
    scores = {i: np.ones(b.channels) for i, b in enumerate(blocks) if b.has_gamma}
    selection = select_masks(spaces, scores, PrunePolicy(0.25, "keep"))
    floors = sum(1 for s in spaces.spaces if s.keep is None and not s.tied)
    assert int(selection.pool * 0.25) - floors <= (~selection.mask).sum() <= int(selection.pool * 0.25)


def test_first_member_rules_the_group() -> None:
    blocks, spaces, scores, selection = chosen(POLICIES["shortcut_prune"])
    order = np.argsort(np.concatenate([scores[s.members[0][0]] for s in spaces.spaces if s.keep is None]), kind="stable")
    assert selection.planned == int(len(order) * 0.5)
    for space in spaces.spaces:
        if space.tied:
            kept = scores[space.members[0][0]][selection.mask[space.classes]]
            dropped = scores[space.members[0][0]][~selection.mask[space.classes]]
            assert kept.min() > dropped.max()


def test_union_keeps_what_any_member_keeps() -> None:
    blocks, spaces, scores, selection = chosen(POLICIES["slim_prune"])
    pool = np.sort(np.concatenate([scores[i] for s in spaces.spaces if s.keep is None for i, _ in s.members]))
    threshold = pool[selection.planned]
    for space in spaces.spaces:
        if space.tied:
            union = np.any([scores[i][p[:, 0]] >= threshold for i, p in space.members], axis=0)
            assert np.array_equal(selection.mask[space.classes], union)


@pytest.mark.parametrize("percent", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("divisor", [8, 16])
def test_every_convolution_keeps_a_multiple_or_its_whole_width(percent: float, divisor: int) -> None:
    blocks, spaces, scores, selection = chosen(PrunePolicy(percent, "union", 0.01, divisor))
    for index, block in enumerate(blocks):
        if block.kind == "convolutional" and block.batch_norm:
            kept = int(selection.of(spaces, index).sum())
            assert kept % divisor == 0 or kept == block.channels


def test_rounding_extends_the_union_by_its_best_dropped_channels() -> None:
    _, spaces, scores, plain = chosen(POLICIES["slim_prune"])
    _, _, _, rounded = chosen(POLICIES["slim_prune_8x"])
    assert (rounded.mask | ~plain.mask).all(), "what the union keeps stays"
    for space in [s for s in spaces.spaces if s.keep is None]:
        best = np.max([scores[i][p[:, 0]] for i, p in space.members], axis=0)
        added = rounded.mask[space.classes] & ~plain.mask[space.classes]
        dropped = ~rounded.mask[space.classes]
        if added.any() and dropped.any():
            assert best[added].min() >= best[dropped].max()


def test_layer_keep_is_a_floor() -> None:
    _, spaces, _, selection = chosen(PrunePolicy(0.95, "union", 0.25))
    for space in spaces.spaces:
        assert selection.mask[space.classes].sum() >= max(1, int(space.width * 0.25))


def test_safe_percent_is_the_last_that_empties_no_layer() -> None:
    blocks, spaces, scores, selection = chosen(POLICIES["prune"])
    pool = np.concatenate([scores[s.members[0][0]] for s in spaces.spaces if s.keep is None and not s.tied])
    weakest = min(scores[s.members[0][0]].max() for s in spaces.spaces if s.keep is None and not s.tied)
    assert selection.safe_percent == pytest.approx((pool < weakest).sum() / len(pool))


@pytest.mark.parametrize("percent", [1.0, 1.5, -0.1])
def test_a_percent_out_of_range_is_refused(percent: float) -> None:
    with pytest.raises(InputError, match="below 1"):
        PrunePolicy(percent)


def test_a_pruned_network_prunes_again() -> None:
    blocks = stock("n", 4)
    network = alive(blocks)
    for _ in range(2):
        spaces = find_spaces(blocks)
        selection = select_masks(spaces, gamma_scores(blocks, network.state_dict()), PrunePolicy(0.3, "union", 0.01, 8))
        blocks, state = prune(blocks, network.state_dict(), spaces, selection.mask)
        network = Network(blocks).eval()
        network.load_state_dict(state)
    spaces = find_spaces(blocks)
    assert_oracle(blocks, alive(blocks, 1), random_mask(spaces, 1), spaces)


def test_emptying_a_convolution_is_refused() -> None:
    blocks = small()
    spaces = find_spaces(blocks)
    mask = np.ones(spaces.count, dtype=bool)
    mask[spaces.channels[1]] = False
    with pytest.raises(ValueError, match="every channel"):
        prune(blocks, Network(blocks).state_dict(), spaces, mask)


def test_batch_norm_constants_travel_with_the_blocks() -> None:
    blocks = stock("n", 4)
    spaces = find_spaces(blocks)
    pruned = Network(prune(blocks, Network(blocks).state_dict(), spaces, random_mask(spaces, 0))[0])
    assert {(m.eps, m.momentum) for m in pruned.modules() if isinstance(m, nn.BatchNorm2d)} == {(1e-3, 0.03)}
