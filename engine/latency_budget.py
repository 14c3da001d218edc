"""A budget of latency: predicted from measured layers while the search goes on, measured on what it finds, and corrected by the difference.

A prediction is as good as the machine is quiet and the layers add up, so it steers the search and never counts as the result: each network that is found
is measured whole, and where that is off the search aims as much lower or higher.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from models.blocks import Blocks
from pruning.budget import Budgeted, Cost, select_for
from pruning.policy import Selector
from pruning.surgery import narrowed

CLOSE = 0.03  # a latency counts as reached within this share of the target: repeated measurements scatter by as much
ROUNDS = 4  # searches at most


@dataclass(frozen=True)
class LatencyFound:
    """`found`: the selection, `cost` being its measured milliseconds and `wanted` the target's. `predicted`: what the layers said. `rounds`: searches
    that it took."""

    found: Budgeted
    predicted: float
    rounds: int


def select_for_latency(
    blocks: Blocks, selector: Selector, predict: Cost, measure: Callable[[Blocks], float], wanted: float
) -> LatencyFound:
    """Search the selection whose network takes `wanted` milliseconds: by `predict`, each result verified by `measure`."""
    tried: list[LatencyFound] = []
    aim, full = wanted, predict(blocks)
    for number in range(1, ROUNDS + 1):
        found = select_for(blocks, selector, predict, aim, CLOSE / 2)
        measured = measure(narrowed(blocks, selector.spaces, found.selection.mask))
        shown = Budgeted(found.selection, found.amount, measured, wanted, found.reason)
        tried.append(LatencyFound(shown, found.cost, number))
        off = measured / wanted - 1
        if abs(off) <= CLOSE or (found.reason and off > 0):  # there, or nothing more can go
            break
        aim = min(aim * wanted / measured, (aim + full) / 2)  # one odd measurement must not ask for the full network
    best = min(tried, key=lambda t: abs(t.found.cost - wanted))
    far = abs(best.found.cost / wanted - 1) > CLOSE
    reason = best.found.reason or f"after {len(tried)} searches predicted and measured latencies still differ; the machine may be busy"
    found = Budgeted(best.found.selection, best.found.amount, best.found.cost, wanted, reason if far else "")
    return LatencyFound(found, best.predicted, len(tried))
