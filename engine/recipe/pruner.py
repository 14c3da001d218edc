"""A recipe's pruning modifiers acting on a training: masks that grow by a ramp, and stay.

`MagnitudePruner` is a `ParamMask` of the loop with state. It holds a mask (True: held at zero) for every parameter that a started modifier claims:

- `update` before every batch lets modifiers start, re-mask and end by the recipe's clock, and zeroes newly masked weights at once;
- `mask_gradients` before clipping, so that masked weights do not count in the gradient's norm;
- `apply` after every optimizer step, and on the EMA after its update: an average forgets zeros (0.9999^n), a mask does not.

Where two ramps claim a parameter at one time, the later start has it, as long as it runs; a `ConstantPruningModifier` contradicts none, since zeros
that a ramp makes stay zero anyway. Masks follow from the weights alone, which are equal in
all processes of a run, so the masks are too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.recipe.fields import off_pattern
from engine.recipe.modifiers import ConstantPruningModifier, GMPruningModifier, Modifier
from engine.recipe.selectors import counted, select, strays
from models.network import Network
from pruning.magnitude import Masks, MaskType, magnitude_masks, misfits, sparsity_at
from utils.errors import InputError
from utils.log import LOGGER

EPSILON = 1e-6  # epochs: less than any batch, more than what adding up fractions of one rounds


class Claim:
    """One modifier at work: the parameters that it claims, where its ramp leads each, and how far it is.

    `finals`: name -> final sparsity, None of zeros that are only kept. `inits`: name -> sparsity at the start, known once it has started.
    """

    def __init__(self, modifier: Modifier, network: Network) -> None:
        self.modifier, self.start, self.end = modifier, modifier.start, modifier.end
        self.label = f"{modifier.where}: {modifier.tag}" if modifier.where else modifier.tag
        self.kind, self.pooled = MaskType(), False
        self.finals: dict[str, float | None] = {}
        self.inits: dict[str, float] = {}
        self.frequency = 1.0
        self.field = "params"  # the one whose selectors name the parameters
        self.left: dict[str, str] = {}  # name -> why it stays dense
        if isinstance(modifier, GMPruningModifier):
            self._read(modifier, network)
        elif isinstance(modifier, ConstantPruningModifier):
            self.finals = dict.fromkeys(select(modifier.params, network, self.label))
        targets = getattr(modifier, "targets", ()) or ((None, modifier.params),)
        self.strays = strays([s for _, selectors in targets for s in selectors], network, self.finals, self.label)
        self.started, self.ended, self.last = False, False, -math.inf

    def _read(self, modifier: GMPruningModifier, network: Network) -> None:
        if not self.start < self.end < math.inf:
            raise InputError(f"{self.label}: end_epoch {modifier.end_epoch:g} must come after start_epoch {modifier.start_epoch:g}")
        self.kind, self.pooled, self.frequency = _mask_type(modifier, self.label), modifier.global_sparsity, modifier.update_frequency
        self.field = "final_sparsity" if modifier.targets else "params"
        for final, selectors in modifier.targets or ((modifier.final_sparsity, modifier.params),):
            for name in select(selectors, network, self.label, field=self.field):
                if name in self.finals:
                    raise InputError(f"{self.label}: final_sparsity: {name} has two targets, {self.finals[name]:g} and {final:g}; give one")
                self.finals[name] = _final(final, self.kind, self.label)
        if self.pooled and len(set(self.finals.values())) > 1:
            raise InputError(f"{self.label}: one ranking over all layers has one final_sparsity; use GMPruningModifier for several")
        weights = {name: network.get_parameter(name) for name in self.finals}
        self.left = misfits(weights, self.kind)
        self.finals = {name: final for name, final in self.finals.items() if name not in self.left}
        if not self.finals:
            raise InputError(f"{self.label}: mask_type {self.kind}: fits none of its {len(weights)} parameters: {_listed(self.left)}")

    @property
    def ramps(self) -> bool:
        return isinstance(self.modifier, GMPruningModifier)

    @property
    def holds(self) -> bool:
        """Whether the masks of its parameters stand: from its start to its end, or for good."""
        leaves = isinstance(self.modifier, GMPruningModifier) and self.modifier.leave_enabled
        return self.started and (leaves or not self.ended)

    def due(self, clock: float, last: bool) -> bool:
        """Whether it acts before the batch at `clock`: at its start, at every update, and at its end or the run's `last` batch."""
        if self.ended or clock < self.start - EPSILON:
            return False
        return not self.started or last or self.over(clock) or self.frequency < 0 or clock >= self.last + self.frequency - EPSILON

    def over(self, clock: float) -> bool:
        return clock >= self.end - EPSILON

    def yields(self, other: Claim, clock: float) -> bool:
        """Whether `other` has the parameters that both claim, at this act of ours: a ramp that started later and still runs."""
        if not (self.ramps and other.ramps) or other.start <= self.start:
            return False
        if self.over(clock):
            return other.start < self.end - EPSILON and other.end >= self.end - EPSILON
        return other.start <= clock + EPSILON and clock < other.end - EPSILON

    def sparsity(self, name: str, clock: float) -> float:
        """What `name` is to have at `clock`."""
        when, init = math.inf if self.over(clock) else clock, self.inits[name]
        return max(init, sparsity_at(when, self.start, self.end, init, self.finals[name], self.modifier.inter_func))

    @property
    def says(self) -> str:
        """The modifier in words of its own, without the place where it stood: what a resumed run must find again."""
        return repr(replace(self.modifier, where=""))

    def describe(self, ends: Sequence[str] = ()) -> str:
        """One line for the log. `ends`: names of the weights of the stem and of the head's outputs, which matter more than others."""
        end = "the end" if self.end == math.inf else f"{self.end:g}"
        common = [name for name in ends if name in self.finals]
        note = f" ({', '.join(common)} among them)" if common and len(self.finals) > len(common) else ""
        head = f"{self.label}: {len(self.finals)} tensor{'s' if len(self.finals) > 1 else ''}{note}, epochs {self.start:g} to {end}"
        modifier = self.modifier
        if not isinstance(modifier, GMPruningModifier):
            return f"{head}: zeros stay zero"
        finals = ", ".join(f"{final:.1%}" for final in sorted(set(self.finals.values())))
        init = "what each has" if modifier.init_sparsity is None else f"{modifier.init_sparsity:.1%}"
        ranking = "in one ranking" if self.pooled else "layer by layer"
        return f"{head}: zeros from {init} to {finals}, {modifier.inter_func}, {self.kind}, {ranking}"


