"""`--config`: what each kind of entry does, and what is said of a wrong one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from pruning.plan import LayerPlan, make_plan, read_plan
from pruning.policy import PrunePolicy, Selection, keep_reason, select_masks
from pruning.spaces import KeepReason, Spaces, find_spaces
from tests.helpers import alive, small, stock, with_module
from tests.test_pruning import assert_oracle
from utils.errors import InputError

BLOCKS = stock("n", 4)
SPACES = find_spaces(BLOCKS)
SCORES = {i: np.random.default_rng(i).random(b.channels) for i, b in enumerate(BLOCKS) if b.has_gamma}


def select(entries: list[dict], rule: str = "union", **policy) -> tuple[Selection, LayerPlan, Spaces]:
    plan = make_plan(entries, BLOCKS)
    spaces = SPACES.keeping(plan.excluded, KeepReason.EXCLUDED)
    return select_masks(spaces, SCORES, PrunePolicy(0.0, rule, plan=plan, **policy)), plan, spaces


def index(name: str) -> int:
    return next(i for i, b in enumerate(BLOCKS) if b.name == name)


def removed(selection: Selection) -> dict[str, int]:
    """Name -> removed channels of every convolution that loses some."""
    counts = {b.name: int((~selection.of(SPACES, i)).sum()) for i, b in enumerate(BLOCKS) if b.kind == "convolutional"}
    return {name: n for name, n in counts.items() if n}


def test_a_share_per_layer_is_reached_in_each_layer_and_nowhere_else() -> None:
    selection, _, _ = select([{"sparsity_per_layer": 0.25, "op_names": ["model.1", "model.9.cv1", "model.13.cv3"]}])
    assert removed(selection) == {"model.1": 8, "model.9.cv1": 32, "model.13.cv3": 32}
    kept = SCORES[index("model.1")][selection.of(SPACES, index("model.1"))]
    assert kept.min() > np.sort(SCORES[index("model.1")])[7]


def test_sparsity_is_short_for_sparsity_per_layer() -> None:
    entry = {"op_names": ["model.1", "model.3"]}
    a, b = (select([entry | {key: 0.5}])[0] for key in ("sparsity", "sparsity_per_layer"))
    assert np.array_equal(a.mask, b.mask)


def test_a_total_is_shared_out_by_score_and_capped_per_layer() -> None:
    names = ["model.1", "model.3", "model.5"]  # 32, 64 and 128 channels
    free, _, _ = select([{"total_sparsity": 0.5, "op_names": names}])
    assert free.planned == 112
    pool = np.sort(np.concatenate([SCORES[index(n)] for n in names]))
    for name in names:
        assert np.array_equal(free.of(SPACES, index(name)), SCORES[index(name)] > pool[111])
    capped, _, _ = select([{"total_sparsity": 0.5, "max_sparsity_per_layer": 0.5, "op_names": names}])
    assert removed(capped) == {"model.1": 16, "model.3": 32, "model.5": 64}
    low, _, _ = select([{"total_sparsity": 0.5, "max_sparsity_per_layer": 0.25, "op_names": names}])
    assert removed(low) == {"model.1": 8, "model.3": 16, "model.5": 32}, "the cap comes before the total"


def test_types_names_and_parts_are_met_together() -> None:
    plan = make_plan([{"sparsity": 0.5, "op_types": ["Conv2d"], "op_partial_names": ["cv3"], "op_names": ["model.2", "model.4"]}], BLOCKS)
    assert {BLOCKS[i].name for i in plan.assigned} == {"model.2.cv3", "model.4.cv3"}
    every = make_plan([{"sparsity": 0.5, "op_types": ["default"]}], BLOCKS)
    assert set(every.assigned) == {i for i, b in enumerate(BLOCKS) if b.kind == "convolutional"}


@pytest.mark.parametrize("name", ["model.4.cv1", "model.4.cv1.conv", "model.4.cv1.bn"])
def test_a_layer_is_named_by_its_path_or_that_of_its_parts(name: str) -> None:
    assert set(make_plan([{"sparsity": 0.5, "op_names": [name]}], BLOCKS).assigned) == {index("model.4.cv1")}


def test_a_later_entry_takes_a_layer_over() -> None:
    entries = [{"sparsity": 0.5, "op_names": ["model.1", "model.3"]}, {"sparsity": 0.25, "op_names": ["model.3"]}]
    assert removed(select(entries)[0]) == {"model.1": 16, "model.3": 16}
    assert removed(select([*entries, {"exclude": True, "op_names": ["model.1"]}])[0]) == {"model.3": 16}
    back = [{"exclude": True, "op_names": ["model.1"]}, *entries]
    assert removed(select(back)[0]) == {"model.1": 16, "model.3": 16}


def test_excluding_one_member_keeps_its_group_whole() -> None:
    selection, _, spaces = select([{"sparsity": 0.5, "op_types": ["Conv2d"]}, {"exclude": True, "op_names": ["model.4.m.0.cv2"]}])
    assert not {"model.4.cv1", "model.4.m.0.cv2", "model.4.m.1.cv2"} & removed(selection).keys()
    group = next(s for s in spaces.spaces if index("model.4.cv1") in s.producers)
    assert group.keep == KeepReason.EXCLUDED


@pytest.mark.parametrize("rule", ["union", "first", "arithmetic_mean", "geometric_mean", "intersection"])
def test_a_group_follows_those_of_its_members_that_are_named(rule: str) -> None:
    """Otherwise naming one member of a shortcut group would do nothing."""
    selection, _, _ = select([{"sparsity": 0.5, "op_names": ["model.4.m.1.cv2"]}], rule)
    group = ["model.4.cv1", "model.4.m.0.cv2", "model.4.m.1.cv2"]
    assert removed(selection) == (dict.fromkeys(group, 16))


def test_layers_that_no_entry_asks_for_say_so() -> None:
    _, plan, spaces = select([{"sparsity": 0.5, "op_names": ["model.1"]}])
    policy = PrunePolicy(0.0, plan=plan)
    reasons = {BLOCKS[s.producers[0]].name: keep_reason(s, SCORES, policy) for s in spaces.spaces}
    assert reasons["model.1"] is None and reasons["model.3"] == KeepReason.NOT_CONFIGURED
    assert reasons["model.24.m.0"] == KeepReason.FEEDS_YOLO


def test_a_share_of_a_layer_that_a_slice_cuts_is_of_the_whole_layer() -> None:
    blocks = with_module("C2f", [24])
    spaces = find_spaces(blocks)
    first = next(i for i, b in enumerate(blocks) if b.name == "model.2.cv1")
    scores = {i: np.random.default_rng(i).random(b.channels) for i, b in enumerate(blocks) if b.has_gamma}
    plan = make_plan([{"sparsity": 0.5, "op_names": ["model.2.cv1"]}], blocks)
    selection = select_masks(spaces, scores, PrunePolicy(0.0, plan=plan))
    assert np.array_equal(selection.of(spaces, first), scores[first] > np.sort(scores[first])[11])


def test_a_batch_norm_over_a_concat_follows_the_convolutions_in_front_of_it() -> None:
    blocks = with_module("BottleneckCSP", [24])
    network, spaces = alive(blocks), find_spaces(blocks)
    scores = {i: np.random.default_rng(i).random(b.channels) for i, b in enumerate(blocks) if b.has_gamma}
    plan = make_plan([{"sparsity": 0.5, "op_names": ["model.2.cv2"]}], blocks)
    selection = select_masks(spaces, scores, PrunePolicy(0.0, plan=plan))
    second = next(i for i, b in enumerate(blocks) if b.name == "model.2.cv2")
    assert (~selection.of(spaces, second)).sum() == 6 and (~selection.mask).sum() == 6
    assert_oracle(blocks, network, selection.mask, spaces)


def test_oracle_of_a_plan() -> None:
    blocks = small()
    network, spaces = alive(blocks), find_spaces(blocks)
    entries = [
        {"sparsity": 0.4, "op_types": ["default"]}, {"total_sparsity": 0.6, "max_sparsity_per_layer": 0.7, "op_partial_names": ["model.4"]},
        {"exclude": True, "op_names": ["model.6.cv2"]},
    ]  # fmt: skip
    plan = make_plan(entries, blocks)
    spaces = spaces.keeping(plan.excluded, KeepReason.EXCLUDED)
    scores = {i: np.random.default_rng(i).random(b.channels) for i, b in enumerate(blocks) if b.has_gamma}
    assert_oracle(blocks, network, select_masks(spaces, scores, PrunePolicy(0.0, plan=plan, divisor=4)).mask, spaces)


def test_scaling_multiplies_every_share_below_one() -> None:
    plan = make_plan([{"sparsity": 0.4, "op_names": ["model.1"]}, {"sparsity": 0.8, "op_names": ["model.3"]}], BLOCKS)
    assert [q.ratio for q in plan.scaled(0.5).quotas] == [0.2, 0.4]
    assert [q.ratio for q in plan.scaled(plan.most).quotas] == [0.9999, 0.9999]


def test_yaml_and_json_say_the_same(tmp_path: Path) -> None:
    entries = [{"sparsity_per_layer": 0.5, "op_names": ["model.1"]}, {"exclude": True, "op_names": ["model.9"]}]
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(entries))
    (tmp_path / "c.json").write_text(json.dumps(entries))
    assert read_plan(tmp_path / "c.yaml", BLOCKS) == read_plan(tmp_path / "c.json", BLOCKS) == make_plan(entries, BLOCKS)


WRONG = {
    "an unknown key": ([{"sparsityy": 0.5, "op_names": ["model.1"]}], "entry 1: unknown key 'sparsityy'; did you mean sparsity"),
    "no amount": ([{"op_names": ["model.1"]}], "exactly one of sparsity, sparsity_per_layer, total_sparsity"),
    "two amounts": ([{"sparsity": 0.5, "total_sparsity": 0.5, "op_names": ["model.1"]}], "it has sparsity, total_sparsity"),
    "a share of 1": ([{"sparsity": 1, "op_names": ["model.1"]}], "sparsity must be a number of at least 0 and below 1, got 1"),
    "a share that is text": ([{"sparsity": "half", "op_names": ["model.1"]}], "got 'half'"),
    "a cap without a total": ([{"sparsity": 0.5, "max_sparsity_per_layer": 0.6, "op_names": ["model.1"]}], "goes with total_sparsity"),
    "no layers": ([{"sparsity": 0.5}], "names no layers"),
    "a name that is none": ([{"sparsity": 0.5, "op_names": ["model.4.cv9"]}], "'model.4.cv9', which is no layer.*did you mean .*model.4.cv"),
    "a part that is none": ([{"sparsity": 0.5, "op_partial_names": ["model.44"]}], "part of no layer's name; did you mean model.4"),
    "a type that is none": ([{"sparsity": 0.5, "op_types": ["Conv3d"]}], "'Conv3d'; did you mean Conv2d"),
    "no list of names": ([{"sparsity": 0.5, "op_names": "model.1"}], "op_names must be a list of names, got 'model.1'"),
    "nothing in common": ([{"sparsity": 0.5, "op_names": ["model.1"], "op_partial_names": ["cv3"]}], "no layer meets op_names and op_partial_names"),
    "excluding and pruning": ([{"exclude": True, "sparsity": 0.5, "op_names": ["model.1"]}], "excludes and gives sparsity"),
    "exclude that is no bool": ([{"exclude": "yes", "op_names": ["model.1"]}], "true or false, got 'yes'"),
    "nothing but exclusions": ([{"exclude": True, "op_names": ["model.1"]}], "every entry excludes"),
    "a mapping": ({"sparsity": 0.5}, "expected a list of entries"),
    "an empty list": ([], "expected a list of entries"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_configs(case: str) -> None:
    entries, message = WRONG[case]
    with pytest.raises(InputError, match=message):
        make_plan(entries, BLOCKS, "--config c.yaml")


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text("[{")
    (tmp_path / "c.yaml").write_text("- {sparsity: [")
    for name in ("c.json", "c.yaml"):
        with pytest.raises(InputError, match=f"{name}: not readable"):
            read_plan(tmp_path / name, BLOCKS)
    with pytest.raises(InputError, match="--config: no file .*d.yaml"):
        read_plan(tmp_path / "d.yaml", BLOCKS)
