"""Layer pruning: which branches are residual, the oracle, exactness where the branch is silent, composition with channel pruning, the script."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.cut import Cut
from engine.depth_run import depth_cut
from engine.verdict import decision
from models.blocks import Block, Blocks, check, make, parameters
from models.cfg import read_cfg_text, write_cfg
from models.checkpoint import Model, load_model, read_structure, save_model
from models.network import Network
from pruning.criteria import gamma_scores
from pruning.depth import choose, plain_bottlenecks, remove, residuals, silenced
from pruning.masked import largest_difference, masked_network
from pruning.policy import PrunePolicy, select_masks
from pruning.spaces import find_spaces
from pruning.surgery import fold_constants, prune
from tests.helpers import ROOT, alive, small, stock, with_module, without_pictures_and_timings, write_dataset
from utils.errors import InputError, run_script

BACKBONE = ["model.2.m.0", "model.4.m.0", "model.4.m.1", "model.6.m.0", "model.6.m.1", "model.6.m.2", "model.8.m.0"]
IMAGES = torch.rand(2, 3, 64, 128, generator=torch.Generator().manual_seed(1))


def network_of(blocks: Blocks, state: dict) -> Network:
    network = Network(blocks).eval()
    network.load_state_dict(state)
    return network


def assert_cut(blocks: Blocks, state: dict, count: int, exclude: tuple[str, ...] = (), least: float = 0.1) -> Cut:
    """Cut `count` bottlenecks: the branches' removal moves the logits, and masked = pruned, also through a written cfg."""
    model = Model(blocks, state, ("a", "b", "c"), 64)
    cut = depth_cut(model, choose(blocks, state, count, exclude))
    moved, _ = largest_difference(network_of(blocks, state), cut.masked, IMAGES)
    assert moved > least, f"the removal moved the logits by {moved} only: this network proves nothing"
    again = read_cfg_text(write_cfg(cut.blocks), "cut")
    assert again == cut.blocks and set(cut.state) == set(Network(again).state_dict())
    difference, bound = largest_difference(cut.masked, network_of(again, cut.state), IMAGES)
    assert difference <= bound
    return cut


# ---- what is residual ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "count"), [
    ("yolov5n", 7), ("yolov5m", 14), ("yolov5l", 21), ("yolov5x", 28), ("hub/yolov5s6", 8), ("hub/yolov5-bifpn", 21), ("hub/yolov5s-ghost", 11),
    ("hub/yolov3", 23), ("hub/yolov3-spp", 23), ("hub/yolov5s-v3.0", 7), ("hub/yolov3-tiny", 0),
])  # fmt: skip
def test_residual_branches_of_the_stock_models(path: str, count: int) -> None:
    assert len(residuals(read_structure(ROOT / f"models/{path}.yaml"))) == count


def test_a_bottleneck_is_its_two_convolutions_and_the_add() -> None:
    blocks = stock("s")
    found = residuals(blocks)
    assert [r.name for r in found] == BACKBONE
    assert all([blocks[i].name for i in r.branch] == [f"{r.name}.cv1", f"{r.name}.cv2"] for r in found)
    assert all([blocks[i].name for i in r.last] == [f"{r.name}.cv2"] for r in found)
    first, second = found[1:3]
    assert blocks[first.identity].name == "model.4.cv1" and second.identity == first.shortcut
    assert plain_bottlenecks(blocks) == ["model.13.m.0", "model.17.m.0", "model.20.m.0", "model.23.m.0"]


def test_a_ghost_bottleneck_ends_in_two_batch_norms_and_one_with_stride_is_none() -> None:
    blocks = with_module("GhostBottleneck", [24, 3, 1])
    found = residuals(blocks)
    assert [r.name for r in found] == [f"model.2.{i}" for i in range(3)]
    assert [blocks[i].name for i in found[0].last] == ["model.2.0.conv.2.cv1", "model.2.0.conv.2.cv2"]
    assert residuals(with_module("GhostBottleneck", [24, 3, 2])) == []


