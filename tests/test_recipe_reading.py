"""Reading of recipes: what each way of writing one means, and that every recipe which ships reads, scales and survives being written."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from engine.options import TrainOptions
from engine.recipe.document import overrides_of, read_recipe, recipe_of
from engine.recipe.modifiers import (
    DistillationModifier,
    EpochRangeModifier,
    GlobalMagnitudePruningModifier,
    GMPruningModifier,
    LearningRateFunctionModifier,
    QuantizationModifier,
    Recipe,
    SetLearningRateModifier,
    SetWeightDecayModifier,
)
from engine.recipe.run import open_recipe, saved_recipe
from engine.recipe.writer import to_yaml
from utils.errors import InputError

RECIPES = Path(__file__).parent.parent / "recipes"
SHIPPED = sorted(p.name for p in RECIPES.iterdir())
AS_PRINTED = ("guide_gmp.yaml", "guide_qat.yaml")  # without variables
ALL_PRUNABLE = ("__ALL_PRUNABLE__",)
# As they stand in SparseML's guide to YOLOv5.
GUIDE_GMP = """\
modifiers:
    !GlobalMagnitudePruningModifier
        init_sparsity: 0.05
        final_sparsity: 0.8
        start_epoch: 0.0
        end_epoch: 30.0
        update_frequency: 1.0
        params: __ALL_PRUNABLE__

    !SetLearningRateModifier
        start_epoch: 0.0
        learning_rate: 0.05

    !LearningRateFunctionModifier
        start_epoch: 30.0
        end_epoch: 50.0
        lr_func: cosine
        init_lr: 0.05
        final_lr: 0.001

    !EpochRangeModifier
        start_epoch: 0.0
        end_epoch: 50.0
"""
GUIDE_QAT = """\
modifiers:
    !QuantizationModifier
        start_epoch: 0.0
        submodules: ['model']
        freeze_bn_stats_epoch: 3.0

    !SetLearningRateModifier
        start_epoch: 0.0
        learning_rate: 10e-6

    !EpochRangeModifier
        start_epoch: 0.0
        end_epoch: 5.0
