"""Official checkpoints through the scripts: one file through all of them, every release through each (slow), and what is refused."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import pytest
import torch

from models.checkpoint import load_model, save_model
from tests import official_files
from tests.helpers import ROOT, without_pictures_and_timings, write_dataset
from tests.official_files import ERAS, bare_pickle, make_model, save, stripped, unstripped
from utils.data_config import read_data
from utils.errors import run_script

COCO, WEIGHTS = os.environ.get("COCO128_DIR"), os.environ.get("YOLOV5N_PT")


def call(script: str, *args: object) -> None:
    """Run a script's `main` in this process."""
    import_module(script).main([str(a) for a in args])


@pytest.fixture(autouse=True)
def neither_pictures_nor_timings(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take most of a script's time at this size, and are tested elsewhere."""
    without_pictures_and_timings(monkeypatch)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"), images=4)


def train_flags(data: Path, project: Path, name: str, imgsz: int = 64) -> list[object]:
    run = ["--epochs", 1, "--batch", 4, "--workers", 0, "--noautoanchor", "--device", "cpu"]
    return ["--data", data, "--img", imgsz, *run, "--project", project, "--name", name]


def metrics(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def evaluate(weights: Path, data: Path, project: Path, imgsz: int = 64) -> dict:
    """val.py and detect.py; the metrics."""
    common = ["--weights", weights, "--img", imgsz, "--project", project, "--device", "cpu"]
    call("val", *common, "--data", data, "--workers", 0, "--name", "val")
    call("detect", *common, "--source", data.parent / "images/val", "--name", "detect", "--save-txt", "--conf", 0.1)
    assert list((project / "detect/labels").glob("*.txt")), "it finds something"
    return metrics(project / "val")


def through_everything(weights: Path, data: Path, out: Path, tensors: int, capsys: pytest.CaptureFixture, imgsz: int = 64) -> None:
    """Every script that takes `weights`; the values that each has to keep."""
    measured, model = evaluate(weights, data, out, imgsz), load_model(weights)
    pruned = prune_in_each_way(weights, data, out, imgsz, measured)
    capsys.readouterr()
    call("train", "--weights", weights, *train_flags(data, out, "train", imgsz))
    assert f"transferred {tensors}/{tensors} tensors from {weights}" in capsys.readouterr().out
    call("train_sparsity", "--weights", weights, "--sr", 0.001, *train_flags(data, out, "sparse", imgsz))
    assert f"transferred {tensors}/{tensors} tensors from {weights}" in capsys.readouterr().out
    for name in ("train", "sparse"):
        again = load_model(out / name / "weights/last.pt")
        assert (again.blocks, again.names) == (model.blocks, data_names(data)), "structure, anchors and constants are kept"
    call("finetune_pruned", "--weights", pruned, "--distill", "--t_weight", weights, *train_flags(data, out, "tuned", imgsz))
    assert "distill_loss" in (out / "tuned/results.csv").read_text()
    assert load_model(out / "tuned/weights/last.pt").blocks == load_model(pruned).blocks


def prune_in_each_way(weights: Path, data: Path, out: Path, imgsz: int, measured: dict, scripts: Sequence[str] = ()) -> Path:
    """All pruning scripts; each starts from what val.py measured. Returns the last pair's weights."""
    blocks = load_model(weights).blocks
    for script in scripts or ("prune", "shortcut_prune", "slim_prune", "slim_prune_8x"):
        run = ["--img", imgsz, "--project", out, "--name", script, "--device", "cpu", "--workers", 0]
        call(script, "--weights", weights, "--data", data, "--percent", 0.3, *run)
        report = json.loads((out / script / "report.json").read_text())
        assert report["before"]["map50"] == pytest.approx(measured["map50"], abs=1e-6)
        assert report["oracle"]["difference"] <= report["oracle"]["bound"]
        pruned = next((out / script).glob("*.pt"))
        assert sum(b.channels for b in load_model(pruned).blocks) < sum(b.channels for b in blocks)
    return pruned


def data_names(data: Path) -> tuple[str, ...]:
    return tuple(read_data(str(data)).names)


def test_one_file_through_every_script(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """v7.0, as it is during training: half precision, `ema` beside `model`, names as a dict, anchors of autoanchor."""
    model = make_model(ERAS["v7.0"])
    path = save(unstripped(model, ERAS["v7.0"]), tmp_path / "last.pt")
    through_everything(path, data, tmp_path, len(model.state_dict()), capsys)


@pytest.mark.parametrize("era", ERAS)
def test_every_release_is_evaluated(era: str, data: Path, tmp_path: Path) -> None:
    """By the figures of the same tensors in a checkpoint of ours."""
    path = save(stripped(make_model(ERAS[era]), ERAS[era]), tmp_path / "a.pt")
    save_model(tmp_path / "ours.pt", load_model(path))
    figures = []
    for weights in (path, tmp_path / "ours.pt"):
        flags = ["--project", tmp_path, "--name", weights.stem, "--device", "cpu", "--workers", 0, "--img", 64]
        call("val", "--weights", weights, "--data", data, *flags)
        figures.append({k: v for k, v in metrics(tmp_path / weights.stem).items() if isinstance(v, (int, float))})
    assert figures[0]["instances"] > 0
    assert figures[0] == pytest.approx(figures[1], abs=0 if ERAS[era].half else 0.01, rel=0), "ours stores convolutions in half precision"


@pytest.mark.slow
@pytest.mark.parametrize("era", [era for era in ERAS if era != "v7.0"])
def test_every_release_through_every_script(era: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = make_model(ERAS[era])
    path = save(stripped(model, ERAS[era]), tmp_path / "best.pt")
    tensors = sum(not key.endswith("anchor_grid") for key in model.state_dict())
    through_everything(path, data, tmp_path, tensors, capsys)


def test_other_classes_begin_with_new_outputs(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = make_model(ERAS["v5.0"], nc=5)
    path = save(stripped(model, ERAS["v5.0"]), tmp_path / "five.pt")
    call("train", "--weights", path, *train_flags(data, tmp_path, "three"))
    tensors = len(model.state_dict()) - 1  # without anchor_grid
    assert f"transferred {tensors - 6}/{tensors} tensors from {path}" in capsys.readouterr().out
    trained = load_model(tmp_path / "three/weights/last.pt")
    assert (trained.network().classes, trained.names) == (3, ("shape0", "shape1", "shape2"))


def test_fused_files_are_evaluated_but_not_trained(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = make_model(ERAS["v6.1"])
    whole, fused = save(stripped(model), tmp_path / "whole.pt"), save(stripped(official_files.fuse(model)), tmp_path / "fused.pt")
    figures = [evaluate(path, data, tmp_path / path.stem) for path in (whole, fused)]
    assert figures[1]["map50"] == pytest.approx(figures[0]["map50"], abs=1e-3)
    for script in ("train", "train_sparsity", "finetune_pruned", "prune", "slim_prune"):
        error = refused(capsys, script, "--weights", fused, "--data", data, "--project", tmp_path / "none")
        assert "fused.pt: its batch norms are fused away, so it cannot be trained or pruned" in error
    assert not (tmp_path / "none").exists()


def refused(capsys: pytest.CaptureFixture, script: str, *args: object) -> str:
    """Run a script that is to end with exit code 2; return its one line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run_script(lambda: call(script, *args))
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert error.startswith("error: ") and len(error.splitlines()) == 1
    return error


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "the file is empty"),
        (b"hello", "not a zip"),
        (b"<html><title>404: Not Found</title>", "a web page, not a checkpoint"),
        (b"\x80\x02N.", "before torch 1.6"),
        (b"PK\x03\x04" + bytes(100), "truncated or damaged"),
    ],
)
def test_files_that_are_no_checkpoint(content: bytes, said: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "bad.pt").write_bytes(content)
    for script in ("val", "train", "train_sparsity", "slim_prune"):
        assert said in refused(capsys, script, "--weights", tmp_path / "bad.pt", "--data", data, "--project", tmp_path / "none")
    args = ["--weights", data.parent / "none.pt", "--distill", "--t_weight", tmp_path / "bad.pt", "--data", data]
    assert "none.pt" in refused(capsys, "finetune_pruned", *args, "--project", tmp_path / "none")
    assert said in refused(capsys, "detect", "--weights", tmp_path / "bad.pt", "--source", data.parent, "--project", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_hostile_file_on_the_command_line(data: Path, tmp_path: Path) -> None:
    """In a process of its own: exit code 2, one line that names what was asked for, and nothing done."""
    path = bare_pickle(b"\x80\x02cmodels.yolo\nModel\n0cos\nsystem\nX\x0c\x00\x00\x00touch canary\x85R.", tmp_path / "a.pt")
    args = [sys.executable, ROOT / "val.py", "--weights", path, "--data", data]
    done = subprocess.run(args, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: \S+a\.pt: it asks for os\.system, which no YOLOv5 checkpoint needs; nothing was run\n", done.stderr)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pt"]


@pytest.mark.slow
@pytest.mark.skipif(not (COCO and WEIGHTS), reason="set COCO128_DIR (images/, labels/) and YOLOV5N_PT (the official v6.0 checkpoint)")
def test_the_official_yolov5n_through_every_script(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    images = sorted(p for p in Path(COCO).rglob("*.jpg"))[:8]
    for image in images:
        label = Path(str(image).replace("/images/", "/labels/")).with_suffix(".txt")
        for kind, source in (("images", image), ("labels", label)):
            target = tmp_path / kind / "val" / source.name
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.exists():
                target.write_bytes(source.read_bytes())
    data = tmp_path / "coco.yaml"
    names = "\n".join(f"  {index}: {json.dumps(name)}" for index, name in enumerate(load_model(WEIGHTS).names))
    data.write_text(f"path: {tmp_path}\ntrain: images/val\nval: images/val\nnc: 80\nnames:\n{names}\n")
    through_everything(Path(WEIGHTS), data, tmp_path / "out", 349, capsys, imgsz=128)
    assert metrics(tmp_path / "out/val")["map50"] > 0.1
    content = torch.load(tmp_path / "out/train/weights/last.pt", weights_only=True)
    assert len(content["state"]) == 349
