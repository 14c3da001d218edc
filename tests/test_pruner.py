"""The pruning modifiers of a recipe at work: sparsity by the clock, masks that hold, overlaps, resume equality, and what is refused."""

from __future__ import annotations

import copy
import io
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from engine.ema import Ema
from engine.loop import Loop
from engine.recipe.document import recipe_of
from engine.recipe.modifiers import (
    ALL_PRUNABLE,
    ConstantPruningModifier,
    GlobalMagnitudePruningModifier,
    GMPruningModifier,
    MagnitudePruningModifier,
    Modifier,
)
from engine.recipe.pruner import MagnitudePruner
from engine.seams import Observer, Schedule, Stateful
from models.network import Network
from pruning.magnitude import sparsity_at
from tests.helpers import alive, small
from tests.recipe_texts import pruning
from tests.test_training import CPU, make_loop
from utils.device import Precision
from utils.errors import InputError

BATCHES = 4
CONVS = ("model.2.cv1.conv.weight", "model.2.cv2.conv.weight", "model.5.conv.weight")


def gmp(start: float = 0.0, end: float = 3.0, init: float | None = 0.05, final: float | None = 0.8, **fields: object) -> GMPruningModifier:
    return GMPruningModifier(start, end, init_sparsity=init, final_sparsity=final, **fields)


def pruner_of(modifiers: Sequence[Modifier], network: Network | None = None, epochs: int = 4) -> MagnitudePruner:
    return MagnitudePruner(modifiers, network or alive(small()), epochs, BATCHES)


def run(pruner: MagnitudePruner, until: float | None = None, start: int = 0) -> list[float]:
    """Call `update` before every batch as the loop does; return the share of zeros that each batch saw."""
    seen = []
    steps = pruner.epochs * BATCHES
    for step in range(start, steps if until is None else int(until * BATCHES)):
        pruner.update(step / BATCHES, step + 1 == steps)
        seen.append(zeros(pruner.network, pruner.names))
    return seen


def zeros(network: Network, names: Sequence[str]) -> float:
    weights = [network.get_parameter(name) for name in names]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def train_step(network: Network, optimizer: torch.optim.Optimizer, seed: int, pruner: MagnitudePruner | None = None) -> None:
    generator = torch.Generator().manual_seed(seed)
    loss = sum(m.square().mean() for m in network.train()(torch.rand(2, 3, 64, 64, generator=generator)))
    optimizer.zero_grad()
    loss.backward()
    if pruner:
        pruner.mask_gradients(network)
    optimizer.step()


# ---- by the clock --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("kind", ["linear", "cubic", "inverse_cubic"])
def test_the_sparsity_follows_the_ramp_epoch_by_epoch(kind: str, pooled: bool) -> None:
    pruner = pruner_of([gmp(1.0, 3.0, inter_func=kind, global_sparsity=pooled)])
    seen = run(pruner)
    expected = [0.0] * 4 + [sparsity_at(epoch, 1, 3, 0.05, 0.8, kind) for epoch in (1, 2, 3) for _ in range(4)]
    assert seen == pytest.approx(expected, abs=1e-3)
    for name in pruner.names if not pooled else ():
        weight = pruner.network.get_parameter(name)
        assert int((weight == 0).sum()) == round(weight.numel() * 0.8), "exact in every layer"
    total = sum(pruner.network.get_parameter(n).numel() for n in pruner.names)
    assert not pooled or round(seen[-1] * total) == round(total * 0.8)
    assert pruner.target == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("frequency", "changes"), [(1.0, [0, 4, 8, 12]), (0.5, list(range(0, 13, 2))), (-1, list(range(13))), (1.3, [0, 6, 12])]
)
def test_masks_are_renewed_at_every_update_and_at_the_end(frequency: float, changes: list[int]) -> None:
    pruner = pruner_of([gmp(0.0, 3.0, update_frequency=frequency)])
    assert [step for step in range(16) if pruner.update(step / BATCHES)] == changes


def test_fractions_of_an_epoch_that_do_not_add_up_exactly_delay_no_update() -> None:
    pruner = MagnitudePruner([gmp(0.0, 3.0, update_frequency=0.1)], alive(small()), 3, 10)
    assert [step for step in range(31) if pruner.update(step / 10)] == list(range(31))


