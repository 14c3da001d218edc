"""A recipe's learning rates, weight decays and phases: against their formulas, by role, and where modifiers overlap."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from engine.optim import build_optimizer
from engine.recipe.curves import cosine, cyclic_linear, function_rate, linear, rate_of, ruling, scheduler_rate
from engine.recipe.modifiers import (
    ConstantPruningModifier,
    DistillationModifier,
    EpochRangeModifier,
    GlobalMagnitudePruningModifier,
    GMPruningModifier,
    LearningRateFunctionModifier,
    LearningRateModifier,
    Modifier,
    QuantizationModifier,
    Recipe,
    SetLearningRateModifier,
    SetWeightDecayModifier,
    TrainableParamsModifier,
    first_epoch,
)
from engine.recipe.phases import is_passing, last_event, phase_at
from engine.recipe.schedule import Clock, RecipeSchedule
from engine.schedule import ScheduleOptions, YoloSchedule
from models.network import Network
from tests.helpers import small


def curve(
    func: str, start: float = 30.0, end: float = 50.0, a: float = 0.05, b: float = 0.001, **more: object
) -> LearningRateFunctionModifier:
    return LearningRateFunctionModifier(start, end, func, a, b, **more)


# ---- one modifier --------------------------------------------------------------------------------------------------------------


def test_cosine_has_the_published_anchors_and_rises_as_it_falls() -> None:
    values = [function_rate(curve("cosine"), clock, 10) for clock in (30, 35, 40, 45, 50)]
    assert values == pytest.approx([0.05, 0.04282, 0.0255, 0.00818, 0.001], abs=5e-6)
    for share in (0.0, 0.13, 0.5, 0.8, 1.0):
        assert cosine(share, 0.05, 0.001) == pytest.approx(0.001 + 0.049 * (1 + math.cos(math.pi * share)) / 2)
        assert cosine(share, 0.001, 0.05) == pytest.approx(0.001 + 0.049 * (1 - math.cos(math.pi * share)) / 2)


def test_lines_and_their_ends_are_held() -> None:
    m = curve("linear", 2.5, 7.3, 0.01, 0.0)
    assert [function_rate(m, clock, 7) for clock in (2.5, 4.9, 7.3, 8.0, 99.0)] == pytest.approx([0.01, 0.005, 0.0, 0.0, 0.0])
    assert function_rate(m, 7.4, 7) == 0.0, "never below it: an end between two batches does not extrapolate"
    assert linear(0.25, 1.0, 3.0) == 1.5


def test_the_saw_tooth_falls_within_each_cycle_and_its_last_one_may_be_short() -> None:
    m = curve("cyclic_linear", 1.0, 3.5, 0.1, 0.0, cycle_epochs=1.0)  # batches 5..17 of 5 per epoch: 5 + 5 + 3
    values = [round(function_rate(m, step / 5, 5), 6) for step in range(5, 20)]
    assert values == [0.1, 0.075, 0.05, 0.025, 0.0, 0.1, 0.075, 0.05, 0.025, 0.0, 0.1, 0.05, 0.0, 0.0, 0.0]
    assert [cyclic_linear(k, 4, 1, 0.1, 0.0) for k in range(4)] == [0.1] * 4, "a cycle of one batch has no way to go"


def scheduler(name: str, **kwargs: object) -> LearningRateModifier:
    return LearningRateModifier(2.0, 8.0, name, kwargs, 0.1)


@pytest.mark.parametrize(
    "m, torchs",
    [
        (scheduler("StepLR", step_size=2, gamma=0.5), lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5)),
        (scheduler("ExponentialLR", gamma=0.7), lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.7)),
        (scheduler("MultiStepLR", milestones=(3.0, 6.0), gamma=0.1), lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [1, 4], 0.1)),
        (
            scheduler("CosineAnnealingWarmRestarts", lr_min=0.01, cycle_epochs=4),
            lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 4, eta_min=0.01),
        ),
    ],
)  # fmt: skip
def test_schedulers_are_torchs_in_epochs_since_their_start(m: LearningRateModifier, torchs) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    theirs = torchs(optimizer)
    for epoch in range(2, 8):
        assert scheduler_rate(m, epoch) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    assert scheduler_rate(m, 8) == scheduler_rate(m, 100), "the value stays"


def test_a_cycle_that_ends_with_the_modifier_is_over_and_restarts_between_epochs() -> None:
    m = LearningRateModifier(0.0, 8.0, "CosineAnnealingWarmRestarts", {"lr_min": 0.01, "cycle_epochs": 4}, 0.1)
    assert scheduler_rate(m, 8.0) == pytest.approx(0.01) and scheduler_rate(m, 4.0) == pytest.approx(0.1)
    assert scheduler_rate(m, 2.0) == pytest.approx(0.055) and scheduler_rate(m, 3.5) < scheduler_rate(m, 3.0)


# ---- several -------------------------------------------------------------------------------------------------------------------


def test_the_latest_start_rules_and_values_stay_until_another_starts() -> None:
    guide = [SetLearningRateModifier(0.0, -1.0, 0.05), curve("cosine")]
    rates = [rate_of(ruling(guide, clock, "weight"), clock, 10) for clock in (0, 29.9, 30, 40, 50, 60)]
    assert rates == pytest.approx([0.05, 0.05, 0.05, 0.0255, 0.001, 0.001])
    late = [curve("cosine", 0.0, 20.0, 0.01, 0.002), SetLearningRateModifier(10.0, -1.0, 2e-6)]
    rates = [rate_of(ruling(late, clock, "norm"), clock, 10) for clock in (0, 9.9, 10, 15, 25)]
    assert rates[0] == 0.01 and 0.005 < rates[1] < 0.01 and rates[2:] == [2e-6] * 3, (
        "the rate of QAT is not overwritten by the curve that goes on"
    )


@pytest.mark.parametrize("order", [1, -1])
def test_of_equal_starts_a_curve_rules_before_a_value_and_else_the_later_in_the_file(order: int) -> None:
    pair = [SetLearningRateModifier(3.0, -1.0, 0.9), curve("linear", 3.0, 5.0)][::order]
    assert isinstance(ruling(pair, 4.0, "bias"), LearningRateFunctionModifier)
    two = [SetLearningRateModifier(3.0, -1.0, 0.9), SetLearningRateModifier(3.0, -1.0, 0.8)]
    assert ruling(two, 3.0, "bias").learning_rate == 0.8
    assert ruling(two, 2.9, "bias") is None
    assert ruling([SetLearningRateModifier(-1.0, -1.0, 0.7)], 0.0, "bias").learning_rate == 0.7, "-1 is the start"


class Spy:
    """Stands for the pruner."""

    def __init__(self) -> None:
        self.calls: list[tuple[float, bool]] = []

    def update(self, clock: float, last: bool) -> bool:
        self.calls.append((clock, last))
        return False


def scheduled(*modifiers: Modifier, batches: int = 10, epochs: int = 4, name: str = "SGD", spy: Spy | None = None) -> RecipeSchedule:
    optimizer = build_optimizer(Network(small()), name, 0.01, 0.937, 5e-4)
    native = YoloSchedule(optimizer, ScheduleOptions(epochs, 0.01, 0.1, 0.937, 30, 0.8, 0.1, 4))
    return RecipeSchedule(native, optimizer, Recipe(modifiers), batches, epochs, 4, 0.937, Clock(), spy)


def state_of(schedule: RecipeSchedule, step: int) -> tuple[dict[str, float], dict[str, float], float, int]:
    accumulate = schedule.batch(step, step // schedule.batches)
    groups = schedule.optimizer.param_groups
    return {g["role"]: g["lr"] for g in groups}, {g["role"]: g["weight_decay"] for g in groups}, groups[0].get("momentum", 0.0), accumulate


def test_without_rates_in_the_recipe_the_native_schedule_stands() -> None:
    plain, native = scheduled(SetWeightDecayModifier(2.0, -1.0, 0.0)), scheduled().native
    for step in (0, 7, 15, 30, 31, 39):
        rates, _, momentum, accumulate = state_of(plain, step)
        expected = native.batch(step, step // 10)
        group = native.optimizer.param_groups
        assert (rates, momentum, accumulate) == ({g["role"]: g["lr"] for g in group}, group[0]["momentum"], expected)


def test_rates_of_the_recipe_end_the_warm_up_for_the_roles_that_they_name() -> None:
    schedule = scheduled(SetLearningRateModifier(0.0, -1.0, 0.05, ("weight", "norm")), SetLearningRateModifier(1.0, -1.0, 0.02, ("bias",)))
    rates, _, momentum, accumulate = state_of(schedule, 0)
    assert rates == {"weight": 0.05, "norm": 0.05, "bias": 0.1} and (momentum, accumulate) == (0.937, 4), (
        "the bias waits at the native rate"
    )
    assert state_of(schedule, 10)[0] == {"weight": 0.05, "norm": 0.05, "bias": 0.02}


def test_before_the_first_rate_the_native_warm_up_runs() -> None:
    schedule = scheduled(SetLearningRateModifier(1.5, -1.0, 0.05))
    rates, _, momentum, accumulate = state_of(schedule, 14)
    assert rates["bias"] == pytest.approx(0.1 + (0.00775 - 0.1) * 14 / 30) and momentum < 0.937 and accumulate == 2
    assert state_of(schedule, 15) == ({"bias": 0.05, "weight": 0.05, "norm": 0.05}, {"bias": 0.0, "weight": 5e-4, "norm": 0.0}, 0.937, 4)


def test_weight_decay_by_role_from_its_start_on() -> None:
    schedule = scheduled(SetWeightDecayModifier(1.0, -1.0, 0.0), SetWeightDecayModifier(2.0, -1.0, 0.3, ("norm",)))
    assert state_of(schedule, 9)[1] == {"bias": 0.0, "weight": 5e-4, "norm": 0.0}
    assert state_of(schedule, 10)[1] == {"bias": 0.0, "weight": 0.0, "norm": 0.0}
    assert state_of(schedule, 25)[1] == {"bias": 0.0, "weight": 0.0, "norm": 0.3}
    schedule.optimizer.load_state_dict(schedule.optimizer.state_dict())  # a resume brings the groups as they were
    assert state_of(schedule, 9)[1]["weight"] == 5e-4, "all follows from the number of the batch"


def test_adam_has_no_momentum_to_set_and_the_clock_and_the_pruner_follow() -> None:
    spy = Spy()
    schedule = scheduled(SetLearningRateModifier(0.0, -1.0, 0.05), name="AdamW", batches=3, epochs=2, spy=spy)
    for step in range(6):
        schedule.batch(step, step // 3)
    assert spy.calls == [(step / 3, step == 5) for step in range(6)] and schedule.clock.epoch == 5 / 3
    assert all("momentum" not in g for g in schedule.optimizer.param_groups)


# ---- phases --------------------------------------------------------------------------------------------------------------------

GMP = GlobalMagnitudePruningModifier(2.0, 5.0, final_sparsity=0.8)
QAT = QuantizationModifier(7.5, norm_freeze=9.0, observer_stop=8.2)


def phases(*modifiers: Modifier, epochs: int = 10, batches: int = 4) -> list[str]:
    return [phase_at(Recipe(modifiers), epoch, batches, epochs) for epoch in range(epochs)]


def test_phases_follow_ramps_and_quantisation() -> None:
    assert phases(GMP, QAT) == ["dense"] * 2 + ["pruning"] * 3 + ["pruned"] * 3 + ["pruned_quantized"] * 2
    assert phases(QAT) == ["dense"] * 8 + ["quantized"] * 2, "a fraction rounds up: structure changes between epochs"
    assert phases(ConstantPruningModifier(), QAT) == ["pruned"] * 8 + ["pruned_quantized"] * 2
    assert phases() == ["dense"] * 10


def test_a_ramp_counts_as_done_from_its_end_on_and_always_at_the_runs_last_batch() -> None:
    assert phases(replace(GMP, end_epoch=5.2))[4:7] == ["pruning", "pruned", "pruned"], "an end within an epoch is done when it ends"
    assert phases(GMP, epochs=5)[3:] == ["pruning", "pruned"] and phases(GMP, epochs=4)[2:] == ["pruning", "pruned"]
    assert phases(replace(GMP, end_epoch=3.0000000000000004), batches=1)[2:4] == ["pruning", "pruned"]
    later = GMPruningModifier(4.0, 8.0, final_sparsity=0.5)
    assert phases(GMP, later)[4:] == ["pruning"] * 4 + ["pruned"] * 2, "the last of the ramps"
    assert [is_passing(p) for p in ("pruning", "pruning_quantized", "pruned", "dense", "pruned_quantized")] == [
        True,
        True,
        False,
        False,
        False,
    ]


@pytest.mark.parametrize(
    "modifiers, event",
    [
        ((GMP, QAT), 9),
        ((GMP, QAT, TrainableParamsModifier(1.0, 9.5)), 10),
        ((SetLearningRateModifier(7.0, -1.0, 0.1), EpochRangeModifier(0.0, 50.0)), 7),
        ((curve("cosine", 2.0, 40.0), SetWeightDecayModifier(3.5, -1.0, 0.0)), 4),
        ((DistillationModifier(1.0, 6.0),), 6),
        ((DistillationModifier(1.0),), 1),
        ((DistillationModifier(0.0, 50.0), TrainableParamsModifier(2.0, 50.0), EpochRangeModifier(0.0, 50.0)), 2),
        ((ConstantPruningModifier(0.0, 8.0), EpochRangeModifier(0.0, 50.0)), 8),
        ((replace(GMP, end_epoch=50.0), EpochRangeModifier(0.0, 50.0)), 50),
        ((), 0),
    ],
)
def test_the_last_event_is_the_last_beginning_or_end(modifiers: tuple[Modifier, ...], event: int) -> None:
    """What ends with the run is none, but for a ramp."""
    assert last_event(Recipe(modifiers)) == event


def test_fractions_of_an_epoch_round_up() -> None:
    assert [first_epoch(at) for at in (0.0, 0.2, 3.0, 3.0000000001, math.inf)] == [0, 1, 3, 3, 10**9]