"""
GMP = (
    GlobalMagnitudePruningModifier(0.0, 30.0, init_sparsity=0.05, final_sparsity=0.8, update_frequency=1.0, params=ALL_PRUNABLE),
    SetLearningRateModifier(0.0, learning_rate=0.05),
    LearningRateFunctionModifier(30.0, 50.0, lr_func="cosine", init_lr=0.05, final_lr=0.001),
    EpochRangeModifier(0.0, 50.0),
)
QAT = (
    QuantizationModifier(0.0, norm_freeze=3.0),
    SetLearningRateModifier(0.0, learning_rate=1e-5),
    EpochRangeModifier(0.0, 5.0),
)
NORMALISED = "r.yaml: tags without dashes were read as list items"


def read(text: str, args: str = "", markdown: bool = False) -> Recipe:
    return recipe_of(text, "r.yaml", args, markdown)


def one(text: str, args: str = "") -> Any:
    (modifier,) = read(text, args).modifiers
    return modifier


# the guide's listings


def test_the_guides_pruning_listing() -> None:
    recipe = read(GUIDE_GMP)
    assert recipe.modifiers == GMP and recipe.notes == (NORMALISED,)
    assert [m.where for m in recipe.modifiers] == ["r.yaml:2", "r.yaml:10", "r.yaml:14", "r.yaml:21"]
    assert recipe.epochs == 50


def test_the_guides_quantisation_listing() -> None:
    recipe = read(GUIDE_QAT)
    assert recipe.modifiers == QAT and recipe.notes == (NORMALISED,) and recipe.epochs == 5


@pytest.mark.parametrize("name,printed", [("gmp", GUIDE_GMP), ("qat", GUIDE_QAT)])
def test_the_shipped_listings_are_the_guides(name: str, printed: str) -> None:
    text = (RECIPES / f"guide_{name}.yaml").read_text()
    assert text[text.index("modifiers:") :] == printed


@pytest.mark.parametrize("name", ["gmp", "qat"])
def test_the_scaled_listings_are_the_printed_ones_at_their_default(name: str) -> None:
    scaled = read_recipe(str(RECIPES / f"guide_{name}_scaled.yaml"))
    assert scaled.modifiers == read_recipe(str(RECIPES / f"guide_{name}.yaml")).modifiers
    assert scaled.notes == ()


def test_the_scaled_listings_scale() -> None:
    gmp = read_recipe(str(RECIPES / "guide_gmp_scaled.yaml"), "epochs=10").modifiers
    assert gmp == (
        GlobalMagnitudePruningModifier(0.0, 6.0, init_sparsity=0.05, final_sparsity=0.8, update_frequency=0.2, params=ALL_PRUNABLE),
        SetLearningRateModifier(0.0, learning_rate=0.05),
        LearningRateFunctionModifier(6.0, 10.0, lr_func="cosine", init_lr=0.05, final_lr=0.001),
        EpochRangeModifier(0.0, 10.0),
    )
    qat = read_recipe(str(RECIPES / "guide_qat_scaled.yaml"), '{"epochs": 2}').modifiers
    assert qat == (QuantizationModifier(0.0, norm_freeze=1.2), QAT[1], EpochRangeModifier(0.0, 2.0))


# the recipes that ship


def test_shipped_recipes() -> None:
    assert [name for name in SHIPPED if name.endswith(".yaml")] == SHIPPED
    assert {"gmp.yaml", "qat.yaml", "gmp_qat.yaml", "transfer.yaml", "prune_2of4.yaml"} <= set(SHIPPED)


@pytest.mark.parametrize("name,args", [*((n, "") for n in SHIPPED), *((n, "epochs=3") for n in SHIPPED if n not in AS_PRINTED)])
def test_shipped_recipes_survive_being_written(name: str, args: str) -> None:
    recipe = read_recipe(str(RECIPES / name), args)
    assert read(to_yaml(recipe)).modifiers == recipe.modifiers


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_open_with_their_command(name: str) -> None:
    head = [line for line in (RECIPES / name).read_text().splitlines() if line.startswith("#")]
    assert any("python train.py --weights" in line and f"--recipe recipes/{name}" in line for line in head)


@pytest.mark.parametrize("name", [n for n in SHIPPED if n not in AS_PRINTED])
def test_shipped_recipes_scale_with_epochs(name: str) -> None:
    """Twice the epochs: every start and end is twice as late, but for warm-ups, which are never longer than an epoch."""
    default = read_recipe(str(RECIPES / name))
    assert default.epochs is not None
    doubled = read_recipe(str(RECIPES / name), f"epochs={2 * default.epochs}")
    assert doubled.epochs == 2 * default.epochs
    for before, after in zip(default.modifiers, doubled.modifiers, strict=True):
        assert type(before) is type(after)
        for edge in ("start_epoch", "end_epoch"):
            early, late = getattr(before, edge), getattr(after, edge)
            assert late == pytest.approx(2 * early) or early == late <= 1.0


@pytest.mark.parametrize("name", [n for n in SHIPPED if n not in AS_PRINTED])
def test_shipped_recipes_act_in_short_runs_too(name: str) -> None:
    """From two epochs on all that they say starts within the run, quantisation with an epoch of it, and ramps end before quantisation starts."""
    for epochs in range(2, 41):
        recipe = read_recipe(str(RECIPES / name), f"epochs={epochs}")
        assert recipe.epochs == epochs
        assert all((math.ceil(m.start) if isinstance(m, QuantizationModifier) else m.start) < epochs for m in recipe.modifiers)
        starts = [m.start for m in recipe.of(QuantizationModifier)]
        assert all(ramp.end <= start for ramp in recipe.of(GMPruningModifier) for start in starts)


def test_what_the_pruning_recipe_says() -> None:
    ramp, warm, curve, span = read_recipe(str(RECIPES / "gmp.yaml"), "sparsity=0.9,params=['re:model\\.[0-9]\\.']").modifiers
    assert (ramp.final_sparsity, ramp.end_epoch, ramp.params, ramp.global_sparsity) == (0.9, 30.0, ("re:model\\.[0-9]\\.",), True)
    assert (warm.init_lr, warm.final_lr, warm.end_epoch) == (0.001, 0.01, 1.0) and curve.start_epoch == 1.0 and curve.init_lr == 0.01
    assert span == EpochRangeModifier(0.0, 50.0)


def test_what_pruning_and_quantisation_says() -> None:
    recipe = read_recipe(str(RECIPES / "gmp_qat.yaml"))
    (ramp,), (quantization,) = recipe.of(GMPruningModifier), recipe.of(QuantizationModifier)
    assert ramp.end_epoch == pytest.approx(33.0) and quantization.start_epoch == 54.0
    assert quantization.norm_freeze is None and quantization.observer_stop == pytest.approx(57.6)


# containers


def test_front_matter() -> None:
    """Dashes within a line end nothing, and lines are those of the file."""
    text = "<!-- licence -->\n# Title --- with dashes\n\n---\nname: a---b\n# ------\n" + GUIDE_QAT + "---\n\nprose: [not yaml\n---\n"
    recipe = read(text, markdown=True)
    assert recipe.modifiers == QAT and recipe.modifiers[0].where == "r.yaml:8"


def test_front_matter_of_plus_signs() -> None:
    assert read("+++\r\n" + GUIDE_QAT.replace("\n", "\r\n") + "+++\r\ntext", markdown=True).modifiers == QAT


@pytest.mark.parametrize("suffix", [".yaml", ".yml", ".md", ".YAML"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_files(tmp_path: Path, suffix: str, mark: str) -> None:
    file = tmp_path / f"r{suffix}"
    text = f"---\n{GUIDE_GMP}---\n" if suffix == ".md" else GUIDE_GMP
    file.write_text(mark + text, encoding="utf-8")
    recipe = read_recipe(str(file))
    assert recipe.modifiers == GMP and recipe.source == str(file)


@pytest.mark.parametrize("suffix", [".yaml", ".md", ".MD"])
def test_a_resumed_run_reads_what_the_started_one_read(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"r{suffix}"
    file.write_text(f"title\n---\n{ANCHORED}---\n" if suffix.lower() == ".md" else ANCHORED)
    options, recipe = open_recipe(TrainOptions(data="d.yaml", recipe=str(file), recipe_args="num_epochs=7"))
    file.unlink()
    assert recipe is not None and recipe.epochs == options.epochs == 7
    assert saved_recipe(options) == recipe


@pytest.mark.parametrize(
    "epochs, said", [(4, ["freeze_bn_stats_epoch: 3.5", "disable_quantization_observer_epoch: 5"]), (5, ["disable"]), (6, [])]
)
def test_steps_of_quantisation_after_the_run_are_warned_of(
    tmp_path: Path, epochs: int, said: list[str], capsys: pytest.CaptureFixture
) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("modifiers:\n  - !QuantizationModifier {freeze_bn_stats_epoch: 3.5, disable_quantization_observer_epoch: 5}\n")
    open_recipe(TrainOptions(data="d.yaml", recipe=str(file), epochs=epochs))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(said)
    for line, part in zip(lines, said):
        assert f"r.yaml:2: QuantizationModifier: {part}" in line and f"(of {epochs}): it has no effect" in line


def test_a_yaml_file_is_not_cut() -> None:
    assert read("---\nrule: --- not the end ---\nmodifiers:\n  - !DistillationModifier\n").modifiers == (DistillationModifier(),)


# tags


FIELDS = "start_epoch: 0.0", "end_epoch: 5.0"
SPELLINGS = {
    "list": "modifiers:\n  - !EpochRangeModifier\n    {0}\n    {1}\n  - !DistillationModifier\n",
    "list at the margin": "modifiers:\n- !EpochRangeModifier\n  {0}\n  {1}\n- !DistillationModifier\n",
    "list, fields far in": "modifiers:\n  - !EpochRangeModifier\n        {0}\n        {1}\n  - !DistillationModifier\n",
    "flow": "modifiers: [!EpochRangeModifier {{{0}, {1}}}, !DistillationModifier {{}}]\n",
    "flow in a list": "modifiers:\n  - !EpochRangeModifier {{{0}, {1}}} # a 0.5\n  - !DistillationModifier\n",
    "nested lists": "modifiers:\n  - - - !EpochRangeModifier\n        {0}\n        {1}\n  - [[!DistillationModifier ]]\n",
    "names as keys": "modifiers:\n  EpochRangeModifier:\n    {0}\n    {1}\n  DistillationModifier:\n",
    "names as keys in a list": "modifiers:\n  - EpochRangeModifier: {{{0}, {1}}}\n  - DistillationModifier:\n",
    "tags as keys": "modifiers:\n  !EpochRangeModifier :\n    {0}\n    {1}\n  !DistillationModifier :\n",
    "the old prefix": "modifiers:\n  - !pytorch.EpochRangeModifier\n    {0}\n    {1}\n  - !pytorch.DistillationModifier\n",
    "two groups": "a_modifiers:\n  - !EpochRangeModifier\n    {0}\n    {1}\nknowledge_disitillation_modifiers:\n  - !DistillationModifier\n",
    "no key": "- !EpochRangeModifier\n  {0}\n  {1}\n- !DistillationModifier\n",
    "a group in capitals": "Modifiers:\n  - !EpochRangeModifier\n    {0}\n    {1}\n  - !DistillationModifier\n",
}  # fmt: skip
BARE = {
    "the guide's": "modifiers:\n    !EpochRangeModifier\n        {0}\n        {1}\n\n    !DistillationModifier\n",
    "two spaces": "modifiers:\n  !EpochRangeModifier\n    {0}\n    {1}\n  !DistillationModifier\n",
    "same column": "modifiers:\n  !EpochRangeModifier\n  {0}\n  {1}\n  !DistillationModifier\n  hardness: 0.5\n",
    "at the margin": "modifiers:\n!EpochRangeModifier\n  {0}\n  {1}\n!DistillationModifier\n",
    "with colons": "modifiers:\n  !EpochRangeModifier:\n    {0}\n    {1}\n  !DistillationModifier:\n    hardness: 0.5\n",
    "with comments": "modifiers:\n  !EpochRangeModifier # of 0.5\n    {0} # !no\n    # !nor\n    {1}\n  !DistillationModifier #\n",
    "some with dashes": "modifiers:\n  - !EpochRangeModifier\n    {0}\n    {1}\n  !DistillationModifier\n",
    "only the first": "modifiers:\n  !EpochRangeModifier\n    {0}\n    {1}\n  - !DistillationModifier\n    hardness: 0.5\n",
    "flow": "modifiers:\n  !EpochRangeModifier {{{0}, {1}}}\n  !DistillationModifier {{hardness: 0.5}}\n",
}  # fmt: skip
MEANT = (EpochRangeModifier(0.0, 5.0), DistillationModifier())


@pytest.mark.parametrize("text", SPELLINGS.values(), ids=SPELLINGS)
def test_spellings(text: str) -> None:
    recipe = read(text.format(*FIELDS))
    assert recipe.modifiers == MEANT and recipe.notes == ()


@pytest.mark.parametrize("text", BARE.values(), ids=BARE)
def test_tags_without_dashes(text: str) -> None:
    recipe = read(text.format(*FIELDS))
    assert recipe.modifiers == MEANT and recipe.notes == (NORMALISED,)


def test_tags_without_dashes_keep_modifiers_of_one_kind_apart() -> None:
    text = "modifiers:\n" + "".join(f"  !SetLearningRateModifier\n    start_epoch: {i}\n    learning_rate: 0.{i + 1}\n" for i in range(3))
    assert [(m.start_epoch, m.learning_rate, m.where) for m in read(text).modifiers] == [
        (0.0, 0.1, "r.yaml:2"),
        (1.0, 0.2, "r.yaml:5"),
        (2.0, 0.3, "r.yaml:8"),
    ]


def test_one_object_under_a_group_or_alone() -> None:
    assert one("modifiers: !DistillationModifier {hardness: 0.2}").hardness == 0.2
    assert one("!DistillationModifier\nhardness: 0.2\n").hardness == 0.2


def test_a_tag_without_body_has_all_defaults() -> None:
    assert one("modifiers:\n  - !QuantizationModifier\n") == QuantizationModifier()
    assert one("modifiers:\n  - !QuantizationModifier null\n") == QuantizationModifier()


def test_groups_stand_in_the_files_order() -> None:
    text = "late_modifiers:\n  - !DistillationModifier {hardness: 0.1}\nx: 1\nmodifiers:\n  - !DistillationModifier {hardness: 0.2}\n"
    assert [m.hardness for m in read(text).of(DistillationModifier)] == [0.1, 0.2]


def test_versions_and_metadata_are_no_modifiers() -> None:
    text = "version: 1.1.0\n__metadata__:\n  framework_metadata: {python: 3.8, torch: !!str 1.9}\nmodifiers:\n  - !DistillationModifier\n"
    assert read(text).modifiers == (DistillationModifier(),)


# variables


def test_variables_in_fields() -> None:
    text = """
