"""The pruning scripts with every way of judging channels and of saying how much: files, reports, refusals. No training."""

from __future__ import annotations

import json
import re
from importlib import import_module
from pathlib import Path

import pytest

from engine import prune_run
from models.blocks import Blocks, flops, parameters
from models.checkpoint import Model, load_model, save_model
from pruning.choices import CRITERIA, EQUALIZE
from tests.helpers import alive, small, without_pictures_and_timings, write_dataset
from utils import plots
from utils.errors import run_script


@pytest.fixture(autouse=True)
def neither_pictures_nor_timings(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take most of a script's time at this size, and are tested elsewhere."""
    without_pictures_and_timings(monkeypatch)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dataset and a checkpoint whose channels all matter."""
    root = tmp_path_factory.mktemp("work")
    write_dataset(root / "data", images=6)
    blocks = small()
    save_model(root / "full.pt", Model(blocks, alive(blocks).state_dict(), ("a", "b", "c"), imgsz=64))
    (root / "c.yaml").write_text("- {sparsity: 0.25, op_types: [Conv2d]}\n- {exclude: true, op_names: [model.6]}\n")
    return root


def prune(work: Path, script: str, name: str, *flags: object) -> Path:
    """Run a pruning script; the folder it was to write."""
    common = ["--weights", work / "full.pt", "--data", work / "data/data.yaml", "--device", "cpu", "--workers", 0, "--project", work]
    import_module(script).main([str(a) for a in [*common, "--name", name, *flags]])
    return work / name


def report(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_goes_through_a_script(criterion: str, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    thresholds: list[float | None] = []
    monkeypatch.setattr(plots, "plot_gamma_before_after", lambda before, after, threshold, path: thresholds.append(threshold))
    folder = prune(work, "slim_prune", f"by-{criterion}", "--percent", 0.4, "--criterion", criterion, "--calibration-batches", 1)
    r = report(folder)
    assert (r["criterion"], r["normalize"]) == (criterion, "none" if criterion in ("gamma", "random") else "mean")
    assert r["oracle"]["difference"] <= r["oracle"]["bound"] and r["oracle"]["changed"] > 0.1
    assert thresholds == [r["selection"]["threshold"] if criterion == "gamma" else None], "a line among |gamma| is a |gamma|"
    stem = "prune_0.4_keep_0.01_full" if criterion == "gamma" else f"prune_0.4_{criterion}_keep_0.01_full"
    assert {f"{stem}.cfg", f"{stem}.pt"} <= {p.name for p in folder.iterdir()}


@pytest.mark.parametrize("rule", EQUALIZE)
def test_every_rule_goes_through_a_script(rule: str, work: Path) -> None:
    r = report(prune(work, "prune", f"rule-{rule}", "--percent", 0.4, "--equalize", rule, "--normalize", "max", "--min-filters", 4))
    tied = [x for x in r["layers"] if x["name"] in ("model.2.cv1", "model.2.m.0.cv2")]
    assert len({x["after"] for x in tied}) == 1 and not tied[0]["kept"], "a rule of one's own takes the groups in"
    assert min(x["after"] for x in r["layers"]) >= 4 and r["policy"]["min_filters"] == 4


@pytest.mark.parametrize("script", ["prune", "shortcut_prune", "slim_prune", "slim_prune_8x"])
@pytest.mark.parametrize(("flag", "stage"), [("--target-flops", "flops"), ("--target-params", "params")])
def test_every_script_takes_a_budget(script: str, flag: str, stage: str, work: Path) -> None:
    extra = ["--divisor", 2] if script == "slim_prune_8x" else []
    folder = prune(work, script, f"{script}{flag}", flag, 0.6, *extra)
    r = report(folder)
    assert r["pruned"][stage] / r["before"][stage] == pytest.approx(0.6, rel=0.01), r["budget"]["reason"]
    assert r["budget"]["reached"] == r["pruned"][stage] and r["budget"]["reason"] == ""
    blocks = load_model(next(folder.glob("*.pt"))).blocks
    assert {"params": sum(parameters(blocks)), "flops": sum(flops(blocks, 64, 64))}[stage] == r["pruned"][stage]
    assert f"{stage}_0.6" in next(folder.glob("*.cfg")).name


def test_a_budget_of_latency_is_predicted_and_measured(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine is a formula here: a millisecond per MFLOP, and the layers' table says a tenth too little."""

    class Table:
        def predict(self, blocks: Blocks) -> float:
            return 0.9 * sum(flops(blocks, 64, 64)) / 1e6

    monkeypatch.setattr(prune_run.LayerTimes, "measure", lambda *args: Table())
    monkeypatch.setattr(prune_run, "network_ms", lambda blocks, *args: sum(flops(blocks, 64, 64)) / 1e6)
    r = report(prune(work, "slim_prune", "latency", "--target-latency", 0.6))
    budget = r["budget"]
    assert budget["reached"] == pytest.approx(r["pruned"]["flops"] / 1e6) == pytest.approx(0.6 * budget["before"], rel=0.03)
    assert budget["predicted"] == pytest.approx(0.9 * budget["reached"]) and budget["searches"] == 2 and budget["reason"] == ""


@pytest.mark.parametrize("script", ["prune", "shortcut_prune", "slim_prune", "slim_prune_8x"])
def test_every_script_takes_a_config(script: str, work: Path) -> None:
    r = report(prune(work, script, f"{script}-config", "--config", work / "c.yaml"))
    after = {x["name"]: x for x in r["layers"]}
    assert after["model.6.cv1"]["after"] == after["model.6.cv1"]["before"] and after["model.6.cv1"]["kept"] == "excluded by the user"
    assert after["model.7"]["after"] == after["model.7"]["before"] * 3 // 4 or script == "slim_prune_8x"
    assert r["policy"]["plan"][0]["ratio"] == 0.25 and r["selection"]["safe_percent"] is None


def test_a_config_with_a_budget_gives_proportions(work: Path) -> None:
    r = report(prune(work, "slim_prune", "proportions", "--config", work / "c.yaml", "--target-params", 0.5))
    assert r["pruned"]["params"] / r["before"]["params"] == pytest.approx(0.5, rel=0.01)


def test_recalibration_is_a_stage_of_its_own(work: Path) -> None:
    plain, again = (prune(work, "slim_prune", f"recalibrate-{n}", "--percent", 0.4, "--recalibrate", n) for n in (0, 2))
    r = report(again)
    assert "recalibrated" not in report(plain) and r["recalibrated"]["params"] == r["pruned"]["params"]
    a, b = (load_model(next(folder.glob("*.pt"))).state for folder in (plain, again))
    changed = {k.rpartition(".")[2] for k in a if not (a[k] == b[k]).all()}
    assert changed == {"running_mean", "running_var", "num_batches_tracked"}


@pytest.mark.parametrize("script", ["prune", "shortcut_prune", "slim_prune", "slim_prune_8x"])
def test_a_dry_run_tells_and_writes_nothing(script: str, work: Path, capsys: pytest.CaptureFixture) -> None:
    before = sorted(work.rglob("*"))
    folder = prune(work, script, f"{script}-dry", "--dry-run", "--criterion", "l2")
    out = capsys.readouterr().out
    assert not folder.exists() and sorted(work.rglob("*")) == before
    assert "model.4.cv3" in out and "criterion l2, normalised by mean" in out and "nothing was measured or written" in out
    assert re.search(r"parameters [\d,]+ -> [\d,]+ \(-\d", out)


WRONG = {
    "two budgets": (["--target-params", "0.5", "--target-flops", "0.5"], "--target-params and --target-flops: give one budget"),
    "a share and a budget": (["--percent", "0.5", "--target-flops", "0.5"], "a percentage and --target-flops"),
    "a share and a config": (["--percent", "0.5", "--config", "c.yaml"], "a percentage and --config"),
    "a budget above the model": (["--target-params", "9M"], "the model is at [0-9,]+ parameters already"),
    "a budget that is none": (["--target-flops", "half"], "--target-flops half: give the fraction that stays"),
    "no such config": (["--config", "none.yaml"], "--config: no file none.yaml"),
    "an entry of the head alone": (["--config", "{tmp}/head.yaml"], r"entry 1: every layer that it names stays whole \(model.*predictions"),
    "a file where the run is to be": (["--project", "{tmp}/head.yaml"], "the run folder cannot be made .*head.yaml is no folder"),
    "no filters": (["--min-filters", "0"], "--min-filters must be at least 1"),
    "negative batches": (["--recalibrate", "-1"], "--recalibrate -1"),
    "no batches for taylor": (["--criterion", "taylor", "--calibration-batches", "0"], "needs at least one batch"),
    "means of negative scores": (["--equalize", "geometric_mean", "--normalize", "standard"], "use mean or max"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_inputs(case: str, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    flags, message = WRONG[case]
    (tmp_path / "head.yaml").write_text("- {sparsity: 0.5, op_names: [model.14.m.0]}\n")
    with pytest.raises(SystemExit) as ended:
        run_script(lambda: prune(work, "slim_prune", "wrong", *(f.replace("{tmp}", str(tmp_path)) for f in flags)))
    error = capsys.readouterr().err
    assert ended.value.code == 2 and re.search(message, error), error
    assert len(error.strip().splitlines()) == 1 and not (work / "wrong").exists()


def test_a_config_of_a_tied_group_says_how_to_prune_it(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "tied.yaml").write_text("- {sparsity: 0.5, op_names: [model.2.m.0.cv2]}\n")
    with pytest.raises(SystemExit):
        run_script(lambda: prune(work, "prune", "tied", "--config", tmp_path / "tied.yaml"))
    assert re.search(
        r"stays whole \(model\.2\.m\.0\.cv2: tied by a shortcut.*; --equalize union prunes groups too\)", capsys.readouterr().err
    )
    assert not (work / "tied").exists()