@pytest.mark.parametrize("end", [4.0, 3.9, 7.0, 4.000000000000001])
def test_a_ramp_that_lasts_to_the_end_of_the_run_reaches_its_final_sparsity(end: float, capsys: pytest.CaptureFixture) -> None:
    pruner = pruner_of([gmp(0.0, end, inter_func="linear", leave_enabled=False)])
    seen = run(pruner)
    assert seen[-2] < 0.79 and seen[-1] == pytest.approx(0.8, abs=1e-3) and pruner.target == pytest.approx(0.8) and pruner.masks
    assert ("its ramp ends at epoch 7, after the run (4 epochs)" in capsys.readouterr().out) is (end == 7)


def test_the_first_mask_has_the_initial_sparsity_even_between_two_batches() -> None:
    pruner = pruner_of([gmp(0.6, 3.0, init=0.3, inter_func="linear")])
    assert run(pruner, 1.0)[2:4] == pytest.approx([0.0, sparsity_at(0.75, 0.6, 3.0, 0.3, 0.8, "linear")], abs=1e-3)


def test_the_start_tells_what_is_pruned_and_names_the_ends_of_the_network(capsys: pytest.CaptureFixture) -> None:
    ends = ", ".join(("model.0.conv.weight", "model.14.m.0.weight", "model.14.m.1.weight"))
    pruner_of(
        [gmp(where="r.md:3", global_sparsity=True), gmp(1.0, 2.0, None, 0.9, params=CONVS[:1]), ConstantPruningModifier(3.0, params=CONVS)]
    )
    said = capsys.readouterr().out.splitlines()
    assert said == [
        f"r.md:3: GMPruningModifier: 32 tensors ({ends} among them), epochs 0 to 3: zeros from 5.0% to 80.0%, cubic, unstructured, in one ranking",
        "GMPruningModifier: 1 tensor, epochs 1 to 2: zeros from what each has to 90.0%, cubic, unstructured, layer by layer",
        "ConstantPruningModifier: 3 tensors, epochs 3 to the end: zeros stay zero",
    ]


def test_targets_by_layer(capsys: pytest.CaptureFixture) -> None:
    pruner = pruner_of([gmp(final=None, targets=((0.5, CONVS[:1]), (0.75, ("re:model.2.cv2.*weight", CONVS[2]))), where="r.yaml:7")])
    assert (
        "r.yaml:7: GMPruningModifier: final_sparsity: 're:model.2.cv2.*weight' also chose model.2.cv2.bn.weight, of batch norms"
        in capsys.readouterr().out
    )
    run(pruner)
    assert set(CONVS) <= set(pruner.names) and "model.1.conv.weight" not in pruner.names
    assert [round(zeros(pruner.network, [name]), 3) for name in CONVS] == [0.5, 0.75, 0.75]


@pytest.mark.parametrize("kind", ["block4", "2,4", "2:4"])
def test_masks_of_another_shape_end_exact_and_what_does_not_fit_is_said(kind: str, capsys: pytest.CaptureFixture) -> None:
    pruner = pruner_of([gmp(0.0, 3.0, init=0.0, final=0.5, mask_type=kind, where="r.yaml:7")])
    run(pruner)
    said = capsys.readouterr().out
    text = kind if kind != "block4" else "1,4"
    assert f"r.yaml:7: GMPruningModifier: mask_type {text} leaves dense: model.0.conv.weight (3 input channels, no multiple of 4)" in said
    assert "model.0.conv.weight" not in pruner.names and zeros(pruner.network, ["model.0.conv.weight"]) == 0
    for name in pruner.names:
        weight = pruner.network.get_parameter(name)
        if kind == "2:4":
            assert ((weight == 0).unflatten(1, (-1, 4)).sum(2) == 2).all()
        assert zeros(pruner.network, [name]) == pytest.approx(0.5, abs=8 / weight.numel())


@pytest.mark.parametrize("mask, final", [("2:4", 0.51), ("2:4", 0.49), ("1:4", 0.76)])
def test_a_final_sparsity_that_is_read_as_that_of_a_pattern_prunes_to_it(mask: str, final: float) -> None:
    """The reader and the pruner agree on a hundredth."""
    recipe = recipe_of(pruning(final_sparsity=final, mask_type=mask), "r.yaml")
    keep, out_of = map(int, mask.split(":"))
    pruner = pruner_of([replace(m, params=("re:model\\.2.*conv\\.weight",)) for m in recipe.modifiers])
    assert set(pruner.claims[0].finals.values()) == {1 - keep / out_of}