epochs: eval(_prune + tune)
tune: 20
_prune: eval(round(tune * 1.5))
mask: [1, 4]
layers:
  - model.0.conv.weight
  - [model.1.conv.weight]
start: eval(-1)

modifiers:
  - !GMPruningModifier
    init_sparsity: eval(max(0.05, -0.1))
    final_sparsity: 0.8
    start_epoch: eval(start)
    end_epoch: eval( _prune )
    update_frequency: eval(1 / 4)
    params: eval(layers)
    mask_type: eval(mask)
  - !EpochRangeModifier {start_epoch: 0, end_epoch: eval(epochs)}
"""
    ramp, span = read(text).modifiers
    assert (ramp.init_sparsity, ramp.start_epoch, ramp.end_epoch, ramp.update_frequency) == (0.05, -1.0, 30.0, 0.25)
    assert (ramp.params, ramp.mask_type) == (("model.0.conv.weight", "model.1.conv.weight"), "1,4")
    assert span.end_epoch == 50.0


def test_expressions_within_lists_and_maps() -> None:
    fields = "lr_class: MultiStepLR, lr_kwargs: {milestones: [1, eval(g * 4)], gamma: eval(g)}, init_lr: 1e-2, start_epoch: 0"
    text = f"g: 0.5\nmodifiers:\n  - !LearningRateModifier {{{fields}}}\n"
    assert one(text).lr_kwargs == {"milestones": (1.0, 2.0), "gamma": 0.5}


@pytest.mark.parametrize("written", ["10e-6", "1e-5", "1.e-5", "1.0e-5", '"1e-5"', "eval(x)", "eval(x * 1)", "0.00001"])
def test_numbers_that_yaml_takes_for_words(written: str) -> None:
    assert one(f"x: 1e-5\nmodifiers:\n  - !SetLearningRateModifier\n    learning_rate: {written}\n").learning_rate == 1e-5


def test_whole_numbers_are_numbers() -> None:
    m = one(
        "modifiers:\n  - !GMPruningModifier {init_sparsity: 0, final_sparsity: .5, start_epoch: 1, end_epoch: 2, update_frequency: -1, params: []}"
    )
    assert (m.init_sparsity, m.start_epoch, m.update_frequency, m.params) == (0.0, 1.0, -1.0, ALL_PRUNABLE)
    assert isinstance(m.init_sparsity, float) and isinstance(m.start_epoch, float)


def test_sexagesimal_numbers_stay_masks() -> None:
    fields = "init_sparsity: .5, final_sparsity: .5, start_epoch: 0, end_epoch: 2, update_frequency: 1, params: []"
    text = "modifiers:\n  - !GMPruningModifier {{" + fields + ", mask_type: {}}}\n"
    for mask in ("2:4", '"2:4"', "tensorrt"):
        assert one(text.format(mask)).mask_type == "2:4"


# anchors, aliases, merges


ANCHORED = """
num_epochs: &epochs 240
_other: &unused 3
lr: &lr {init_lr: 0.1, final_lr: 0.01}
modifiers:
  - &span !EpochRangeModifier
    start_epoch: 0
    end_epoch: *epochs
  - !LearningRateFunctionModifier
    <<: *lr
    final_lr: 0.001
    lr_func: linear
    start_epoch: 0
    end_epoch: *epochs
