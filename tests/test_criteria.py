"""Criteria against their definitions, how members of a space decide together, and the oracle under each of them."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch

from models.blocks import Block, Blocks, check
from models.network import Network
from pruning.choices import CRITERIA, EQUALIZE, NORMALIZE
from pruning.criteria import gamma_scores, normalized, scores_of, taylor_scores
from pruning.policy import PrunePolicy, keep_reason, select_masks
from pruning.spaces import KeepReason, Spaces, find_spaces
from tests.helpers import alive, small, stock, with_module
from tests.test_pruning import assert_oracle
from utils.errors import InputError
from utils.loss import DetectionLoss

FREE = [c for c in CRITERIA if c != "taylor"]  # they go without data


def taylor(network: Network, batches: int = 2, size: int = 64) -> dict[int, np.ndarray]:
    generator = torch.Generator().manual_seed(0)
    targets = torch.tensor([[0, 1, 0.5, 0.5, 0.4, 0.3], [1, 0, 0.3, 0.6, 0.2, 0.5]])
    data = [(torch.rand(2, 3, size, size, generator=generator), targets) for _ in range(batches)]
    return taylor_scores(network, data, DetectionLoss(network.anchors, network.strides, network.classes, size))


def scores_by(criterion: str, blocks: Blocks, network: Network) -> dict[int, np.ndarray]:
    return taylor(network) if criterion == "taylor" else scores_of(blocks, network.state_dict(), criterion)


def test_filter_criteria_are_their_definitions() -> None:
    blocks = small()
    state = alive(blocks).state_dict()
    found = {c: scores_of(blocks, state, c) for c in FREE}
    for index, block in enumerate(blocks):
        if block.kind != "convolutional":
            continue
        filters = state[f"{block.conv_path}.weight"].double().numpy().reshape(block.channels, -1)
        assert found["l1"][index] == pytest.approx(np.abs(filters).sum(1))
        assert found["l2"][index] == pytest.approx(np.linalg.norm(filters, axis=1))
        distances = [sum(np.linalg.norm(a - b) for b in filters) for a in filters]
        assert found["fpgm"][index] == pytest.approx(distances, rel=1e-6)
        if block.batch_norm:
            assert found["gamma"][index] == pytest.approx(state[f"{block.bn_path}.weight"].abs().numpy())


def test_the_geometric_median_goes_first() -> None:
    """Three filters on a line: the middle one can be replaced by the others, though its norm is not the smallest."""
    block = Block("convolutional", "model.0", (0,), 3, 1)
    blocks = (Block("input", channels=3), block)
    state = {"model.0.weight": torch.tensor([[1.0, 0, 0], [2.0, 0, 0], [3.0, 0, 0]]).view(3, 3, 1, 1)}
    assert scores_of(blocks, state, "fpgm")[1].argmin() == 1
    assert scores_of(blocks, state, "l2")[1].argmin() == 0


def test_random_is_repeatable_and_differs_by_seed_and_layer() -> None:
    blocks = small()
    state = Network(blocks).state_dict()
    a, b, c = (scores_of(blocks, state, "random", seed) for seed in (0, 0, 5000))
    assert all(np.array_equal(a[i], b[i]) for i in a) and not any(np.array_equal(a[i], c[i]) for i in a)
    twins = [i for i in a if len(a[i]) == 16]
    assert not np.array_equal(a[twins[0]], a[twins[1]])


def test_taylor_is_the_first_order_change_of_the_loss() -> None:
    """|gamma dL/dgamma| of one batch against central differences of the loss in double precision."""
    network = alive(small())
    generator = torch.Generator().manual_seed(3)
    images, targets = torch.rand(2, 3, 64, 64, generator=generator), torch.zeros(0, 6)

    def loss(
        maps: list[torch.Tensor], targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:  # detection's own has targets that move along
        total = sum(m.sigmoid().square().sum() for m in maps)
        return total, total.detach()

    before = {k: v.clone() for k, v in network.state_dict().items()}
    found = taylor_scores(network, [(images, targets)], loss)
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items()) and not network.training
    assert not any(p.requires_grad or p.grad is not None for p in network.parameters())
    index = next(i for i, b in enumerate(network.blocks) if b.name == "model.4.cv1")
    gamma = network.get_submodule("model.4.cv1.bn").weight
    network.double()
    for channel in found[index].argsort()[-3:].tolist():
        value, values = float(gamma[channel]), []
        for factor in (1 - 1e-4, 1 + 1e-4):
            gamma.data[channel] = value * factor
            values.append(float(loss(network(images.double()), targets)[0]))
        gamma.data[channel] = value
        assert found[index][channel] == pytest.approx(abs(values[1] - values[0]) / 2e-4, rel=1e-3)


def test_taylor_without_a_batch_is_refused() -> None:
    network = alive(small())
    with pytest.raises(InputError, match="at least one batch"):
        taylor_scores(network, [], DetectionLoss(network.anchors, network.strides, 3, 64))


def test_normalisations() -> None:
    scores = {1: np.array([1.0, 2.0, 5.0]), 2: np.zeros(4)}
    assert normalized(scores, "none") == scores
    assert normalized(scores, "mean")[1].mean() == pytest.approx(1)
    assert normalized(scores, "max")[1].max() == 1
    standard = normalized(scores, "standard")[1]
    assert (standard.mean(), standard.std()) == pytest.approx((0, 1))
    for how in NORMALIZE:
        assert not normalized(scores, how)[2].any(), "a layer of zeros stays one"


def test_the_masks_of_criteria_and_normalisations_differ() -> None:
    """A table of criteria must not be one row repeated."""
    blocks = stock("n", 4)
    network, spaces = alive(blocks), find_spaces(blocks)
    policy = PrunePolicy(0.3, "union", 0.01)
    masks = {}
    for criterion in CRITERIA:
        scores = scores_by(criterion, blocks, network)
        for how in NORMALIZE:
            if criterion == "random" and how != "none":
                continue
            masks[criterion, how] = select_masks(spaces, normalized(scores, how), policy).mask
    for (a, x), (b, y) in combinations(masks.items(), 2):
        assert (x != y).sum() >= 10, f"{a} and {b} select the same channels"


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("rule", [*EQUALIZE, "keep"])
def test_oracle_of_every_criterion_and_rule(criterion: str, rule: str) -> None:
    blocks = small()
    network, spaces = alive(blocks), find_spaces(blocks)
    scores = normalized(scores_by(criterion, blocks, network), "mean")
    assert_oracle(blocks, network, select_masks(spaces, scores, PrunePolicy(0.4, rule, divisor=4)).mask, spaces)


@pytest.mark.parametrize("criterion", ["l1", "fpgm"])
@pytest.mark.parametrize("module", ["BottleneckCSP", "GhostBottleneck", "C3Ghost", "C2f", "SPP"])
def test_oracle_of_filter_criteria_on_every_tie(module: str, criterion: str) -> None:
    blocks = with_module(module, [24])
    network, spaces = alive(blocks), find_spaces(blocks)
    for rule in ("union", "intersection", "arithmetic_mean"):
        mask = select_masks(spaces, scores_of(blocks, network.state_dict(), criterion), PrunePolicy(0.5, rule)).mask
        assert_oracle(blocks, network, mask, spaces)


def bare() -> Blocks:
    """A detector with a convolution that has a bias, an activation and no batch norm."""
    blocks = [
        Block("input", channels=3), Block("convolutional", "model.0", (0,), 16, 3, 2, 1, 1, "silu", True),
        Block("convolutional", "model.1", (1,), 24, 3, 2, 1, 1, "silu", False, True), Block("convolutional", "model.2", (2,), 16, 1, 2, 0, 1, "silu", True),
        Block("convolutional", "model.3.m.0", (3,), 21, bias=True),
        Block("yolo", "model.3", (4,), 21, anchors=((8.0, 9.0), (16.0, 12.0), (30.0, 40.0)), classes=2),
    ]  # fmt: skip
    return check(blocks)


def test_filters_judge_what_no_batch_norm_acts_on() -> None:
    blocks = bare()
    network, spaces = alive(blocks), find_spaces(blocks)
    state, policy = network.state_dict(), PrunePolicy(0.5)
    space = next(s for s in spaces.spaces if s.producers == (2,))
    assert keep_reason(space, gamma_scores(blocks, state), policy) == KeepReason.NO_BATCHNORM
    scores = scores_of(blocks, state, "l2")
    assert keep_reason(space, scores, policy) is None
    selection = select_masks(spaces, scores, policy)
    assert not selection.of(spaces, 2).all()
    assert_oracle(blocks, network, selection.mask, spaces)


def tied() -> tuple[Blocks, Spaces, dict[int, np.ndarray]]:
    blocks = stock("n")
    rng = np.random.default_rng(0)
    return blocks, find_spaces(blocks), {i: rng.random(b.channels) + 0.01 for i, b in enumerate(blocks) if b.has_gamma}


def test_intersection_keeps_what_every_member_keeps() -> None:
    _, spaces, scores = tied()
    selection = select_masks(spaces, scores, PrunePolicy(0.5, "intersection"))
    pool = np.sort(np.concatenate([scores[i] for s in spaces.spaces if s.keep is None for i, _ in s.members]))
    threshold = pool[selection.planned]
    for space in (s for s in spaces.spaces if s.tied):
        every = np.all([scores[i][p[:, 0]] >= threshold for i, p in space.members], axis=0)
        assert every.any() and np.array_equal(selection.mask[space.classes], every)


@pytest.mark.parametrize("rule", ["arithmetic_mean", "geometric_mean"])
def test_means_rank_a_group_as_one(rule: str) -> None:
    _, spaces, scores = tied()
    mean = np.mean if rule == "arithmetic_mean" else lambda x, axis: np.prod(x, axis=axis) ** (1 / len(x))
    votes = {s: mean([scores[i][p[:, 0]] for i, p in s.members], axis=0) for s in spaces.spaces if s.keep is None}
    selection = select_masks(spaces, scores, PrunePolicy(0.5, rule))
    threshold = np.sort(np.concatenate(list(votes.values())))[selection.planned]
    assert selection.pool == sum(map(len, votes.values()))
    for space, vote in votes.items():
        if (vote >= threshold).any():
            assert np.array_equal(selection.mask[space.classes], vote >= threshold)


def test_a_geometric_mean_needs_scores_that_are_not_negative() -> None:
    _, spaces, scores = tied()
    with pytest.raises(InputError, match="--normalize standard"):
        select_masks(spaces, normalized(scores, "standard"), PrunePolicy(0.5, "geometric_mean"))


@pytest.mark.parametrize("least", [4, 12, 1000])
@pytest.mark.parametrize("rule", ["union", "intersection", "first", "arithmetic_mean"])
def test_min_filters_is_a_floor(least: int, rule: str) -> None:
    _, spaces, scores = tied()
    selection = select_masks(spaces, scores, PrunePolicy(0.95, rule, min_filters=least))
    for space in spaces.spaces:
        assert selection.mask[space.classes].sum() >= min(least, space.width)