# ---- masks hold ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_zeros_are_exact_after_steps_on_the_network_and_its_average(optimizer: str) -> None:
    network = alive(small()).requires_grad_(True)
    ema = Ema(network)
    momentum = {"momentum": 0.9, "nesterov": True} if optimizer == "SGD" else {}
    opt = getattr(torch.optim, optimizer)(network.parameters(), lr=0.01, weight_decay=0.01, **momentum)
    train_step(network, opt, 9)  # momentum of weights that are masked later
    pruner = pruner_of([gmp(0.0, 3.0, final=0.7)], network)
    for step in range(5):
        pruner.update(float(step))
        train_step(network, opt, step, pruner)
        pruner.apply(network)
        ema.update(network)
        pruner.apply(ema.network)
        for name, mask in pruner.masks.items():
            for weight in (network.get_parameter(name), ema.network.get_parameter(name)):
                assert (weight[mask] == 0).all() and not torch.signbit(weight[mask]).any(), "zeros, and no negative ones"
            assert (weight[~mask] != 0).all()
    assert zeros(ema.network, pruner.names) == pytest.approx(0.7, abs=1e-3) and zeros(network, pruner.names) == zeros(
        ema.network, pruner.names
    )


def test_gradients_of_masked_weights_are_silent() -> None:
    network = alive(small()).requires_grad_(True)
    pruner = pruner_of([gmp(params=CONVS)], network)
    pruner.update(3.0)
    sum(m.sum() for m in network.train()(torch.rand(2, 3, 64, 64))).backward()
    before = {name: p.grad.clone() for name, p in network.named_parameters()}
    pruner.mask_gradients(network)
    for name, p in network.named_parameters():
        expected = before[name].masked_fill(pruner.masks[name], 0.0) if name in CONVS else before[name]
        assert torch.equal(p.grad, expected), name
    network.zero_grad()
    pruner.mask_gradients(network)  # nothing to silence is no error


def test_parameters_stay_the_objects_that_the_optimizer_holds() -> None:
    network = alive(small()).to(memory_format=torch.channels_last)
    ids, strides = {n: id(p) for n, p in network.named_parameters()}, {n: p.stride() for n, p in network.named_parameters()}
    run(pruner_of([gmp(), ConstantPruningModifier(3.5)], network))
    assert ids == {n: id(p) for n, p in network.named_parameters()} and strides == {n: p.stride() for n, p in network.named_parameters()}


def test_masks_are_dropped_after_the_end_where_the_recipe_says_so() -> None:
    pruner = pruner_of([gmp(0.0, 2.0, leave_enabled=False, params=CONVS)])
    run(pruner, 2.0)
    assert pruner.masks
    pruner.update(2.0)
    assert not pruner.masks and zeros(pruner.network, CONVS) == pytest.approx(0.8, abs=2e-3), "zeros that may grow again"


def test_constant_pruning_keeps_zeros_and_takes_up_new_ones_each_epoch() -> None:
    network = alive(small())
    first, second = network.get_parameter(CONVS[0]).data, network.get_parameter(CONVS[1]).data
    first[:2] = 0
    pruner = pruner_of([ConstantPruningModifier(params=CONVS)], network)
    pruner.update(0.0)
    first.add_(1.0)
    second[:3] = 0
    pruner.apply(network)
    assert (first[:2] == 0).all() and (first[2:] != 0).any()
    pruner.update(0.5)
    assert not pruner.masks[CONVS[1]].any()
    pruner.update(1.0)
    assert pruner.masks[CONVS[1]][:3].all() and not pruner.masks[CONVS[1]][3:].any()


class Clocked:
    """A schedule that lets a pruner act before every batch."""

    def __init__(self, inner: Schedule, pruner: MagnitudePruner) -> None:
        self.inner, self.pruner = inner, pruner

    def batch(self, step: int, epoch: int) -> int:
        last = step + 1 == self.pruner.epochs * self.pruner.batches
        self.pruner.update(step / self.pruner.batches, last)
        return self.inner.batch(step, epoch)


def pruning_loop(modifiers: Sequence[Modifier], epochs: int, batches: int, **fields: object) -> tuple[Loop, MagnitudePruner]:
    loop = make_loop(epochs=epochs, batches=batches, **fields)
    pruner = MagnitudePruner(modifiers, loop.network, epochs, batches)
    loop.seams.masks.append(pruner)
    loop.schedule = Clocked(loop.schedule, pruner)
    return loop, pruner