def branching(extra_reader: bool = False, stride: int = 1, other_input: bool = False, norm: bool = True) -> Blocks:
    """x + f(x) with x = model.1 and f = model.2 and model.3, and something about it that may be wrong."""
    blocks = [Block("input", channels=3)]

    def conv(x: int, c: int = 8, k: int = 1, s: int = 1, bn: bool = True) -> int:
        blocks.append(
            Block("convolutional", f"model.{len(blocks) - 1}", (x,), c, k, s, k // 2, activation="silu", batch_norm=bn, bias=not bn)
        )
        return len(blocks) - 1

    def add(kind: str, *inputs: int, **fields: object) -> int:
        blocks.append(make(Block(kind, "", inputs, **fields), blocks))
        return len(blocks) - 1

    stem = conv(0, s=2)
    x = conv(stem)
    y = conv(x, s=stride)
    if stride > 1:
        y = add("upsample", y, stride=stride)
    y = conv(add("route", y, stem) if other_input else y, bn=norm)
    s = add("shortcut", y, x)
    head = conv(add("route", s, y) if extra_reader else s, 21, bn=False)
    blocks[-1] = replace(blocks[-1], name="model.9.m.0", activation="linear")
    blocks.append(Block("yolo", "model.9", (head,), 21, anchors=((8.0, 9.0), (16.0, 12.0), (30.0, 40.0)), classes=2))
    return check(blocks)


def test_what_reads_more_or_is_read_by_more_is_left_alone() -> None:
    assert len(residuals(branching())) == 1
    for wrong in ({"extra_reader": True}, {"stride": 2}, {"other_input": True}, {"norm": False}):
        assert residuals(branching(**wrong)) == [], wrong


def test_a_branch_without_a_path_of_its_own_is_named_after_its_last_block() -> None:
    (found,) = residuals(branching())
    assert found.name == "model.3"


# ---- the oracle ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3, 7])
def test_masked_equals_pruned_on_yolov5n(count: int) -> None:
    blocks = stock("n", 3)
    cut = assert_cut(blocks, alive(blocks).state_dict(), count)
    removed = cut.report["removed"]
    assert len(removed) == count and [n for n in BACKBONE if n not in removed] == [r.name for r in residuals(cut.blocks)]
    gone = sum(b["parameters"] for b in cut.report["bottlenecks"] if b["removed"])
    assert sum(parameters(blocks)) - sum(parameters(cut.blocks)) == gone


@pytest.mark.parametrize("path", ["hub/yolov5n6", "hub/yolov5s-ghost", "hub/yolov5s-v3.0"])
def test_masked_equals_pruned_on_other_architectures(path: str) -> None:
    blocks = read_structure(ROOT / f"models/{path}.yaml", 3)
    assert_cut(blocks, alive(blocks, size=128).state_dict(), 4)


@pytest.mark.parametrize("module", ["C3", "C2f", "BottleneckCSP", "C3Ghost"])
def test_masked_equals_pruned_on_chains_of_every_module(module: str) -> None:
    blocks = with_module(module, [24, True])
    state = alive(blocks).state_dict()
    every = len(residuals(blocks))
    assert every == 3
    for count in range(1, every + 1):
        assert_cut(blocks, state, count)


def test_nested_residuals_go_once() -> None:
    """x + g(x + f(x)): with the outer branch the inner one is gone, and is not counted."""
    blocks = [Block("input", channels=3)]
    for i, (x, k, s) in enumerate([(0, 3, 2), (1, 3, 1), (2, 1, 1)]):
        blocks.append(Block("convolutional", f"model.{i}.cv", (x,), 8, k, s, k // 2, activation="silu", batch_norm=True))
    blocks.append(make(Block("shortcut", "", (3, 2)), blocks))
    blocks.append(Block("convolutional", "model.5.cv", (4,), 8, 3, 1, 1, activation="silu", batch_norm=True))
    blocks.append(make(Block("shortcut", "", (5, 1)), blocks))
    blocks.append(Block("convolutional", "model.9.m.0", (6,), 21, bias=True))
    blocks.append(Block("yolo", "model.9", (7,), 21, anchors=((8.0, 9.0), (16.0, 12.0), (30.0, 40.0)), classes=2))
    blocks = check(blocks)
    state = alive(blocks).state_dict()
    inner, outer = residuals(blocks)
    for name, value in ((blocks[inner.last[0]].name, 0.9), (blocks[outer.last[0]].name, 0.5)):
        state[f"{name}.bn.weight"] = torch.full((8,), value)
    verdicts = choose(blocks, state, 1)
    assert [v.removed for v in verdicts] == [False, True] and verdicts[0].note == f"gone with {outer.name}"
    cut = assert_cut(blocks, state, 1)
    assert [b.name for b in cut.blocks if b.kind == "convolutional"] == ["model.0.cv", "model.9.m.0"]
    with pytest.raises(InputError, match="only 1 can be removed"):
        choose(blocks, state, 2)
    for value in (0.9, 0.5):
        state[f"{blocks[outer.last[0]].name}.bn.weight"] = torch.full((8,), 2 - value)
    assert_cut(blocks, state, 2)


def test_a_branch_whose_last_gammas_are_zero_is_removed_without_a_trace() -> None:
    """The constants are right: in YOLOv5 only 1x1 convolutions read a shortcut, so nothing changes anywhere."""
    blocks = stock("n", 3)
    state = alive(blocks).state_dict()
    for name in ("model.4.m.0", "model.4.m.1", "model.6.m.1"):
        state[f"{name}.cv2.bn.weight"].zero_()
    original = network_of(blocks, state)
    cut = assert_cut(blocks, state, 3, least=-1)
    assert cut.report["removed"] == ["model.4.m.0", "model.4.m.1", "model.6.m.1"]
    difference, bound = largest_difference(original, network_of(cut.blocks, cut.state), IMAGES)
    assert difference <= bound
    found = [r for r in residuals(blocks) if r.name in cut.report["removed"]]
    unfolded = network_of(*remove(blocks, state, found))
    assert largest_difference(original, unfolded, IMAGES)[0] > 0.1, "without the folding it would have left one"


def test_the_lowest_mean_gamma_goes_first_and_ties_by_order() -> None:
    blocks = stock("n", 3)
    state = Network(blocks).state_dict()
    for i, name in enumerate(BACKBONE):
        sign = torch.ones_like(state[f"{name}.cv2.bn.weight"])
        sign[::2] = -1
        state[f"{name}.cv2.bn.weight"] = sign * [3, 1, 2, 0.5, 2, 1, 4][i]
    order = [next(v.residual.name for v in choose(blocks, state, n) if v.removed and v.residual.name not in _removed(blocks, state, n - 1))
             for n in range(1, 8)]  # fmt: skip
    assert order == [BACKBONE[i] for i in (3, 1, 5, 2, 4, 0, 6)]


def _removed(blocks: Blocks, state: dict, count: int) -> set[str]:
    return {v.residual.name for v in choose(blocks, state, count) if v.removed} if count else set()


def test_exclude_names_paths_and_globs() -> None:
    blocks = stock("n", 3)
    state = Network(blocks).state_dict()
    assert [v.note != "" for v in choose(blocks, state, 1, ("model.4", "model.6.m.1.cv2"))] == [
        False,
        True,
        True,
        False,
        True,
        False,
        False,
    ]
    assert [v.note != "" for v in choose(blocks, state, 1, ("model.*.m.0",))] == [True, True, False, True, False, False, True]
    with pytest.raises(InputError, match="--exclude model.13: matches no bottleneck with a shortcut; those of this model are model.2.m.0"):
        choose(blocks, state, 1, ("model.13",))
    with pytest.raises(InputError, match="--shortcuts 6: only 5 can be removed; the model has 7 bottlenecks .*, of which 2 are excluded"):
        choose(blocks, state, 6, ("model.4",))


# ---- with channel pruning ------------------------------------------------------------------------------------------------------


def assert_channels_cut(blocks: Blocks, state: dict, policy: PrunePolicy) -> tuple[Blocks, dict]:
    """Cut channels, masked = pruned; the narrow blocks and tensors."""
    spaces = find_spaces(blocks)
    mask = select_masks(spaces, gamma_scores(blocks, state), policy).mask
    folded = fold_constants(blocks, state, spaces, mask)
    narrow = prune(blocks, folded, spaces, mask)
    assert largest_difference(network_of(blocks, state), network_of(*narrow), IMAGES)[0] > 0.1
    difference, bound = largest_difference(masked_network(blocks, folded, spaces, mask), network_of(*narrow), IMAGES)
    assert difference <= bound
    return narrow


def test_it_composes_with_channel_pruning_in_both_orders() -> None:
    blocks = stock("n", 3)
    state = alive(blocks).state_dict()
    policy = PrunePolicy(0.4, "union", 0.01, 8)
    first = assert_cut(*assert_channels_cut(blocks, state, policy), 3)
    shallow = assert_cut(blocks, state, 3)
    narrow, _ = assert_channels_cut(shallow.blocks, shallow.state, policy)
    for cut in (first.blocks, narrow):
        assert len(residuals(cut)) == 4 and sum(parameters(cut)) < 0.75 * sum(parameters(blocks))
        assert all(b.channels % 8 == 0 for b in cut if b.kind == "convolutional" and not b.bias)
    assert {r.name for r in residuals(narrow)} == set(BACKBONE) - set(shallow.report["removed"])


def test_a_concat_may_read_the_same_block_twice_afterwards() -> None:
    """C2f reads every add: with all of them gone it reads its second half again and again, and channels can still be cut."""
    blocks = with_module("C2f", [24, True])
    cut = assert_cut(blocks, alive(blocks).state_dict(), 3)
    route = next(b for b in cut.blocks if b.kind == "route" and len(b.inputs) == 5)
    assert len(set(route.inputs)) == 2
    assert_channels_cut(cut.blocks, cut.state, PrunePolicy(0.4))


def test_silencing_touches_nothing_but_the_last_convolutions() -> None:
    blocks = stock("n", 3)
    found = residuals(blocks)[1:3]
    spaces, mask = silenced(blocks, found)
    assert [len(c) for c in spaces.channels] == [b.channels for b in blocks] and len(
        np.unique(np.concatenate(spaces.channels))
    ) == spaces.count
    off = [b.name for b, ids in zip(blocks, spaces.channels) if not mask[ids].any()]
    assert off == ["model.4.m.0.cv2", "model.4.m.1.cv2"] and (~mask).sum() == sum(blocks[r.last[0]].channels for r in found)


# ---- the script ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def neither_pictures_nor_timings(monkeypatch: pytest.MonkeyPatch) -> None:
    without_pictures_and_timings(monkeypatch, keep=("plot_widths",))


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("depth")
    write_dataset(root / "data", images=4)
    blocks = small()
    save_model(root / "full.pt", Model(blocks, alive(blocks).state_dict(), ("a", "b", "c"), imgsz=64))
    return root


def call(work: Path, script: str, name: str, *flags: object, weights: Path | None = None) -> Path:
    common = [
        "--weights",
        weights or work / "full.pt",
        "--data",
        work / "data/data.yaml",
        "--device",
        "cpu",
        "--workers",
        0,
        "--project",
        work,
    ]
    import_module(script).main([str(a) for a in [*common, "--name", name, *flags]])
    return work / name


def test_the_script_writes_a_pair_that_other_scripts_take(work: Path) -> None:
    folder = call(work, "layer_prune", "one", "--shortcuts", 1, "--recalibrate", 1)
    r = json.loads((folder / "report.json").read_text())
    assert len(r["removed"]) == r["shortcuts"] == 1 and r["removed"][0] in {b["name"] for b in r["bottlenecks"]}
    assert r["oracle"]["difference"] <= r["oracle"]["bound"] and "recalibrated" in r and r["pruned"]["params"] < r["before"]["params"]
    assert {x["name"] for x in r["layers"] if x["after"] == 0} == {f"{r['removed'][0]}.cv1", f"{r['removed'][0]}.cv2"}
    assert (folder / "widths.png").stat().st_size > 0
    pair = folder / "prune_1_shortcut_full.pt"
    assert load_model(pair).blocks == read_structure(pair.with_suffix(".cfg"))
    again = call(work, "slim_prune_8x", "then-channels", "--percent", 0.4, weights=pair)
    report = json.loads((again / "report.json").read_text())
    assert report["oracle"]["difference"] <= report["oracle"]["bound"] and r["removed"][0] + ".cv1" not in {
        x["name"] for x in report["layers"]
    }


def test_the_report_speaks_of_bottlenecks(work: Path) -> None:
    folder = call(work, "layer_prune", "report", "--shortcuts", 2, "--exclude", "model.2")
    r = json.loads((folder / "report.json").read_text())
    assert decision(r).startswith("2 bottlenecks are gone (model.4.m.0, model.4.m.1); ") and decision(
        {**r, "removed": r["removed"][:1]}
    ).startswith("One bottleneck is gone (model.4.m.0); ")
    page = (folder / "report.html").read_text()
    for words in (
        "Removing bottlenecks must equal silencing them",
        "Every bottleneck with a shortcut",
        "excluded by the user",
        "prune_2_shortcut_full",
    ):
        assert words in page, words
    assert page.count("<b>removed</b>") == 2


def test_the_script_takes_what_slim_prune_wrote(work: Path) -> None:
    narrow = call(work, "slim_prune", "narrow", "--percent", 0.4)
    r = json.loads(
        (call(work, "layer_prune", "then-layers", "--shortcuts", 2, weights=next(narrow.glob("*.pt"))) / "report.json").read_text()
    )
    assert len(r["removed"]) == 2 and r["oracle"]["difference"] <= r["oracle"]["bound"] and r["oracle"]["changed"] > 0.1


def test_a_dry_run_shows_every_candidate_and_writes_nothing(work: Path, capsys: pytest.CaptureFixture) -> None:
    folder = call(work, "layer_prune", "dry", "--shortcuts", 1, "--dry-run", "--exclude", "model.2")
    out = capsys.readouterr().out
    assert not folder.exists() and "nothing was measured or written" in out
    rows = {line.split()[0]: line for line in out.splitlines() if line.startswith("model.")}
    assert rows["model.2.m.0"].endswith("stays: excluded by the user") and set(rows) == {"model.2.m.0", "model.4.m.0", "model.4.m.1"}
    assert sum(line.endswith("removed") for line in rows.values()) == 1
    assert "left alone: 2 bottlenecks without a shortcut (model.10.m.0, model.13.m.0)" in out


@pytest.mark.parametrize(("flags", "message"), [
    (("--shortcuts", 0), "--shortcuts 0: the number of bottlenecks to remove, at least 1"),
    (("--shortcuts", 9), "--shortcuts 9: only 3 can be removed; the model has 3 bottlenecks with a shortcut"),
    (("--exclude", "model.99"), "--exclude model.99: matches no bottleneck"),
])  # fmt: skip
def test_wrong_inputs(flags: tuple, message: str, work: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        run_script(lambda: call(work, "layer_prune", "wrong", *flags))
    error = capsys.readouterr().err
    assert ended.value.code == 2 and message in error and len(error.strip().splitlines()) == 1 and not (work / "wrong").exists()


def test_a_model_without_shortcuts_is_told_so() -> None:
    blocks = with_module("C3", [24, False])
    with pytest.raises(InputError, match="no bottleneck with a shortcut, so no layer can be removed"):
        choose(blocks, Network(blocks).state_dict(), 1)
