"""compare.py: every figure is that of the run, lines of descent are found, what does not compare is said, labels do not lie on each other."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import yaml

from engine.compare import mismatches
from engine.options import TrainOptions
from engine.run_reader import RunFigures, locate
from models.checkpoint import Model, load_model, save_model
from tests.helpers import ROOT, SMALL_YAML, alive, small, write_dataset
from tests.test_html_report import Page
from tests.test_scripts import call
from utils.errors import InputError
from utils.files import megabytes
from utils.pareto import far, overlap, pareto_front, place_labels


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training, its pruned network, that one fine-tuned and measured: `train`, `cut`, `tuned`, `val`. The pruning and the measurements are
    real; the trainings are folders as `engine/session.py` leaves them (`test_real_trainings` makes them by training)."""
    root = tmp_path_factory.mktemp("runs")
    data = write_dataset(root / "data", images=4)
    common = ["--data", data, "--img", 64, "--batch", 4, "--workers", 0, "--device", "cpu", "--project", root]
    save_model(root / "base.pt", Model(small(), alive(small()).state_dict(), ("shape0", "shape1", "shape2"), 64))
    as_training(root, "train", root / "base.pt", TrainOptions(str(data), cfg="small.yaml", imgsz=64), common)
    call("slim_prune", "--weights", root / "train/weights/best.pt", "--percent", 0.5, *common, "--name", "cut")
    weights = next((root / "cut").glob("*.pt"))
    as_training(root, "tuned", weights, TrainOptions(str(data), str(weights), imgsz=64, strict=True), common)
    call("val", "--weights", root / "tuned/weights/best.pt", *common, "--name", "val")
    return root


def as_training(root: Path, name: str, weights: Path, options: TrainOptions, common: list) -> None:
    """Make `root/name` what a training leaves behind that ended with `weights`."""
    call("val", "--weights", weights, *common, "--name", name)
    metrics = json.loads((root / name / "metrics.json").read_text())
    own = {key: metrics[key] for key in metrics if key not in ("weights", "data", "task", "imgsz")}
    (root / name / "metrics.json").write_text(json.dumps(own))
    saved = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(options).items()}
    (root / name / "opt.yaml").write_text(yaml.safe_dump(saved, sort_keys=False))
    (root / name / "weights").mkdir()
    shutil.copy(weights, root / name / "weights/best.pt")


@pytest.mark.slow
def test_real_trainings(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", images=4)
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(SMALL_YAML))
    common = ["--data", data, "--img", 64, "--batch", 4, "--workers", 0, "--device", "cpu", "--project", tmp_path]
    call("train", "--cfg", tmp_path / "small.yaml", "--weights", "", "--epochs", 1, *common, "--name", "base")
    call("train_sparsity", "--weights", tmp_path / "base/weights/best.pt", "--sr", 0.01, "--epochs", 1, *common, "--name", "sparse")
    call("slim_prune", "--weights", tmp_path / "sparse/weights/last.pt", "--percent", 0.5, *common, "--name", "cut")
    weights = next((tmp_path / "cut").glob("*.pt"))
    call("finetune_pruned", "--weights", weights, "--epochs", 1, *common, "--name", "tuned")
    rows = compared(tmp_path, *(tmp_path / name for name in ("base", "sparse", "cut", "tuned")))
    assert [(r["label"], r["kind"], r["from"]) for r in rows] == [
        ("base", "trained", ""), ("sparse", "trained sparsely", "base"), ("cut", "pruned", "sparse"), ("tuned", "fine-tuned", "cut")
    ]  # fmt: skip
    metrics = json.loads((tmp_path / "tuned/metrics.json").read_text())
    assert all(rows[3][key] == metrics[key] for key in ("map50", "map", "params", "flops"))
    assert (
        rows[1]["checkpoint"].endswith("sparse/weights/last.pt") and load_model(weights).blocks == load_model(rows[3]["checkpoint"]).blocks
    )


def compared(out: Path, *arguments: object) -> list[dict]:
    call("compare", *arguments, "--project", out, "--device", "cpu", "--exist-ok")
    return json.loads((out / "exp/compare.json").read_text())["rows"]