@pytest.mark.parametrize("precision", [CPU, Precision(torch.device("cpu"), torch.bfloat16)], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_training_ends_with_the_recipes_zeros_in_network_and_ema(precision: Precision, accumulate: int) -> None:
    loop, pruner = pruning_loop([gmp(0.0, 3.0)], 3, 2, optimizer="AdamW", precision=precision, accumulate=accumulate)
    start = [p.detach().clone() for p in loop.network.parameters()]
    loop.run()
    for network in (loop.network, loop.ema.network):
        assert zeros(network, pruner.names) == pytest.approx(0.8, abs=1e-3)
        assert all(torch.equal(network.get_parameter(name) == 0, mask) for name, mask in pruner.masks.items())
    assert not any(torch.equal(a, b) for a, b in zip(start, loop.network.parameters()))


def test_two_epochs_equal_one_and_one_resumed() -> None:
    modifiers = [gmp(0.5, 1.5, update_frequency=0.5, global_sparsity=True)]
    whole, _ = pruning_loop(modifiers, 2, 2, optimizer="AdamW")
    whole.run()
    first, _ = pruning_loop(modifiers, 2, 2, optimizer="AdamW")
    first.seams.observers.append(type("Stop", (Observer,), {"epoch_end": lambda self, loop, record: True})())
    first.run()
    state, ema = first.state_dict() | {"stopped": False}, {k: v.clone() for k, v in first.ema.network.state_dict().items()}
    second, pruner = pruning_loop(modifiers, 2, 2, optimizer="AdamW")
    second.load_state_dict(state, ema, 0)
    assert pruner.masks and pruner.target > 0
    second.run()
    for a, b in ((whole.network, second.network), (whole.ema.network, second.ema.network)):
        assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))
    assert zeros(second.ema.network, pruner.names) == pytest.approx(0.8, abs=1e-3)


# ---- what was there before, and who has what -----------------------------------------------------------------------------------


def sparse_network(share: float) -> Network:
    network = alive(small())
    pruner_of([gmp(0.0, 1.0, final=share)], network, 1).update(1.0)
    return network


def test_a_ramp_may_start_from_what_each_tensor_has() -> None:
    network = sparse_network(0.4)
    pruner = pruner_of([gmp(0.0, 3.0, init=None, inter_func="linear")], network)
    assert run(pruner)[::4] == pytest.approx([0.4, 0.4 + 0.4 / 3, 0.4 + 0.8 / 3, 0.8], abs=2e-3)


@pytest.mark.parametrize("init", [0.05, None])
def test_a_sparser_network_never_becomes_denser(init: float | None) -> None:
    network = sparse_network(0.6)
    pruner = pruner_of([gmp(0.0, 3.0, init=init, final=0.5)], network)
    before = {name: network.get_parameter(name) == 0 for name in pruner.names}
    run(pruner)
    assert all(torch.equal(pruner.masks[name], mask) for name, mask in before.items())


def test_a_later_start_has_a_parameter_while_it_runs(capsys: pytest.CaptureFixture) -> None:
    early, late = gmp(0.0, 4.0, 0.0, 0.8, inter_func="linear"), gmp(1.0, 3.0, 0.5, 0.6, params=CONVS[:1])
    pruner = pruner_of([early, late])
    assert "before the ramp" not in capsys.readouterr().out, "the early one ends by itself"
    mine, other = [], []
    for step in range(16):
        pruner.update(step / BATCHES, step == 15)
        mine.append(zeros(pruner.network, CONVS[:1]))
        other.append(zeros(pruner.network, CONVS[1:]))
    assert mine[::4] == pytest.approx([0.0, 0.5, sparsity_at(2, 1, 3, 0.5, 0.6), 0.6], abs=2e-3), "from 3 on the early one again"
    assert other[::4] == pytest.approx([0.0, 0.2, 0.4, 0.6], abs=2e-3)
    assert [mine[-1], other[-1]] == pytest.approx([0.8, 0.8], abs=4e-3)