"""


def test_aliases_and_merges() -> None:
    span, curve = read(ANCHORED).modifiers
    assert span.end_epoch == curve.end_epoch == 240.0 and (curve.init_lr, curve.final_lr) == (0.1, 0.001)


def test_an_override_reaches_what_used_the_alias() -> None:
    span, curve = read(ANCHORED, 'num_epochs=10,lr={"init_lr": 0.5, "final_lr": 0.2}').modifiers
    assert span.end_epoch == curve.end_epoch == 10.0 and (curve.init_lr, curve.final_lr) == (0.5, 0.001)


def test_an_override_may_be_an_expression() -> None:
    assert [m.end_epoch for m in read(ANCHORED, "num_epochs=eval(_other * 2)").modifiers] == [6.0, 6.0]


TARGETS = """
few: &few 0.5
many: &many 0.8
modifiers:
  - !GMPruningModifier
    {{init_sparsity: 0, final_sparsity: {{{}: [a], {}: [b]}}, start_epoch: 0, end_epoch: 3, update_frequency: 1, params: []}}
"""


@pytest.mark.parametrize("keys", [("*few ", "*many "), ("eval(few)", "eval(many)")])
def test_an_override_reaches_keys(keys: tuple[str, str]) -> None:
    text = TARGETS.format(*keys)
    assert one(text).targets == ((0.5, ("a",)), (0.8, ("b",)))
    assert one(text, "many=0.9,few=eval(many / 2)").targets == ((0.45, ("a",)), (0.9, ("b",)))
    for args, said in (("few=0.8", "is given twice" if "*" in keys[0] else "0.8 is a key twice"), ("few=[0.5]", "a key")):
        with pytest.raises(InputError, match=f"^r.yaml:[0-9]: GMPruningModifier: final_sparsity: .*{said}"):
            read(text, args)


def test_a_variable_that_is_an_alias_is_overridden_alone() -> None:
    text = "a: &a 3\nb: *a\nmodifiers:\n  - !EpochRangeModifier {start_epoch: eval(a), end_epoch: eval(b)}\n"
    span = one(text, "b=7")
    assert (span.start_epoch, span.end_epoch) == (3.0, 7.0)
    span = one(text, "a=1")
    assert (span.start_epoch, span.end_epoch) == (1.0, 1.0)


def test_a_modifier_may_take_the_fields_of_another() -> None:
    text = "modifiers:\n  - &a !DistillationModifier {hardness: 0.1, temperature: 3}\n  - !DistillationModifier\n    <<: *a\n    hardness: 0.2\n  - *a\n"
    assert [(m.hardness, m.temperature) for m in read(text).of(DistillationModifier)] == [(0.1, 3.0), (0.2, 3.0), (0.1, 3.0)]


# overrides


@pytest.mark.parametrize(
    "args,values",
    [
        ("", {}),
        ("  ", {}),
        ("a=1,b=2.5", {"a": 1, "b": 2.5}),
        ("a:1, b : x ", {"a": 1, "b": "x"}),
        ("a=1e-5", {"a": 1e-5}),
        ("a=[1, 4],b=2", {"a": [1, 4], "b": 2}),
        ("a=2:4", {"a": "2:4"}),
        ("a:2:4", {"a": "2:4"}),
        ("a=re:model.[0,1]", {"a": "re:model.[0,1]"}),
        ("a=true,b=null,c=__FROM_PARAM__", {"a": True, "b": None, "c": "__FROM_PARAM__"}),
        ("a=eval(max(b, 2))", {"a": "eval(max(b, 2))"}),
        ("a=b=c", {"a": "b=c"}),
        ("a=['re:model[.][0-9]', x]", {"a": ["re:model[.][0-9]", "x"]}),
        ('{"a": "1e-5", "b": ["2", "x"], "c": {"d": 3}}', {"a": 1e-5, "b": [2, "x"], "c": {"d": 3}}),
        ("{}", {}),
    ],
)
def test_recipe_args(args: str, values: dict[str, Any]) -> None:
    assert overrides_of(args) == values


def test_an_override_that_changes_nothing_is_noted() -> None:
    text = "epochs: 5\nunused: 3\nneeded: null\nmodifiers:\n  - !EpochRangeModifier {start_epoch: 0, end_epoch: eval(needed)}\n"
    assert read(text, "needed=4").notes == ()
    assert read(text, "needed=4,unused=2").notes == ("--recipe-args: unused changes nothing: no modifier uses it, or it is that already",)


# a recipe in the manner of SparseML's own for YOLOv5


ZOO = """
<!-- Licensed under ... -->
---
# General
version: 1.1.0
num_epochs: &num_epochs 242
init_lr: &init_lr 0.01
final_lr: &final_lr 0.002
weights_warmup_lr: &weights_warmup_lr 0
biases_warmup_lr: &biases_warmup_lr 0.1