def test_mixed_runs_in_one_table(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = compared(tmp_path, runs / "train", runs / "cut", runs / "tuned", runs / "val")
    sources = [
        json.loads((runs / name).read_text())
        for name in ("train/metrics.json", "cut/report.json", "tuned/metrics.json", "val/metrics.json")
    ]
    sources[1] = sources[1]["pruned"]
    assert [(r["label"], r["kind"], r["from"]) for r in rows] == [
        ("train", "trained", ""), ("cut", "pruned", "train"), ("tuned", "fine-tuned", "cut"), ("val", "validated", "tuned")
    ]  # fmt: skip
    for row, source in zip(rows, sources):
        assert all(row[key] == source[key] for key in ("map50", "map", "params", "flops", "images", "instances")), row["label"]
        assert row["size_mb"] == pytest.approx(megabytes(Path(row["checkpoint"])), rel=0.02) and row["ms_together"] and row["ms_size"] == 64
    assert rows[1]["ms"] == rows[2]["ms"] == rows[3]["ms"] != rows[0]["ms"], "equal structures are measured once"

    printed = capsys.readouterr().out
    assert "warning" not in printed and f"{rows[1]['params']:,} (−{1 - rows[1]['params'] / rows[0]['params']:.1%})" in printed
    lines = [line for line in printed.splitlines() if line.startswith(("run ", "train ", "cut ", "tuned ", "val "))]
    assert len({line.index(word) for line, word in zip(lines[1:], ("trained", "pruned", "fine-tuned", "validated"))}) == 1, "columns"
    assert (tmp_path / "exp/compare.png").stat().st_size > 10_000

    page = Page((tmp_path / "exp/compare.html").read_text(encoding="utf-8"))
    assert [row[0] for row in page.tables[0][1:]] == [r["label"] for r in rows] and len(page.of("img")) == 1
    assert [values[3] for values in page.values[0][1:]] == [r["map50"] for r in rows]
    markdown = (tmp_path / "exp/compare.md").read_text(encoding="utf-8").splitlines()
    assert len({line.count("|") for line in markdown[:6]}) == 1 and f"{rows[0]['map50']:.4f}" in markdown[2]


def test_the_network_before_is_a_row_unless_a_run_stands_for_it(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = compared(tmp_path, runs / "cut", "--no-latency", "--names", "half")
    written = json.loads((runs / "cut/report.json").read_text())
    assert [(r["label"], r["from"]) for r in rows] == [("train (before)", ""), ("half", "train (before)")]
    assert [r["params"] for r in rows] == [written[s]["params"] for s in ("before", "pruned")]
    assert [r["ms"] for r in rows] == [written[s]["latency_ms"]["64"] for s in ("before", "pruned")] and not rows[0]["ms_together"]
    assert "from the run itself" in capsys.readouterr().out
    alone = compared(tmp_path, runs / "cut", runs / "val", "--no-latency", "--no-before")
    assert [r["label"] for r in alone] == ["cut", "val"] and alone[1]["ms"] is None


def test_runs_that_were_moved_or_lost_their_weights(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    moved = Path(shutil.copytree(runs / "cut", tmp_path / "elsewhere/cut"))
    written = json.loads((moved / "report.json").read_text())
    written["pair"] = [f"gone/{Path(p).name}" for p in written["pair"]]
    (moved / "report.json").write_text(json.dumps(written))
    rows = compared(tmp_path, moved, "--no-before")
    assert Path(rows[0]["checkpoint"]).parent == moved and rows[0]["ms"] > 0
    next(moved.glob("*.pt")).unlink()
    rows = compared(tmp_path, moved, "--no-before")
    assert rows[0]["checkpoint"] is None and rows[0]["ms"] == written["pruned"]["latency_ms"]["64"]
    assert "the weights are not where the run says" in capsys.readouterr().out


def test_a_path_is_found_from_where_the_run_was_started(tmp_path: Path) -> None:
    folder = tmp_path / "runs/train/exp"
    folder.mkdir(parents=True)
    (tmp_path / "runs/a.pt").write_text("")
    assert locate("runs/a.pt", folder) == tmp_path / "runs/a.pt" and locate("runs/b.pt", folder) is None and locate("", folder) is None


def test_older_reports_and_equal_names(runs: Path, tmp_path: Path) -> None:
    """A report without data or classes; two folders called exp."""
    for parent in ("a", "b"):
        shutil.copytree(runs / "cut", tmp_path / parent / "exp")
    path = tmp_path / "a/exp/report.json"
    content = json.loads(path.read_text())
    for key in ("data", "imgsz", "commands", "oracle", "layers"):
        content.pop(key)
    path.write_text(json.dumps(content))
    rows = compared(tmp_path, tmp_path / "a/exp", tmp_path / "b/exp/report.json", "--no-before")
    assert [r["label"] for r in rows] == ["a/exp", "b/exp"] and [r["ms_size"] for r in rows] == [640, 64]


def row(label: str, data: str | None = "d.yaml", images: int | None = 8, instances: int | None = 20, imgsz: int | None = 64) -> RunFigures:
    return RunFigures(label, Path(label), "pruned", 0.5, 0.3, 10, 20, images, instances, data=data, imgsz=imgsz)


def test_help_is_there_without_torch() -> None:
    code = "import sys, compare\ntry: compare.main(['--help'])\nexcept SystemExit as e: sys.exit(e.code or ('torch' in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "--no-latency" in done.stdout


def test_other_data_or_sizes_are_said_to_not_compare() -> None:
    assert mismatches([row("a"), row("b"), row("c", "elsewhere/d.yaml"), row("d", None), row("e", None, None, None, None)]) == []
    (line,) = mismatches([row("a"), row("b", "other.yaml")])
    assert line == (
        "warning: mAPs are not comparable, the runs were measured on different data (d.yaml with 8 images and 20 objects: a; "
        "other.yaml with 8 images and 20 objects: b)"
    )
    (line,) = mismatches([row("a"), row("b", None, 9)])
    assert "unnamed data with 9 images and 20 objects: b" in line
    (line,) = mismatches([row("a"), row("b", imgsz=96), row("c", imgsz=None)])
    assert line == "warning: mAPs are not comparable, the runs were measured on different image sizes (64 px: a; 96 px: b)"


@pytest.mark.parametrize(("arguments", "message"), [
    (["nowhere"], "RUN: no folder .*nowhere; give a run of prune.py"),
    (["empty"], "empty holds neither report.json nor metrics.json; give"),
    (["unfinished"], r"this training has not finished; train.py --resume completes it"),
    (["broken"], r"broken/report.json: cannot be read as JSON"), (["list"], "list/metrics.json: holds no figures"),
    (["poor"], "poor/metrics.json: has no map, params, flops"), (["stages"], "stages/report.json: has no stages `before` and `pruned`"),
    (["classes"], "classes/metrics.json: the figures of a classifier"),
    (["options"], "options/opt.yaml: cannot be read"), (["good", "--names", "a", "b"], "--names: 2 names for 1 runs"),
])  # fmt: skip
def test_wrong_runs(arguments: list[str], message: str, tmp_path: Path) -> None:
    good = '{"map50": 0.5, "map": 0.4, "params": 1, "flops": 2}'
    files = {
        "unfinished/opt.yaml": "data: x\n", "broken/report.json": "{", "list/metrics.json": "[1]", "poor/metrics.json": '{"map50": 1}',
        "classes/metrics.json": '{"accuracy_top1": 0.5, "params": 1, "flops": 2}',
        "stages/report.json": '{"before": {}}', "options/metrics.json": good, "options/opt.yaml": "epochs: [", "good/metrics.json": good,
    }  # fmt: skip
    (tmp_path / "empty").mkdir()
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        call("compare", tmp_path / arguments[0], *arguments[1:], "--project", tmp_path / "out")
    assert not (tmp_path / "out").exists(), "nothing is written"


def test_a_checkpoint_that_is_broken_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    good = {"map50": 0.5, "map": 0.4, "params": 1, "flops": 2, "weights": str(tmp_path / "x.pt"), "imgsz": 64}
    (tmp_path / "val").mkdir()
    (tmp_path / "val/metrics.json").write_text(json.dumps(good))
    (tmp_path / "x.pt").write_text("no checkpoint")
    with pytest.raises(InputError, match=r"x\.pt"):
        call("compare", tmp_path / "val", "--project", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_runs_of_other_sizes_are_measured_each_at_its_own(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    save_model(tmp_path / "x.pt", Model(small(), alive(small()).state_dict(), ("a", "b", "c"), 64))
    for size in (64, 96):
        (tmp_path / f"v{size}").mkdir()
        metrics = {"map50": 0.5, "map": 0.4, "params": 1, "flops": 2, "weights": str(tmp_path / "x.pt"), "imgsz": size, "data": "d.yaml"}
        (tmp_path / f"v{size}/metrics.json").write_text(json.dumps(metrics))
    rows = compared(tmp_path, tmp_path / "v64", tmp_path / "v96")
    assert [r["ms_size"] for r in rows] == [64, 96] and all(r["ms"] > 0 for r in rows)
    printed = capsys.readouterr().out
    assert "ms at 64 px" not in printed and "at 96 px" in printed and "different image sizes (64 px: v64; 96 px: v96)" in printed


@pytest.mark.parametrize("first", [True, False])
def test_an_exported_model_has_a_row_without_what_is_not_known(first: bool, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    save_model(tmp_path / "x.pt", Model(small(), alive(small()).state_dict(), ("a", "b", "c"), 64))
    (tmp_path / "x.onnx").write_text("not looked at")
    for name, known in (("x.pt", (1000, 2_000_000)), ("x.onnx", (None, None))):
        folder = tmp_path / name.replace(".", "_")
        folder.mkdir()
        figures = {"map50": 0.5, "map": 0.4, "weights": str(tmp_path / name), "imgsz": 64, "data": "d.yaml"}
        (folder / "metrics.json").write_text(json.dumps(figures | dict(zip(("params", "flops"), known))))
    names = ["x_onnx", "x_pt"] if first else ["x_pt", "x_onnx"]
    rows = dict(zip(names, compared(tmp_path, *(tmp_path / name for name in names))))
    assert [rows["x_onnx"][key] for key in ("params", "flops", "ms", "map50")] == [None, None, None, 0.5]
    assert rows["x_pt"]["flops"] == 2_000_000 and rows["x_pt"]["ms"] > 0 and rows["x_onnx"]["size_mb"] > 0
    assert rows["x_onnx"]["on_front"] == []
    assert "of x_onnx, exported models, parameters, FLOPs and latency are not known" in capsys.readouterr().out


def test_the_front_is_what_nothing_beats() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        costs, values = rng.integers(1, 6, 9).tolist(), rng.integers(1, 6, 9).tolist()
        points = list(zip(costs, values))
        beaten = {p for p in points if any(c <= p[0] and v >= p[1] and (c, v) != p for c, v in points)}
        front = pareto_front(costs, values)
        assert {points[i] for i in front} == set(points) - beaten and len(front) == len({points[i] for i in front})
        assert [costs[i] for i in front] == sorted(costs[i] for i in front)
    assert pareto_front([], []) == []


@pytest.mark.parametrize("seed", range(5))
def test_labels_lie_neither_on_each_other_nor_on_points(seed: int) -> None:
    """Twelve points, most of them in one corner of a picture of 900 x 600 pixels."""
    rng = np.random.default_rng(seed)
    points = np.concatenate([rng.uniform((60, 450), (260, 560), (8, 2)), rng.uniform((20, 20), (880, 580), (4, 2))])
    sizes = [(float(w), 14.0) for w in rng.integers(30, 110, len(points))]
    frame, legend = (0.0, 0.0, 900.0, 600.0), (700.0, 0.0, 900.0, 60.0)
    boxes = place_labels(points, sizes, frame, [legend])
    assert np.allclose([(b[2] - b[0], b[3] - b[1]) for b in boxes], sizes)
    for i, box in enumerate(boxes):
        assert sum(overlap(box, other) for other in boxes[:i]) < 1 and overlap(box, legend) < 1
        assert all(far(p, box) > 0 for p in points) and overlap(box, frame) == pytest.approx(sizes[i][0] * 14, abs=1)