def test_a_ramp_that_another_takes_over_says_so_and_stops(capsys: pytest.CaptureFixture) -> None:
    pruner = pruner_of([gmp(0.0, 3.0, 0.0, 0.9, where="r:1"), gmp(2.0, 4.0, 0.1, 0.6, where="r:5", params=CONVS)])
    said = "r:5: GMPruningModifier: has 3 parameters (model.2.cv1.conv.weight first) from epoch 2 on, before the ramp of r:1: GMPruningModifier has ended"
    assert said in capsys.readouterr().out
    run(pruner, 2.0)
    reached = zeros(pruner.network, CONVS)
    run(pruner, start=8)
    assert zeros(pruner.network, CONVS) == reached == pytest.approx(sparsity_at(1, 0, 3, 0, 0.9), abs=2e-3), (
        "more than 0.6 by then, and kept"
    )
    assert zeros(pruner.network, ["model.1.conv.weight"]) == pytest.approx(0.9, abs=2e-3)


@pytest.mark.parametrize("end", [3.0, 4.0])
def test_the_target_of_what_another_ramp_took_over_is_that_ones(end: float) -> None:
    early, late = gmp(0.0, 3.0, 0.0, 0.8, params=CONVS), gmp(1.0, end, 0.05, 0.6, params=CONVS)
    pruner = pruner_of([early, late])
    for step in range(16):
        pruner.update(step / BATCHES, step == 15)
        assert pruner.target == pytest.approx(zeros(pruner.network, CONVS), abs=2e-3), step
    assert pruner.target == pytest.approx(0.6)


@pytest.mark.parametrize("start, held", [(2.0, True), (1.0, True), (3.0, False)])
def test_the_target_stays_where_zeros_that_a_ramp_lets_go_are_held(start: float, held: bool) -> None:
    pruner = pruner_of([gmp(0.0, 2.0, leave_enabled=False, params=CONVS), ConstantPruningModifier(start, params=CONVS)])
    run(pruner, 2.0)
    assert pruner.target > 0.05
    pruner.update(2.0)
    assert pruner.target == pytest.approx(0.8 * held)
    pruner.update(3.0)
    assert pruner.target == pytest.approx(0.8 * held), "what was let go is nobody's target later"


def test_a_state_from_before_targets_were_kept_loads() -> None:
    pruner = pruner_of([gmp(params=CONVS)])
    run(pruner, 2.0)
    state = pruner.state_dict()
    again = pruner_of([gmp(params=CONVS)], copy.deepcopy(pruner.network))
    again.load_state_dict({key: value for key, value in state.items() if key != "asked"})
    assert again.target == pruner.target > 0.05 and again.asked == state["asked"]


@pytest.mark.parametrize("start", [0.0, 1.3])
def test_keeping_zeros_stands_in_no_ramps_way(start: float) -> None:
    alone = pruner_of([gmp(0.0, 3.0)])
    both = pruner_of([gmp(0.0, 3.0, leave_enabled=False), ConstantPruningModifier(start)])
    assert run(alone) == run(both) and alone.masks.keys() == both.masks.keys()
    assert all(torch.equal(mask, both.masks[name]) for name, mask in alone.masks.items())


def test_the_end_of_one_comes_before_the_start_of_the_next() -> None:
    pruner = pruner_of([ConstantPruningModifier(2.0), gmp(0.0, 2.0, leave_enabled=False)])
    seen = run(pruner)
    assert seen[8:] == pytest.approx([0.8] * 8, abs=1e-3)
    pruner = pruner_of([gmp(2.0, 4.0, 0.8, 0.9), gmp(0.0, 2.0, leave_enabled=True)])
    assert run(pruner)[8::4] == pytest.approx([0.8, sparsity_at(3, 2, 4, 0.8, 0.9)], abs=1e-3)


# ---- the checkpoint ------------------------------------------------------------------------------------------------------------

RECIPES: list[list[Modifier]] = [
    [GlobalMagnitudePruningModifier(0.5, 3.0, init_sparsity=0.1, final_sparsity=0.75, update_frequency=0.5)],
    [MagnitudePruningModifier(0.0, 3.5, init_sparsity=None, final_sparsity=0.5, mask_type="2:4"), ConstantPruningModifier(3.5)],
    [gmp(0.0, 2.0, leave_enabled=False, params=CONVS), gmp(1.0, 4.0, final=0.9, mask_type="block4", params=CONVS[1:], update_frequency=-1)],
]