# Pruning
mask_type: &mask_type [1, 4]
prune_none_target_sparsity: &prune_none_target_sparsity 0.4

# Quantization
quantization_start_epoch: &quantization_start_epoch 240

training_modifiers:
  - !EpochRangeModifier
    start_epoch: 0
    end_epoch: *num_epochs

  - !LearningRateFunctionModifier
    start_epoch: 3
    end_epoch: *num_epochs
    lr_func: cosine
    init_lr: *init_lr
    final_lr: *final_lr

  - !LearningRateFunctionModifier
    start_epoch: 0
    end_epoch: 3
    lr_func: linear
    init_lr: *weights_warmup_lr
    final_lr: *init_lr
    param_groups: [0, 1]

  - !LearningRateFunctionModifier
    start_epoch: 0
    end_epoch: 3
    lr_func: linear
    init_lr: *biases_warmup_lr
    final_lr: *init_lr
    param_groups: [2]

pruning_modifiers:
  - !GMPruningModifier
    params:
      - model.1.conv.weight
      - re:model.[2-9].*.conv.weight
    init_sparsity: 0.05
    final_sparsity: *prune_none_target_sparsity
    start_epoch: 4
    end_epoch: 100
    update_frequency: 0.2
    mask_type: *mask_type

quantization_modifiers:
  - !SetLearningRateModifier
    start_epoch: *quantization_start_epoch
    learning_rate: 2e-6

  - !QuantizationModifier
    start_epoch: *quantization_start_epoch
    submodules: [model.0, model.1, model.23]
