"""What each layer can lose: masks of one layer, tolerated shares, the config that is written, a run that is cut short, refusals."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sensitivity
import slim_prune
from engine import sensitivity as engine
from engine import sensitivity_report
from engine.evaluate import evaluate
from engine.prune_bench import make_bench
from engine.sensitivity import Study
from models.blocks import Blocks
from models.checkpoint import Model, load_model, save_model
from pruning.criteria import scores_of
from pruning.layerwise import config_list, mask_alone, prunable_layers, tolerated
from pruning.plan import make_plan
from pruning.policy import PrunePolicy, Selector
from pruning.spaces import KeepReason, find_spaces
from tests.helpers import alive, random_blocks, small, with_module, without_pictures_and_timings, write_dataset
from utils.errors import run_script
from utils.flags import add_size, parser, typed
from utils.heatmap import plot_sensitivity

# One layer alone

NETWORKS = {
    "small": small(), "csp": with_module("BottleneckCSP", [32]), "c2f": with_module("C2f", [32, True]), "ghost": with_module("C3Ghost", [32]),
    **{f"random{seed}": random_blocks(seed) for seed in range(6)},
}  # fmt: skip


def layers_of(blocks: Blocks, equalize: str = "union") -> tuple:
    spaces, scores = find_spaces(blocks), scores_of(blocks, alive(blocks).state_dict(), "gamma")
    policy = PrunePolicy(0.0, equalize)
    return spaces, scores, policy, prunable_layers(blocks, spaces, scores, policy)


@pytest.mark.parametrize("name", NETWORKS)
def test_layers_share_the_prunable_channels_out(name: str) -> None:
    spaces, scores, policy, layers = layers_of(NETWORKS[name])
    free = np.concatenate([s.classes for s in Selector(spaces, scores, policy).free])
    assert sorted(np.concatenate([layer.classes for layer in layers])) == sorted(free), "each prunable class is in one layer"
    members = [m for layer in layers for m in layer.members]
    assert len(members) == len(set(members)) and all(layer.name == layer.members[0] for layer in layers)


def test_a_group_tied_by_a_shortcut_is_one_layer() -> None:
    layers = {layer.name: layer for layer in layers_of(small())[3]}
    assert layers["model.2.cv1"].members == ("model.2.cv1", "model.2.m.0.cv2") and layers["model.2.cv1"].width == 8
    assert layers["model.1"].members == ("model.1",)
    assert not any(name.startswith("model.14") for name in layers), "the head stays whole"


@pytest.mark.parametrize("equalize", ["union", "first", "intersection", "arithmetic_mean", "geometric_mean"])
@pytest.mark.parametrize("name", NETWORKS)
def test_pruned_alone_is_what_the_config_does(name: str, equalize: str) -> None:
    """The masks of the layers pruned alone, put together, are the mask of the config that lists them all."""
    blocks = NETWORKS[name]
    spaces, scores, policy, layers = layers_of(blocks, equalize)
    ratios = [(0.3, 0.5, 0.0, 0.7)[i % 4] for i in range(len(layers))]
    expected = np.ones(spaces.count, dtype=bool)
    for layer, ratio in zip(layers, ratios):
        mask = mask_alone(layer, ratio, spaces, scores, policy)
        assert np.delete(mask, layer.classes).all(), "nothing else is pruned"
        expected &= mask
    plan = make_plan(config_list(layers, ratios), blocks)
    kept = spaces.keeping(plan.excluded, KeepReason.EXCLUDED)
    assert not expected.all()
    np.testing.assert_array_equal(Selector(kept, scores, replace(policy, plan=plan)).select().mask, expected)


@pytest.mark.parametrize(
    ("drops", "tolerance", "share"),
    [
        ([0.0, 0.0, 0.0], 0.01, 0.6),  # nothing beyond the last measured ratio
        ([0.02, 0.04, 0.5], 0.01, 0.1),  # between nothing and the first
        ([0.0, 0.01, 0.03], 0.02, 0.5),
        ([0.0, 0.01, 0.03], 0.01, 0.4),
        ([0.03, 0.0, 0.05], 0.01, 0.066),  # a lucky larger ratio does not excuse a smaller one
        ([-0.01, -0.02, 0.01], 0.0, 0.4),  # a gain counts as no loss
        ([0.1, 0.2, 0.3], 0.0, 0.0),
    ],
)
def test_tolerated(drops: list[float], tolerance: float, share: float) -> None:
    assert tolerated((0.2, 0.4, 0.6), drops, tolerance) == pytest.approx(share, abs=1e-12)


def test_a_share_below_one_channel_excludes() -> None:
    layers = {layer.name: layer for layer in layers_of(small())[3]}
    tied, alone = layers["model.2.cv1"], layers["model.1"]
    assert config_list([tied, alone], [0.124, 0.5]) == [
        {"sparsity_per_layer": 0.5, "op_names": ["model.1"]}, {"exclude": True, "op_names": ["model.2.cv1", "model.2.m.0.cv2"]},
    ]  # fmt: skip


# Runs


@pytest.fixture(autouse=True)
def neither_pictures_nor_timings_of_prunings(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are tested elsewhere, and take most of a script's time at this size."""
    without_pictures_and_timings(monkeypatch)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose channels all matter, and images labelled by what it finds in them: its mAP is high, and a cut costs some of it."""
    root = tmp_path_factory.mktemp("work")
    data = write_dataset(root / "data", images=6)
    blocks = small()
    network = alive(blocks)
    save_model(root / "full.pt", Model(blocks, network.state_dict(), ("a", "b", "c"), imgsz=64))
    model = load_model(root / "full.pt")
    bench = make_bench(model, "full.pt", str(data), 64, 16, torch.device("cpu"), 0)

    def label(path: Path, shape: tuple[int, int], found: np.ndarray) -> None:
        """The four surest detections."""
        boxes, classes = found[:4, :4].clip(0, 64) / 64, found[:4, 5].astype(int)
        rows = [f"{c} {(x0 + x1) / 2:.5f} {(y0 + y1) / 2:.5f} {x1 - x0:.5f} {y1 - y0:.5f}\n" for c, (x0, y0, x1, y1) in zip(classes, boxes)]
        (root / "data/labels/val" / f"{path.stem}.txt").write_text("".join(rows))

    evaluate(model.network(), bench.loader, bench.precision, on_image=label)
    return root


def study(work: Path, *flags: object, name: str = "exp") -> Path:
    """Run the script; the folder it was to write."""
    common = ["--weights", work / "full.pt", "--data", work / "data/data.yaml", "--device", "cpu", "--workers", 0, "--ratios", 0.5, 0.25]
    sensitivity.main([str(a) for a in [*common, "--project", work, "--name", name, *flags]])
    return work / name


@pytest.fixture(scope="module")
def finished(work: Path) -> Path:
    return study(work, "--drop", 0.02)


def results(folder: Path) -> dict:
    return json.loads((folder / "sensitivity.json").read_text())


def test_the_results(finished: Path) -> None:
    r = results(finished)
    layers = {row["name"]: row for row in r["layers"]}
    assert r["ratios"] == [0.25, 0.5] and r["criterion"] == "gamma" and r["images"] == 6 and r["imgsz"] == 64
    assert layers["model.2.cv1"]["members"] == ["model.2.cv1", "model.2.m.0.cv2"]
    cells = layers["model.1"]["cells"]
    assert (
        [cell["kept"] for cell in cells] == [12, 8] and cells[0]["params"] > cells[1]["params"] and cells[0]["flops"] < r["full"]["flops"]
    )
    for row in r["layers"]:
        drops = [cell["drop"] for cell in row["cells"]]
        assert drops == pytest.approx([r["base"]["map50"] - cell["map50"] for cell in row["cells"]], abs=1e-8)
        share = tolerated(r["ratios"], drops, 0.02)
        assert row["share"] == (share if share * row["channels"] >= 1 else 0)
    assert len({cell["map50"] for row in r["layers"] for cell in row["cells"]}) > 10, "layers and ratios differ"
    assert any(row["share"] for row in r["layers"]) and not all(row["share"] for row in r["layers"])
    with Image.open(finished / "sensitivity.png") as picture:
        assert min(picture.size) > 300


@pytest.mark.parametrize("batches", [0, 1])
def test_a_cell_is_the_map_of_the_pruned_network(batches: int, finished: Path, work: Path) -> None:
    """One layer cut, measured by slim_prune.py with a config of one entry: the same figures, recalibrated or not."""
    options = engine.SensitivityOptions(str(work / "full.pt"), str(work / "data/data.yaml"), recalibrate=batches, device="cpu", workers=0)
    one = engine._prepare(options)
    layer = next(layer for layer in one.layers if layer.name == "model.4.cv2")
    cell = one.measure(one.cut(one.mask(layer, 0.5)), recalibrated=bool(batches))
    (work / "one.json").write_text(json.dumps([{"sparsity": 0.5, "op_names": ["model.4.cv2"]}]))
    report = prune(work, f"one{batches}", "--config", work / "one.json", "--recalibrate", batches)
    figures = report["recalibrated" if batches else "pruned"]
    assert figures["map50"] == pytest.approx(cell["map50"], abs=1e-6) and cell["map50"] > 0
    assert (figures["params"], figures["flops"]) == (cell["params"], cell["flops"])
    if not batches:
        own = {row["name"]: row for row in results(finished)["layers"]}["model.4.cv2"]["cells"][1]
        assert own == {"ratio": 0.5, "kept": 4, **cell, "drop": own["drop"]}


def prune(work: Path, name: str, *flags: object) -> dict:
    common = ["--weights", work / "full.pt", "--data", work / "data/data.yaml", "--device", "cpu", "--workers", 0, "--project", work]
    slim_prune.main([str(a) for a in [*common, "--name", name, *flags]])
    return json.loads((work / name / "report.json").read_text())


def test_the_results_are_a_config(finished: Path, work: Path) -> None:
    report = prune(work, "by-config", "--config", finished / "sensitivity.json")
    after = {x["name"]: x for x in report["layers"]}
    for row in results(finished)["layers"]:
        layer = after[row["name"]]
        if len(row["members"]) == 1:
            assert layer["after"] == layer["before"] - int(layer["before"] * row["share"] + 1e-9), row["name"]
        assert bool(layer["kept"]) == (row["share"] == 0)


def test_a_run_that_is_cut_short_goes_on(finished: Path, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after a few networks, and with a line cut in the middle: the same json, and nothing is measured twice."""
    counted, measure = [], Study.measure

    def stopping(self: Study, *args: object) -> dict:
        counted.append(1)
        if len(counted) > 7:
            raise KeyboardInterrupt
        return measure(self, *args)

    monkeypatch.setattr(Study, "measure", stopping)
    with pytest.raises(KeyboardInterrupt):
        study(work, "--drop", 0.02, name="cut")
    log = work / "cut/measured.jsonl"
    assert not (work / "cut/sensitivity.json").exists()
    first = log.read_text()
    log.write_text(first + '{"layer": "model.1", "rat')

    monkeypatch.setattr(Study, "measure", lambda self, *args: counted.append(2) or measure(self, *args))
    study(work, "--drop", 0.02, "--resume", work / "cut")
    assert (work / "cut/sensitivity.json").read_bytes() == (finished / "sensitivity.json").read_bytes()
    whole = results(finished)
    pruning = sum(cell["kept"] < row["channels"] for row in whole["layers"] for cell in row["cells"])
    assert counted.count(2) == pruning - 6, "the full network and six cuts were measured before"
    assert log.read_text().startswith(first) and log.read_text() == (finished / "measured.jsonl").read_text()


