"""The fields of every modifier: how they are read, what is noted about them, and that a written recipe reads as the same."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest

from engine.recipe.build import KINDS
from engine.recipe.document import recipe_of
from engine.recipe.modifiers import (
    ConstantPruningModifier,
    DistillationModifier,
    EpochRangeModifier,
    GlobalMagnitudePruningModifier,
    GMPruningModifier,
    LearningRateFunctionModifier,
    LearningRateModifier,
    MagnitudePruningModifier,
    Modifier,
    QuantizationModifier,
    Recipe,
    SetLearningRateModifier,
    SetWeightDecayModifier,
    TrainableParamsModifier,
)
from engine.recipe.writer import to_yaml

ALL_PRUNABLE = ("__ALL_PRUNABLE__",)
QAT = "modifiers:\n  - !QuantizationModifier {freeze_bn_stats_epoch: 3}\n"


def read(text: str) -> Recipe:
    return recipe_of(text, "r.yaml")


# fields of each modifier


READS: list[tuple[str, Modifier]] = [
    ("!EpochRangeModifier {start_epoch: 0.5, end_epoch: 9.5}", EpochRangeModifier(0.5, 9.5)),
    (
        "!SetLearningRateModifier {learning_rate: 1, param_groups: [0, 2], constant_logging: True}",
        SetLearningRateModifier(learning_rate=1.0, param_groups=("norm", "bias")),
    ),
    ("!SetLearningRateModifier {learning_rate: 1, param_groups: null}", SetLearningRateModifier(learning_rate=1.0)),
    ("!SetLearningRateModifier {learning_rate: 1, param_groups: [1, weight]}", SetLearningRateModifier(learning_rate=1.0, param_groups=("weight",))),
    (
        "!LearningRateFunctionModifier {lr_func: cyclic_linear, init_lr: 0, final_lr: 1, start_epoch: -1, end_epoch: 4, cycle_epochs: 2}",
        LearningRateFunctionModifier(-1.0, 4.0, lr_func="cyclic_linear", init_lr=0.0, final_lr=1.0, cycle_epochs=2.0),
    ),
    (
        "!LearningRateModifier {lr_class: StepLR, lr_kwargs: {step_size: 2}, init_lr: 0.1, start_epoch: 0, end_epoch: 8}",
        LearningRateModifier(0.0, 8.0, lr_class="StepLR", lr_kwargs={"step_size": 2.0, "gamma": 0.1}, init_lr=0.1),
    ),
    (
        "!LearningRateModifier {lr_class: CosineAnnealingWarmRestarts, lr_kwargs: {cycle_epochs: 3, lr_min: 1e-4}, init_lr: 0.1, start_epoch: 0}",
        LearningRateModifier(0.0, lr_class="CosineAnnealingWarmRestarts", lr_kwargs={"cycle_epochs": 3.0, "lr_min": 1e-4}, init_lr=0.1),
    ),
    ("!SetWeightDecayModifier {weight_decay: 0}", SetWeightDecayModifier(weight_decay=0.0)),
    (
        "!TrainableParamsModifier {params: __all__, trainable: False, params_strict: no, end_epoch: 3}",
        TrainableParamsModifier(-1.0, 3.0, params=("__ALL__",), trainable=False, params_strict=False),
    ),
    ("!ConstantPruningModifier {params: [__All_Prunable__, model.0.conv.weight], update_frequency: 0.1}", ConstantPruningModifier()),
    (
        "!GMPruningModifier {init_sparsity: __FROM_PARAM__, final_sparsity: {0.5: [a, b], 0.8: ['re:c']}, start_epoch: 0, end_epoch: 3,"
        " update_frequency: 0.5, params: [], inter_func: linear, leave_enabled: False, mask_type: block4, score_type: magnitude, phased: False}",
        GMPruningModifier(
            0.0, 3.0, init_sparsity=None, targets=((0.5, ("a", "b")), (0.8, ("re:c",))), update_frequency=0.5, inter_func="linear", leave_enabled=False,
            mask_type="block4",
        ),
    ),
    (
        "!GMPruningModifier {init_sparsity: 0, final_sparsity: 0.75, start_epoch: 0, end_epoch: 3, update_frequency: 1, params: [], mask_type: 1:4}",
        GMPruningModifier(0.0, 3.0, final_sparsity=0.75, mask_type="1:4"),
    ),
    (
        "!MagnitudePruningModifier {init_sparsity: 0, final_sparsity: 0.5, start_epoch: 0, end_epoch: 3, update_frequency: 1, params: [a]}",
        MagnitudePruningModifier(0.0, 3.0, final_sparsity=0.5, params=("a",)),
    ),
    (
        "!QuantizationModifier {start_epoch: 1, submodules: [model.0, model.1], tensorrt: True, reduce_range: True, freeze_bn_stats_epoch: 2,"
        " disable_quantization_observer_epoch: 3, num_calibration_steps: 7, activation_bits: 8, weight_bits: 8, exclude_module_types: [SiLU],"
        " custom_quantizable_module_types: [SiLU], quantize_conv_activations: False}",
        QuantizationModifier(
            1.0, modules=("model.0", "model.1"), symmetric=True, reduce_range=True, norm_freeze=2.0, observer_stop=3.0, calibration_steps=7
        ),
    ),
    (
        "!QuantizationModifier {scheme: tensorrt, ignore: [Concat, Upsample, model.24.m.0], strict: True}",
        QuantizationModifier(symmetric=True, ignore=("model.24.m.0",)),
    ),
    (
        "!QuantizationModifier {scheme: {input_activations: {num_bits: 8, symmetric: False}, weights: {num_bits: 8, symmetric: True, strategy: channel}}}",
        QuantizationModifier(),
    ),
    ("!QuantizationModifier {submodules: [model], log_types: [tensorboard]}", QuantizationModifier()),
    (
        "!DistillationModifier {hardness: 0.3, temperature: 1, start_epoch: 2, end_epoch: 4, distill_output_keys: [], teacher_input_keys: null}",
        DistillationModifier(2.0, 4.0, hardness=0.3, temperature=1.0),
    ),
]  # fmt: skip


@pytest.mark.parametrize("text,wanted", READS, ids=lambda v: v[1:40] if isinstance(v, str) else "")
def test_fields(text: str, wanted: Modifier) -> None:
    (found,) = read(f"modifiers:\n  - {text}\n").modifiers
    assert found == wanted and type(found) is type(wanted)


def test_every_modifier_is_read_above() -> None:
    read_ones = {type(m).__name__ for _, m in READS}
    assert set(KINDS) - read_ones == {"GlobalMagnitudePruningModifier"}  # the guide's


NOTED = [
    ("!QuantizationModifier {exclude_module_types: [SiLU]}", "exclude_module_types: SiLU: "),
    ("!QuantizationModifier {scheme: {weights: {num_bits: 8}}}", "scheme: weights are int8, symmetric, with a scale for each output channel"),
    ("!QuantizationModifier {model_fuse_fn_name: no_fuse}", "model_fuse_fn_name: batch norms are always folded into their convolutions"),
    ("!QuantizationModifier {reduce_range: True}", "reduce_range: weights get 7 bits"),
    ("!QuantizationModifier {num_calibration_steps: 9}", "num_calibration_steps: training finds the ranges from its own batches"),
    ("!ConstantPruningModifier {params: __ALL__}", "params: __ALL__ also holds biases and batch norms that are zero"),
    ("!DistillationModifier {distill_output_keys: [a]}", "distill_output_keys: all outputs of the head are distilled"),
    (
        "!GMPruningModifier {init_sparsity: 0, final_sparsity: .5, start_epoch: 0, end_epoch: 3, update_frequency: 1, params: __ALL__}",
        "params: __ALL__ also prunes biases and batch norms",
    ),
    (
        "!GMPruningModifier {init_sparsity: 0, final_sparsity: {.5: [__ALL__]}, start_epoch: 0, end_epoch: 3, update_frequency: 1, params: []}",
        "final_sparsity: __ALL__ also prunes biases and batch norms",
    ),
    (
        "!GMPruningModifier {init_sparsity: 0, final_sparsity: .5, start_epoch: 0, end_epoch: 3, update_frequency: 1, params: [], global_sparsity: True}",
        "global_sparsity: GlobalMagnitudePruningModifier is the name of this today",
    ),
]  # fmt: skip


@pytest.mark.parametrize("text,said", NOTED, ids=lambda v: v[:40])
def test_what_is_read_otherwise_is_noted(text: str, said: str) -> None:
    (note,) = read(f"modifiers:\n  - {text}\n").notes
    assert note.startswith(f"r.yaml:2: {text[1 : text.index(' ')]}: {said}")


def test_logging_modifiers_are_passed_over() -> None:
    recipe = read("modifiers:\n  - !SparsificationLoggingModifier {interval: 3}\n  - !DistillationModifier\n")
    assert recipe.modifiers == (DistillationModifier(),)
    assert recipe.notes == ("r.yaml:2: SparsificationLoggingModifier has no effect: sparsity is logged anyway",)


# length of the run


def test_the_largest_edge_makes_the_run() -> None:
    text = "modifiers:\n  - !EpochRangeModifier {start_epoch: 0, end_epoch: 5}\n  - !SetLearningRateModifier {start_epoch: 6.5, learning_rate: 0.1}\n"
    assert read(text).epochs == 7


def test_what_arithmetic_rounds_is_no_fraction_of_an_epoch() -> None:
    text = "epochs: 50\nmodifiers:\n  - !EpochRangeModifier {start_epoch: 0, end_epoch: eval(epochs * 1.1)}\n"
    recipe = read(text)
    assert recipe.modifiers[0].end > 55 and recipe.epochs == 55, "50 * 1.1 is 55.00000000000001"
    assert read(text.replace("1.1", "1.1001")).epochs == 56


def test_without_a_range_the_recipe_does_not_say_how_long() -> None:
    assert read("modifiers:\n  - !ConstantPruningModifier {params: __ALL_PRUNABLE__, end_epoch: 5}\n").epochs is None


# writing


def random_modifier(rng: random.Random) -> Modifier:
    start = rng.choice([-1.0, 0.0, rng.randint(0, 90) / 8])
    end = max(start, 0.0) + rng.randint(1, 90) / 8
    params = tuple(rng.sample(["model.0.conv.weight", "re:model\\.[1-9]\\.", "re:a: {b}, #'\"", "__ALL_PRUNABLE__", "é", "- x"], 3))
    params = ALL_PRUNABLE if "__ALL_PRUNABLE__" in params else params
    final = rng.randint(60, 95) / 100
    pruning: dict[str, Any] = {
        "init_sparsity": rng.choice([None, 0.0, 0.05]), "update_frequency": rng.choice([-1.0, 0.5, 1e-3]), "leave_enabled": rng.random() < 0.5,
        "inter_func": rng.choice(["linear", "cubic", "inverse_cubic"]), "mask_type": rng.choice(["unstructured", "block4", "1,4", "8,1"]),
    }  # fmt: skip
    rate = {"init_lr": rng.random(), "param_groups": tuple(rng.sample(["norm", "weight", "bias"], rng.randint(0, 3)))}
    return rng.choice([
        lambda: EpochRangeModifier(start, end),
        lambda: SetLearningRateModifier(start, learning_rate=1e-7 + rng.random() / 2, param_groups=rate["param_groups"]),
        lambda: LearningRateFunctionModifier(start, end, lr_func="cosine", final_lr=rng.random() * 1e-6, cycle_epochs=0.3, **rate),
        lambda: LearningRateModifier(start, end, lr_class="ExponentialLR", lr_kwargs={"gamma": 0.9}, init_lr=1e-5),
        lambda: LearningRateModifier(
            -1.0, 99.0, lr_class="MultiStepLR", lr_kwargs={"milestones": (1.5, 2.0), "gamma": 0.1}, init_lr=0.1
        ),
        lambda: SetWeightDecayModifier(start, weight_decay=5e-4, param_groups=rate["param_groups"]),
        lambda: TrainableParamsModifier(start, end + 1, params=params, trainable=rng.random() < 0.5, params_strict=rng.random() < 0.5),
        lambda: ConstantPruningModifier(start, end, params=params),
        lambda: GMPruningModifier(start, end, final_sparsity=final, params=params, global_sparsity=rng.random() < 0.5, **pruning),
        lambda: MagnitudePruningModifier(start, end, targets=((0.6, ("a", "b")), (0.75, ("re:c",))), **pruning),
        lambda: GlobalMagnitudePruningModifier(start, end, final_sparsity=final, params=params, **pruning),
        lambda: DistillationModifier(start, end, hardness=rng.random(), temperature=1 + rng.random()),
    ])()  # fmt: skip


def test_written_recipes_read_as_the_same() -> None:
    rng = random.Random(3)
    for _ in range(60):
        modifiers = [random_modifier(rng) for _ in range(rng.randint(1, 6))]
        if rng.random() < 0.5:
            modifiers.append(
                QuantizationModifier(
                    0.5, modules=rng.choice([(), ("model.0", "model.1")]), ignore=rng.choice([(), ("model.24.m.0",)]), symmetric=rng.random() < 0.5,
                    reduce_range=rng.random() < 0.5, observer_stop=rng.choice([None, 3.5]), norm_freeze=rng.choice([None, 2.0]),
                    calibration_steps=rng.choice([None, 0, 5]),
                )
            )  # fmt: skip
        text = to_yaml(Recipe(tuple(modifiers)))
        assert read(text).modifiers == tuple(modifiers), text


def test_modifiers_are_equal_wherever_they_stand() -> None:
    first, second = read(QAT).modifiers, read("\n\n" + QAT).modifiers
    assert first == second and first[0].where != second[0].where
    assert dataclasses.replace(first[0], norm_freeze=None) != second[0]