---

# YOLOv5 --- pruned and quantised
"""


@pytest.mark.parametrize("epochs,start", [(242, 240), (50, 45)])
def test_a_recipe_in_the_manner_of_sparsemls_own(epochs: int, start: int) -> None:
    args = f"num_epochs={epochs},quantization_start_epoch={start}" if epochs != 242 else ""
    recipe = read(ZOO, args, markdown=True)
    assert recipe.epochs == max(epochs, 100) and recipe.notes == ()
    assert recipe.modifiers == (
        EpochRangeModifier(0.0, float(epochs)),
        LearningRateFunctionModifier(3.0, float(epochs), lr_func="cosine", init_lr=0.01, final_lr=0.002),
        LearningRateFunctionModifier(0.0, 3.0, lr_func="linear", init_lr=0.0, final_lr=0.01, param_groups=("norm", "weight")),
        LearningRateFunctionModifier(0.0, 3.0, lr_func="linear", init_lr=0.1, final_lr=0.01, param_groups=("bias",)),
        GMPruningModifier(
            4.0, 100.0, init_sparsity=0.05, final_sparsity=0.4, update_frequency=0.2, mask_type="1,4",
            params=("model.1.conv.weight", "re:model.[2-9].*.conv.weight"),
        ),
        SetLearningRateModifier(float(start), learning_rate=2e-6),
        QuantizationModifier(float(start), modules=("model.0", "model.1", "model.23")),
    )  # fmt: skip


# stages


STAGED = """
epochs: 4
lr: 0.1
end: eval(epochs + 1)
stage_1:
  epochs: 30
  modifiers:
    - !SetLearningRateModifier {start_epoch: 20, learning_rate: eval(lr)}
    - !EpochRangeModifier {start_epoch: 0, end_epoch: eval(epochs)}
