"""A budget of latency: the search corrects what was predicted by what is measured. No test is timed; the machines here are formulas."""

from __future__ import annotations

import pytest

from engine.latency_budget import CLOSE, ROUNDS, select_for_latency
from models.blocks import Blocks, flops, parameters
from pruning.budget import cost_of
from pruning.policy import PrunePolicy
from pruning.surgery import narrowed
from tests.helpers import alive, stock
from tests.test_budget import selector
from tests.test_pruning import assert_oracle

POLICY = PrunePolicy(0.5, "union", 0.01, 8)


def predicted(blocks: Blocks) -> float:
    return sum(flops(blocks, 64, 64)) / 1e6


def test_a_right_prediction_needs_one_search() -> None:
    blocks = stock("n")
    chosen, wanted = selector(blocks, POLICY), 0.5 * predicted(blocks)
    result = select_for_latency(blocks, chosen, predicted, predicted, wanted)
    assert result.rounds == 1 and result.found.reason == ""
    assert result.found.cost == result.predicted == pytest.approx(wanted, rel=CLOSE / 2)
    assert_oracle(blocks, alive(blocks), result.found.selection.mask, chosen.spaces)


@pytest.mark.parametrize("factor", [0.7, 1.3])
def test_a_prediction_that_is_off_is_corrected_by_measuring(factor: float) -> None:
    blocks = stock("n")
    chosen, wanted = selector(blocks, POLICY), 0.5 * predicted(blocks)

    def machine(candidate: Blocks) -> float:
        return factor * predicted(candidate)

    result = select_for_latency(blocks, chosen, predicted, machine, wanted)
    assert result.rounds == 2 and result.found.reason == ""
    assert result.found.cost == machine(narrowed(blocks, chosen.spaces, result.found.selection.mask)) == pytest.approx(wanted, rel=CLOSE)
    assert result.found.cost == pytest.approx(factor * result.predicted)


def test_a_machine_that_contradicts_itself_gives_the_nearest_and_says_so() -> None:
    blocks = stock("n")
    chosen, wanted = selector(blocks, POLICY), 0.5 * predicted(blocks)
    readings = iter([1.5 * wanted, 0.6 * wanted, 1.2 * wanted, 1.4 * wanted])
    result = select_for_latency(blocks, chosen, predicted, lambda blocks: next(readings), wanted)
    assert result.rounds == ROUNDS and result.found.cost == pytest.approx(1.2 * wanted)
    assert "still differ" in result.found.reason


def test_one_odd_measurement_does_not_end_at_the_full_network() -> None:
    """A third of the time, once: corrected by that alone, the search would ask for more than the full network and leave all of it."""
    blocks = stock("n")
    chosen, wanted = selector(blocks, POLICY), 0.8 * predicted(blocks)
    odd = iter([1 / 3])
    result = select_for_latency(blocks, chosen, predicted, lambda b: next(odd, 1) * predicted(b), wanted)
    assert result.found.cost == pytest.approx(wanted, rel=CLOSE) and result.found.reason == ""
    assert not result.found.selection.mask.all()


def test_what_cannot_be_reached_is_searched_once() -> None:
    blocks = stock("n")
    chosen = selector(blocks, PrunePolicy(0.5, "keep", 0.5))
    result = select_for_latency(blocks, chosen, predicted, lambda b: 2 * predicted(b), 0.01 * predicted(blocks))
    assert result.rounds == 1 and "nothing more can go" in result.found.reason


def test_only_what_the_structure_tells_is_a_cost_of_the_structure() -> None:
    assert cost_of("params", 64)(stock("n")) == sum(parameters(stock("n")))
    with pytest.raises(ValueError, match="latency"):
        cost_of("latency", 64)