@pytest.mark.parametrize("modifiers", RECIPES)
@pytest.mark.parametrize("cut", [0, 3, 6, 9, 13])
def test_a_resumed_pruner_equals_the_uninterrupted_one(modifiers: list[Modifier], cut: int) -> None:
    def advance(pruner: MagnitudePruner, start: int, stop: int) -> None:
        for step in range(start, stop):
            pruner.update(step / BATCHES, step == 15)
            generator = torch.Generator().manual_seed(step)
            for name in pruner.names:  # a step of training
                weight = pruner.network.get_parameter(name).data
                weight.add_(torch.randn(weight.shape, generator=generator) * 0.02)
            pruner.apply(pruner.network)

    whole = pruner_of(modifiers, alive(small()))
    advance(whole, 0, 16)
    first = pruner_of(modifiers, alive(small()))
    advance(first, 0, cut)
    file = io.BytesIO()
    torch.save({"network": first.network.state_dict(), "pruner": first.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    network = Network(small())
    network.load_state_dict(saved["network"])
    second = pruner_of(modifiers, network)
    second.load_state_dict(saved["pruner"])
    advance(second, cut, 16)
    assert second.masks.keys() == whole.masks.keys() and all(torch.equal(m, second.masks[n]) for n, m in whole.masks.items())
    assert all(torch.equal(a, b) for a, b in zip(whole.network.state_dict().values(), network.state_dict().values()))
    assert str(second.state_dict()) == str(whole.state_dict()) and second.target == whole.target


def test_state_is_small_and_belongs_to_its_recipe() -> None:
    pruner = pruner_of([gmp()])
    run(pruner)
    assert isinstance(pruner, Stateful)
    packed: dict[str, Tensor] = pruner.state_dict()["masks"]
    assert all(b.dtype == torch.uint8 and b.numel() == -(-pruner.masks[n].numel() // 8) for n, b in packed.items())
    other = pruner_of([gmp(final=0.9)])
    with pytest.raises(InputError, match="--resume: the run was made with other pruning modifiers"):
        other.load_state_dict(pruner.state_dict())
    moved = pruner_of([gmp(where="elsewhere.yaml:3")])
    moved.load_state_dict(pruner.state_dict())
    assert moved.masks.keys() == pruner.masks.keys()


# ---- refused before anything is touched ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("modifiers", "message"),
    [
        ([gmp(2.0, 2.0, where="r.yaml:4")], "^r.yaml:4: GMPruningModifier: end_epoch 2 must come after start_epoch 2$"),
        ([gmp(2.0, -1.0)], "^GMPruningModifier: end_epoch -1 must come after start_epoch 2$"),
        ([gmp(final=None)], "final_sparsity is missing"),
        ([gmp(mask_type="channel")], "mask_type 'channel' is none that masks can have"),
        ([gmp(mask_type="2:4")], "mask_type 2:4 is a sparsity of 0.5, and final_sparsity is 0.8; make them equal"),
        ([gmp(mask_type="1,7", params=CONVS)], "mask_type 1,7: fits none of its 3 parameters: model.2.cv1.conv.weight \\(16 input channels, no"),
        ([gmp(params=("model.2.cv9.conv.weight",))], "model.2.cv9.conv.weight"),
        ([gmp(final=None, targets=((0.5, ("re:nothing",)),))], "^GMPruningModifier: final_sparsity: no parameter of this model is matched by 're:nothing'"),
        ([gmp(final=None, targets=((0.5, ("re:(",)),))], r"^GMPruningModifier: final_sparsity: 're:\(' is no regular expression"),
        ([ConstantPruningModifier(params=("re:nothing",), where="r.md:9")], "^r.md:9: ConstantPruningModifier: .*re:nothing"),
        ([gmp(final=None, targets=((0.5, CONVS), (0.7, CONVS[1:])))], "model.2.cv2.conv.weight has two targets, 0.5 and 0.7; give one"),
        ([gmp(final=None, targets=((0.5, CONVS[:1]), (0.7, CONVS[1:])), global_sparsity=True)], "one ranking over all layers has one final"),
        ([gmp(where="a:1"), gmp(0.0, 9.0, where="a:2")], "^a:2: GMPruningModifier: starts at epoch 0 on 32 parameters \\(.* as a:1: GMP"),
        ([gmp(params=CONVS[:2]), gmp(-1.0, 2.0, params=CONVS[1:])], "starts at epoch 0 on model.2.cv2.conv.weight, as GMPruningModifier does"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(modifiers: list[Modifier], message: str) -> None:
    network = alive(small())
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(InputError, match=message):
        pruner_of(modifiers, network)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert ALL_PRUNABLE in gmp().params
