"""Budgets: how much to prune so that parameters, FLOPs or latency come down to a target.

The amount of a policy (its percentage, or the factor on a plan's shares) is found by bisection, since the cost falls as it rises. What groups, floors and
multiples leave between the target and the nearest amount is then evened out one unit of channels at a time.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from models.blocks import Blocks, flops, parameters
from pruning.policy import Selection, Selector
from pruning.surgery import narrowed
from utils.errors import InputError

CLOSE = 0.01  # a target of parameters or FLOPs counts as reached within this share of it
STEPS = 40  # of the bisection: the amount is known to 1e-12
MOVES = 60  # most single units moved afterwards

Cost = Callable[[Blocks], float]
_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9}
_BARE = 1000  # parameters or FLOPs: a number up to this without a unit is a mistake, such as 50 for half, and would leave next to nothing


@dataclass(frozen=True)
class Target:
    """What to come down to. `what`: params, flops or latency; `amount`: a fraction of the cost before, or with `absolute` the cost itself
    (parameters, FLOPs of one image at the run's size, milliseconds)."""

    what: str
    amount: float
    absolute: bool

    def of(self, before: float) -> float:
        """The target cost, given the cost before; raises `InputError` where that is no reduction."""
        wanted = self.amount if self.absolute else self.amount * before
        if wanted >= before:
            raise InputError(f"--target-{self.what} {self.label}: the model is at {shown(self.what, before)} already; give less")
        return wanted

    @property
    def label(self) -> str:
        """As it was typed, about."""
        return f"{self.amount:g}"


def parse_target(what: str, text: str) -> Target:
    """`0.5` (at most 1: the fraction that stays) or an absolute figure: `1.2M`, `2.1G`, `12ms`."""
    match = re.fullmatch(r"\s*([0-9.]+(?:e[+-]?\d+)?)\s*([a-z]*)\s*", text.lower())
    unit = match.group(2).removesuffix("flops").removesuffix("params") if match else ""
    units = {"": 1.0, "ms": 1.0} if what == "latency" else _UNITS
    try:
        value = float(match.group(1)) * units[unit] if match else 0.0
    except (KeyError, ValueError):
        value = 0.0
    if value <= 0 or what != "latency" and not unit and 1 < value <= _BARE:
        absolute = {"params": "1.2M", "flops": "2.1G", "latency": "12ms"}[what]
        raise InputError(f"--target-{what} {text}: give the fraction that stays, such as 0.5, or a figure such as {absolute}")
    return Target(what, value, absolute=bool(unit) or value > 1)


def shown(what: str, cost: float) -> str:
    """A cost for people."""
    if what == "params":
        return f"{cost:,.0f} parameters"
    return f"{cost / 1e9:.4g} GFLOPs" if what == "flops" else f"{cost:.2f} ms"


def cost_of(what: str, imgsz: int) -> Cost:
    """The cost function of `params`, or of `flops` for one image of `imgsz` x `imgsz`. (Latency is measured: engine/latency_budget.py.)"""
    if what == "params":
        return lambda blocks: float(sum(parameters(blocks)))
    if what != "flops":
        raise ValueError(f"{what}: the structure alone does not tell this cost")
    return lambda blocks: float(sum(flops(blocks, imgsz, imgsz)))


@dataclass(frozen=True)
class Budgeted:
    """What the search found: the selection, the amount of the policy, its cost, and why it is not nearer to the target (empty: it is)."""

    selection: Selection
    amount: float
    cost: float
    wanted: float
    reason: str


def select_for(blocks: Blocks, selector: Selector, cost: Cost, wanted: float, close: float = CLOSE) -> Budgeted:
    """Search the amount at which the cost of what `selector` leaves of `blocks` is nearest to `wanted`."""

    def price(mask: np.ndarray) -> float:
        return cost(narrowed(blocks, selector.spaces, mask))

    low, high = 0.0, selector.policy.most
    least = price(selector.select(high).mask)
    if least > wanted:
        return Budgeted(selector.select(high), high, least, wanted, _why_no_less(selector, wanted, least, close))
    for _ in range(STEPS):
        middle = (low + high) / 2
        if price(selector.select(middle).mask) > wanted:
            low = middle
        else:
            high = middle
    amount, selection = min(((a, selector.select(a)) for a in (low, high)), key=lambda found: abs(price(found[1].mask) - wanted))
    mask, reached = _even_out(selector, selection.mask, price, wanted, close / 2)
    selection = Selection(mask, selection.threshold, selection.safe_percent, selection.planned, selection.pool)
    far = abs(reached - wanted) > close * wanted
    reason = "no single unit of channels, kept or removed, comes nearer" if far else ""
    return Budgeted(selection, amount, reached, wanted, reason)


def _even_out(
    selector: Selector, mask: np.ndarray, price: Callable[[np.ndarray], float], wanted: float, close: float
) -> tuple[np.ndarray, float]:
    """Move single units of channels, the one that comes nearest first, until the cost is within `close` of `wanted` or none comes nearer."""
    reached = price(mask)
    for _ in range(MOVES):
        if abs(reached - wanted) <= close * wanted:
            break
        moved = [selector.step(mask, number, up=reached < wanted) for number in range(len(selector.free))]
        priced = [(price(m), m) for m in moved if m is not None]
        best = min(priced, key=lambda found: abs(found[0] - wanted), default=(reached, mask))
        if abs(best[0] - wanted) >= abs(reached - wanted):
            break
        reached, mask = best
    return mask, reached


def _why_no_less(selector: Selector, wanted: float, least: float, close: float) -> str:
    if least <= wanted * (1 + close):
        return ""
    policy = selector.policy
    whole = sum(1 for s in selector.spaces.spaces if s not in selector.free)
    floors = [f"--layer_keep {policy.layer_keep:g}"] * bool(policy.layer_keep) + [f"--min-filters {policy.min_filters}"] * (
        policy.min_filters > 1
    )
    floors += [f"multiples of {policy.divisor}"] * (policy.divisor > 1) or ["one channel per layer"]
    return f"nothing more can go: {whole} groups of channels stay whole (see the table), and the others are down to their floor ({', '.join(floors)})"