stage_0:
  lr: 0.2
  first_modifiers:
    - !SetLearningRateModifier {start_epoch: 0, learning_rate: eval(lr)}
  stage_0_modifiers:
    - !DistillationModifier {start_epoch: 0, end_epoch: eval(end)}
modifiers:
  - !SetWeightDecayModifier {weight_decay: eval(lr)}
"""


def test_stages_are_ordered_by_their_ends_and_shadow_variables() -> None:
    recipe = read(STAGED)
    assert recipe.modifiers == (
        SetWeightDecayModifier(weight_decay=0.1),
        SetLearningRateModifier(0.0, learning_rate=0.2),
        DistillationModifier(0.0, 5.0),
        SetLearningRateModifier(20.0, learning_rate=0.1),
        EpochRangeModifier(0.0, 30.0),
    )
    assert recipe.epochs == 30


def test_a_stages_variables_leave_those_of_the_top_level_alone() -> None:
    """`end` was computed from the top level's epochs; stage_0 uses it, and so would stage_1, whose epochs are others."""
    text = "epochs: 4\nend: eval(epochs + 1)\ns:\n  epochs: 30\n  modifiers:\n    - !EpochRangeModifier {start_epoch: eval(end), end_epoch: eval(epochs)}\n"
    span = one(text)
    assert (span.start_epoch, span.end_epoch) == (5.0, 30.0)


def test_an_override_reaches_every_stage() -> None:
    recipe = read(STAGED, "lr=0.5,epochs=40")
    assert [m.learning_rate for m in recipe.of(SetLearningRateModifier)] == [0.5, 0.5]
    assert recipe.modifiers[0] == SetWeightDecayModifier(weight_decay=0.5)
    assert recipe.epochs == 41  # end of stage_0's teacher


def test_writing_twice_gives_the_same_text() -> None:
    for name in SHIPPED:
        text = to_yaml(read_recipe(str(RECIPES / name)))
        assert to_yaml(read(text)) == text