def test_a_finished_run_takes_another_tolerance(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = results(finished)
    monkeypatch.setattr(Study, "measure", lambda *args: pytest.fail("measured again"))
    sensitivity.main(["--resume", str(finished), "--drop", "0.2"])
    after = results(finished)
    assert (
        all(b["share"] <= a["share"] for b, a in zip(before["layers"], after["layers"])) and before["config_list"] != after["config_list"]
    )
    sensitivity.main(["--resume", str(finished), "--drop", "0.02"])
    assert results(finished) == before


def test_a_dry_run_writes_nothing(work: Path, capsys: pytest.CaptureFixture) -> None:
    before = sorted(work.rglob("*"))
    study(work, "--dry-run", "--exclude", "model.4", name="dry")
    out = capsys.readouterr().out
    assert sorted(work.rglob("*")) == before and re.search(r"model\.2\.cv1 +8  model\.2\.m\.0\.cv2", out) and "model.4.cv1" not in out


def test_images_are_spread_evenly(work: Path) -> None:
    options = engine.SensitivityOptions(str(work / "full.pt"), str(work / "data/data.yaml"), images=3, device="cpu", workers=0)
    labels = engine._prepare(options).bench.labels
    assert [path.stem for path in labels.images] == ["000", "002", "005"] and len(labels.labels) == len(labels.sizes) == 3


def test_a_tied_group_and_many_layers_are_told_in_short() -> None:
    cells = lambda k: [{"ratio": 0.5, "drop": k / 100}]  # noqa: E731
    rows = [{"name": f"model.{k}", "members": ["a"] * (1 + k % 2), "channels": 8, "share": 0.5, "cells": cells(k)} for k in range(25)]
    lines = sensitivity_report.table(rows, (0.5,)).splitlines()
    assert (
        len(lines) == 22 and lines[1].startswith("model.24 ") and lines[2].startswith("model.23 (+1)") and lines[-1].startswith("model.0 ")
    )
    assert "5 layers between" in lines[11]


def test_the_heat_map_holds_many_layers(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    names = [f"model.{i}.m.{i % 3}.cv1" for i in range(90)]
    plot_sensitivity(names, (0.1, 0.5), rng.normal(0, 0.1, (90, 2)), [0.5] * 90, 0.4, tmp_path / "map.png")
    with Image.open(tmp_path / "map.png") as picture:
        assert picture.width > picture.height / 2


def test_typed_tells_what_was_given() -> None:
    p = parser("")
    p.add_argument("--a", default="x")
    p.add_argument("--b-c", action="store_true")
    add_size(p)
    assert typed(p, ["--a", "x", "--img", "64"]) == {"a", "imgsz"} and typed(p, []) == set() and typed(p, ["--b_c"]) == {"b_c"}


WRONG = {
    "no weights": (["--data", "d.yaml"], "--weights: give a checkpoint, or --resume"),
    "a ratio of one": (["--weights", "{work}/full.pt", "--ratios", "0.5", "1"], "--ratios 0.5 1: give shares above 0 and below 1"),
    "a negative drop": (["--weights", "{work}/full.pt", "--drop", "-1"], "--drop -1.0: must be at least 0"),
    "no such run": (["--resume", "{work}/none"], "--resume: no file .*measured.jsonl"),
    "another ratio": (["--resume", "{run}", "--ratios", "0.3"], r"was started with ratios \(0.25, 0.5\), not \(0.3,\)"),
    "another criterion": (["--resume", "{run}", "--criterion", "l1"], "was started with criterion 'gamma', not 'l1'"),
    "another file": (["--resume", "{tmp}"], "is not what sensitivity.py wrote"),
    "an old file": (["--resume", "{tmp}/old"], "was written by another version"),
    "an exclude of nothing": (
        ["--weights", "{work}/full.pt", "--data", "{work}/data/data.yaml", "--exclude", "model.99"], "--exclude model.99: matches no prunable",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_inputs(case: str, finished: Path, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    flags, message = WRONG[case]
    (tmp_path / "measured.jsonl").write_text('{"options": {}}\n{"layer": 1}\n')
    (tmp_path / "old").mkdir()
    (tmp_path / "old/measured.jsonl").write_text('{"options": {"weights": "x.pt"}}\n')
    places = {"{work}": work, "{run}": finished, "{tmp}": tmp_path}
    for place, path in places.items():
        flags = [flag.replace(place, str(path)) for flag in flags]
    with pytest.raises(SystemExit) as ended:
        run_script(lambda: sensitivity.main([*flags, "--project", str(tmp_path / "runs")]))
    error = capsys.readouterr().err
    assert ended.value.code == 2 and re.search(message, error), error
    assert len(error.strip().splitlines()) == 1 and not (tmp_path / "runs").exists()


def test_a_changed_checkpoint_is_not_gone_on_with(work: Path, tmp_path: Path) -> None:
    model = load_model(work / "full.pt")
    save_model(tmp_path / "w.pt", model)
    study(work, "--weights", tmp_path / "w.pt", "--exclude", "model.[1-9]*", name="changing")
    state = dict(model.state) | {"model.0.conv.weight": model.state["model.0.conv.weight"] * 2}
    save_model(tmp_path / "w.pt", replace(model, state=state))
    with pytest.raises(engine.InputError, match="have changed since"):
        sensitivity.main(["--resume", str(work / "changing")])


def test_a_network_that_finds_nothing_has_nothing_to_lose(work: Path, tmp_path: Path) -> None:
    model = load_model(work / "full.pt")
    state = {k: torch.zeros_like(v) if k.startswith("model.14") else v for k, v in model.state.items()}
    state |= {k: torch.full_like(v, -30.0) for k, v in model.state.items() if k.startswith("model.14") and k.endswith("bias")}
    save_model(tmp_path / "blind.pt", replace(model, state=state))
    with pytest.raises(engine.InputError, match="finds nothing in these 6 images"):
        study(work, "--weights", tmp_path / "blind.pt", name="blind")
    assert not (work / "blind").exists()