class MagnitudePruner:
    """The pruning modifiers of a recipe on `network`, the trained one (its EMA, of the same names, only takes the masks).

    `epochs` and `batches` (per epoch): the run's length. Raises `InputError` for selectors that match nothing, targets that contradict each other and
    masks that fit no layer, before anything is touched.
    """

    def __init__(self, modifiers: Sequence[Modifier], network: Network, epochs: int, batches: int) -> None:
        self.network, self.epochs, self.batches = network, epochs, batches
        claims = [Claim(modifier, network) for modifier in modifiers]
        self.claims = sorted(claims, key=lambda c: (c.end, c.start))  # where one ends as another starts, the end comes first
        self.masks: Masks = {}
        self._kept: Masks = {}  # the opposite of each
        self.asked: dict[str, float] = {}  # of what is held: the sparsity that a ramp pruned it to
        self.clock = 0.0
        _check_conflicts(claims)
        _tell(claims, epochs, _ends(network))

    @property
    def names(self) -> list[str]:
        """Every parameter that some modifier claims, in the network's order."""
        claimed = {name for claim in self.claims for name in claim.finals}
        return [name for name, _ in self.network.named_parameters() if name in claimed]

    @property
    def held_from_start(self) -> set[str]:
        """Parameters whose zeros are held from the first batch on: every modifier holds at its start what it finds."""
        return {name for claim in self.claims if claim.start <= EPSILON for name in claim.finals}

    @property
    def ramped(self) -> list[str]:
        """Of `names` those with a ramp."""
        claimed = {name for claim in self.claims if claim.ramps for name in claim.finals}
        return [name for name in self.names if name in claimed]

    @property
    def target(self) -> float:
        """The sparsity over the weights of `ramped` that their last pruning asked for; 0 of what has not begun or is let go."""
        sizes = {name: self.network.get_parameter(name).numel() for name in self.ramped}
        return sum(self.asked.get(name, 0.0) * size for name, size in sizes.items()) / max(sum(sizes.values()), 1)

    @torch.no_grad()
    def update(self, clock: float, last: bool = False) -> bool:
        """Bring the masks to `clock` (batches done / batches per epoch) and zero what they newly hold; return whether they may have changed.

        Call it before every batch; `last`: the run's last one, at which a ramp that has not ended reaches its final sparsity. Where it returns
        True the EMA wants `apply` too: no optimizer step may follow, with accumulation.
        """
        self.clock = clock
        acting = [claim for claim in self.claims if claim.due(clock, last)]
        for claim in acting:
            self._act(claim, clock, last)
        if acting:
            self.asked = {name: asked for name, asked in self.asked.items() if name in self.masks}
            self._kept = {name: ~mask for name, mask in self.masks.items()}
            self.apply(self.network)
        return bool(acting)

    def _act(self, claim: Claim, clock: float, last: bool) -> None:
        rivals = [c for c in self.claims if c is not claim and claim.yields(c, clock)]
        names = [name for name in claim.finals if not any(name in rival.finals for rival in rivals)]
        weights = {name: self.network.get_parameter(name) for name in names}
        first = not claim.started
        if first:
            self._start(claim)
        if first or not claim.ramps:  # zeros that are there stay: a sparser network does not become denser
            self._hold({name: weight == 0 for name, weight in weights.items()})
        if claim.ramps and names:
            self._prune(claim, weights, math.inf if last else clock)
        claim.last = math.inf if last else clock
        claim.ended = claim.over(clock)
        if not claim.holds:
            self._release(claim, weights)

    def _start(self, claim: Claim) -> None:
        claim.started = True
        if not claim.ramps:
            return
        init = claim.modifier.init_sparsity
        if init is not None:
            claim.inits = dict.fromkeys(claim.finals, init)
            return
        zeros = {name: int((self.network.get_parameter(name) == 0).sum()) for name in claim.finals}
        sizes = {name: self.network.get_parameter(name).numel() for name in claim.finals}
        claim.inits = {name: zeros[name] / sizes[name] for name in claim.finals}
        if claim.pooled:
            claim.inits = dict.fromkeys(claim.finals, sum(zeros.values()) / sum(sizes.values()))

    def _prune(self, claim: Claim, weights: Mapping[str, Tensor], clock: float) -> None:
        wanted = {name: claim.sparsity(name, clock) for name in weights}
        self.asked |= {name: max(share, self.asked.get(name, 0.0)) for name, share in wanted.items()}  # masks only grow
        sparsity = next(iter(wanted.values())) if claim.pooled else wanted
        previous = {name: self.masks[name] for name in weights if name in self.masks}
        self.masks |= magnitude_masks(weights, sparsity, claim.kind, claim.pooled, previous)

    def _hold(self, zeros: Mapping[str, Tensor]) -> None:
        self.masks |= {name: zero | self.masks[name] if name in self.masks else zero for name, zero in zeros.items()}

    def _release(self, claim: Claim, weights: Mapping[str, Tensor]) -> None:
        """Let go the masks that nobody else holds: zeros now, which may grow again."""
        kept = {name for other in self.claims if other is not claim and other.holds for name in other.finals}
        for name in (weights.keys() - kept) & self.masks.keys():
            weights[name].masked_fill_(self.masks.pop(name), 0.0)

    @torch.no_grad()
    def apply(self, network: Network) -> None:
        """Zero the masked weights of `network`, the trained one or any of the same names."""
        if self._kept:  # multiplied, which on a CPU is several times faster than `masked_fill_`; adding zero makes each -0.0 a 0.0
            weights = [network.get_parameter(name) for name in self._kept]
            torch._foreach_mul_(weights, list(self._kept.values()))
            torch._foreach_add_(weights, 0.0)

    @torch.no_grad()
    def mask_gradients(self, network: Network) -> None:
        """Zero the gradients of masked weights."""
        pairs = [(gradient, kept) for name, kept in self._kept.items() if (gradient := network.get_parameter(name).grad) is not None]
        if pairs:
            torch._foreach_mul_(*(list(side) for side in zip(*pairs)))

    def state_dict(self) -> dict[str, Any]:
        """Masks as bits (uint8, eight weights each, in the order of indices), and how far each modifier is."""
        return {
            "masks": {name: _packed(mask) for name, mask in self.masks.items()},
            "claims": [
                {"says": c.says, "started": c.started, "ended": c.ended, "last": c.last, "inits": dict(c.inits)} for c in self.claims
            ],
            "asked": dict(self.asked),
            "clock": self.clock,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken; raise `InputError` where the recipe is another."""
        if [saved["says"] for saved in state["claims"]] != [claim.says for claim in self.claims]:
            raise InputError("--resume: the run was made with other pruning modifiers; use the recipe that it was started with")
        for claim, saved in zip(self.claims, state["claims"]):
            claim.started, claim.ended, claim.last = saved["started"], saved["ended"], saved["last"]
            claim.inits = dict(saved["inits"])
        self.clock = state["clock"]
        self.masks = {name: _unpacked(bits, self.network.get_parameter(name)) for name, bits in state["masks"].items()}
        self._kept = {name: ~mask for name, mask in self.masks.items()}
        self.asked = dict(state["asked"]) if "asked" in state else self._asked_by_claims()

    def _asked_by_claims(self) -> dict[str, float]:
        """About what `asked` is, for a state that was saved before it was kept: as if no ramp had taken parameters from another."""
        asked: dict[str, float] = {}
        for claim in (c for c in self.claims if c.ramps and c.started):
            asked |= {name: max(claim.sparsity(name, claim.last), asked.get(name, 0.0)) for name in claim.finals if name in self.masks}
        return asked


def _mask_type(modifier: GMPruningModifier, label: str) -> MaskType:
    try:
        return MaskType.parse(modifier.mask_type)
    except ValueError as error:
        raise InputError(f"{label}: {error}") from None


def _final(final: float | None, kind: MaskType, label: str) -> float:
    """The final sparsity as `kind` can have it: of N:M exactly 1 - N/M."""
    if final is None:
        raise InputError(f"{label}: final_sparsity is missing; give a number between 0 and 1")
    if not kind.of:
        return final
    if wrong := off_pattern(str(kind), kind.densest, final):
        raise InputError(f"{label}: mask_type {wrong}")
    return kind.densest


def _check_conflicts(claims: Sequence[Claim]) -> None:
    """Refuse ramps that start together on one parameter, and say where one takes parameters from another before that has ended."""
    ramps = [claim for claim in claims if claim.ramps]
    for one, other in ((one, other) for one in ramps for other in ramps if one is not other):
        common = [name for name in one.finals if name in other.finals]
        if common and one.start == other.start:
            raise InputError(
                f"{other.label}: starts at epoch {other.start:g} on {counted(common)}, as {one.label} does; leave them to one of the two, or let "
                "one start later"
            )
        if common and one.yields(other, one.end):
            LOGGER.warning(f"{other.label}: has {counted(common)} from epoch {other.start:g} on, before the ramp of {one.label} has ended")


def _ends(network: Network) -> list[str]:
    """The weights of the stem and of the head's outputs."""
    blocks = network.blocks
    stem = next((b for b in blocks if b.kind == "convolutional"), None)
    outputs = [blocks[j] for i in network.heads for j in blocks[i].inputs]
    return [f"{b.conv_path}.weight" for b in (stem, *outputs) if b is not None and b.kind == "convolutional"]


def _tell(claims: Sequence[Claim], epochs: int, ends: Sequence[str]) -> None:
    for claim in claims:
        LOGGER.info(claim.describe(ends))
        if claim.strays:
            LOGGER.warning(f"{claim.label}: {claim.field}: {claim.strays}")
        if claim.left:
            LOGGER.warning(f"{claim.label}: mask_type {claim.kind} leaves dense: {_listed(claim.left)}")
        if claim.ramps and claim.end > epochs + EPSILON:
            LOGGER.warning(
                f"{claim.label}: its ramp ends at epoch {claim.end:g}, after the run ({epochs} epochs); the last batch takes the rest of the way "
                "at once. A recipe with an EpochRangeModifier sets the run's length by itself"
            )


def _listed(reasons: Mapping[str, str], most: int = 8) -> str:
    more = f" and {len(reasons) - most} more" if len(reasons) > most else ""
    return ", ".join(f"{name} ({reason})" for name, reason in list(reasons.items())[:most]) + more


def _packed(mask: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(mask.cpu().contiguous().view(-1).numpy()))


def _unpacked(bits: Tensor, weight: Tensor) -> Tensor:
    flat = np.unpackbits(bits.cpu().numpy(), count=weight.numel()).astype(bool)
    return torch.empty_like(weight, dtype=torch.bool).copy_(torch.from_numpy(flat).view(weight.shape))
