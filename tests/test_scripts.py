"""The scripts as users run them: the whole chain at 64 px, flags and aliases, and every wrong input of the design's section 6."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml

from models.checkpoint import Model, load_model, save_model
from models.network import Network
from tests.helpers import ROOT, SMALL_YAML, small, write_dataset
from utils.errors import InputError, run_script

SCRIPTS = (
    "train",
    "train_sparsity",
    "finetune_pruned",
    "prune",
    "shortcut_prune",
    "slim_prune",
    "slim_prune_8x",
    "layer_prune",
    "export",
    "val",
    "detect",
    "prune_detect",
    "demo",
)


def call(script: str, *args: object) -> None:
    """Run a script's `main` in this process."""
    import_module(script).main([str(a) for a in args])


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dataset, a model yaml and a trained sparse checkpoint (`sparse/weights/last.pt`)."""
    root = tmp_path_factory.mktemp("work")
    write_dataset(root / "data", images=8)
    (root / "small.yaml").write_text(yaml.safe_dump(SMALL_YAML))
    common = ["--data", root / "data/data.yaml", "--img", 64, "--batch", 4, "--workers", 0, "--project", root, "--device", "cpu"]
    call("train", "--cfg", root / "small.yaml", "--epochs", 2, *common, "--name", "base")
    call(
        "train_sparsity",
        "--weights",
        root / "base/weights/last.pt",
        "-sr",
        "--scale",
        0.01,
        "--prune",
        1,
        "--epochs",
        2,
        *common,
        "--name",
        "sparse",
    )
    return root


@pytest.fixture(scope="module")
def pruned(work: Path) -> tuple[Path, Path]:
    """The pair that slim_prune_8x.py makes of it."""
    call(
        "slim_prune_8x",
        "--weights",
        work / "sparse/weights/last.pt",
        "--data",
        work / "data/data.yaml",
        "--global_percent",
        0.4,
        "--project",
        work,
        "--name",
        "pruned",
        "--device",
        "cpu",
    )
    pair = work / "pruned/prune_0.4_keep_0.01_8x_last.cfg"
    return pair, pair.with_suffix(".pt")


def test_a_run_leaves_what_users_of_yolov5_expect(work: Path) -> None:
    names = {p.name for p in (work / "sparse").iterdir()}
    assert {"weights", "hyp.yaml", "opt.yaml", "results.csv", "results.png", "labels.jpg", "labels_correlogram.jpg", "train_batch0.jpg", "val_batch0_labels.jpg",
            "val_batch0_pred.jpg", "confusion_matrix.png", "F1_curve.png", "PR_curve.png", "gammas.png", "metrics.json"} <= names  # fmt: skip
    assert {p.name for p in (work / "sparse/weights").iterdir()} == {"last.pt", "best.pt"}
    content = torch.load(work / "sparse/weights/last.pt", weights_only=True)
    assert content["format"] == "yolo-prune 1" and content["training"] is None and content["epoch"] == -1
    metrics = json.loads((work / "sparse/metrics.json").read_text())
    assert {"images", "instances", "precision", "recall", "map50", "map", "params", "flops", "speed_ms"} <= metrics.keys()


def test_tensorboard_gets_the_tags_that_users_compare(work: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(work / "sparse"), size_guidance={"histograms": 0})
    events.Reload()
    tags = events.Tags()
    assert {
        "bn_weights/hist",
        "bn_weights_by_layer/model.0.bn",
        "before_train_perlayer_bn_weights/hist",
        "after_train_perlayer_bn_weights/hist",
    } <= set(tags["histograms"])
    assert {"train/box_loss", "metrics/mAP_0.5", "x/lr0", "sparsity/sr", "sparsity/near_zero_share"} <= set(tags["scalars"])
    assert [e.step for e in events.Histograms("bn_weights/hist")] == [0, 1]
    assert [e.value for e in events.Scalars("sparsity/sr")] == pytest.approx([0.01, 0.01])


def test_tensorboard_shows_yolov5s_scalars_the_graph_and_the_pictures(work: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = work / "base"
    events = EventAccumulator(str(run))
    events.Reload()
    tags = events.Tags()
    assert set(tags["scalars"]) == {
        "train/box_loss", "train/obj_loss", "train/cls_loss", "metrics/precision", "metrics/recall", "metrics/mAP_0.5", "metrics/mAP_0.5:0.95",
        "val/box_loss", "val/obj_loss", "val/cls_loss", "x/lr0", "x/lr1", "x/lr2",
    }  # fmt: skip
    assert [e.step for e in events.Scalars("x/lr0")] == [0, 1]
    assert len([n for n in events.Graph().node if "_convolution" in n.op]) == sum(b.kind == "convolutional" for b in small())

    expected = {"results", "confusion_matrix", "F1_curve", "PR_curve", "P_curve", "R_curve", "labels", "labels_correlogram", "train_batch0"}
    assert expected <= set(tags["images"]) == {p.stem for p in run.iterdir() if p.suffix in (".png", ".jpg")}
    (shown,) = events.Images("confusion_matrix")
    assert shown.step == 1 and shown.encoded_image_string == (run / "confusion_matrix.png").read_bytes()
    assert cv2.imread(str(run / "confusion_matrix.png")).shape[:2] == (shown.height, shown.width)


def test_the_pair_and_the_report(work: Path, pruned: tuple[Path, Path]) -> None:
    cfg, weights = pruned
    report = json.loads((cfg.parent / "report.json").read_text())
    before, after = report["before"], report["pruned"]
    for stage in ("before", "gamma_zero", "masked", "pruned"):
        assert {"map50", "map", "params", "flops", "size_mb", "latency_ms"} <= report[stage].keys()
    assert after["params"] < before["params"] and after["flops"] < before["flops"] and after["size_mb"] < before["size_mb"]
    assert report["masked"]["map50"] == pytest.approx(after["map50"], abs=1e-6)
    assert report["oracle"]["difference"] <= report["oracle"]["bound"]
    widths = {x["name"]: (x["before"], x["after"]) for x in report["layers"]}
    assert all(a % 8 == 0 or a == b for name, (b, a) in widths.items() if ".m." not in name or not name.startswith("model.14"))
    assert {b.name: b.channels for b in load_model(weights).blocks if b.kind == "convolutional"} == {k: v[1] for k, v in widths.items()}
    assert {"widths.png", "gammas.png"} <= {p.name for p in cfg.parent.iterdir()}


@pytest.mark.parametrize(("script", "flags", "stem"), [
    ("prune", ["--percent", 0.4], "prune_0.4_last"), ("shortcut_prune", ["--percent", 0.4], "prune_0.4_last"),
    ("slim_prune", ["--global-percent", 0.4, "--layer-keep", 0.1], "prune_0.4_keep_0.1_last"),
])  # fmt: skip
def test_the_other_pruning_scripts(script: str, flags: Sequence[object], stem: str, work: Path) -> None:
    """The structure may come from a yaml with another number of classes, as people type it."""
    call(
        script,
        "--weights",
        work / "sparse/weights/last.pt",
        "--cfg",
        work / "small.yaml",
        "--data",
        work / "data/data.yaml",
        *flags,
        "--project",
        work,
        "--name",
        script,
    )
    names = {p.name for p in (work / script).iterdir()}
    assert {f"{stem.replace('_last', '_small')}.cfg", f"{stem.replace('_last', '_small')}.pt", "report.json"} <= names


def test_everything_takes_the_pruned_checkpoint(work: Path, pruned: tuple[Path, Path]) -> None:
    cfg, weights = pruned
    data, common = work / "data/data.yaml", ["--project", work, "--device", "cpu"]
    train = ["--data", data, "--img", 64, "--batch", 4, "--workers", 0, "--epochs", 1, *common]
    call(
        "finetune_pruned",
        "--cfg",
        cfg,
        "--weights",
        weights,
        "--distill",
        "--t_weight",
        work / "base/weights/best.pt",
        *train,
        "--name",
        "tuned",
    )
    call("train_sparsity", "--weights", weights, "--sr", 0.01, *train, "--name", "again")
    call("slim_prune", "--weights", work / "again/weights/last.pt", "--data", data, "--global_percent", 0.2, *common, "--name", "twice")
    call("val", "--weights", weights, "--data", data, *common, "--name", "val", "--save-txt", "--save-json")
    call(
        "prune_detect",
        "--weights",
        weights,
        "--cfg",
        cfg,
        "--source",
        work / "data/images/val",
        "--conf",
        0.001,
        "--save-txt",
        "--save-crop",
        *common,
        "--name",
        "found",
    )
    tuned, twice = load_model(work / "tuned/weights/best.pt"), load_model(next((work / "twice").glob("*.pt")))
    assert tuned.blocks == load_model(weights).blocks
    assert sum(b.channels for b in twice.blocks) < sum(b.channels for b in tuned.blocks)
    assert "distill_loss" in (work / "tuned/results.csv").read_text()
    assert len(list((work / "found").glob("*.png"))) == 8 and list((work / "found/labels").glob("*.txt"))
    report, measured = json.loads((cfg.parent / "report.json").read_text())["pruned"], json.loads((work / "val/metrics.json").read_text())
    assert measured["map50"] == pytest.approx(report["map50"], abs=1e-6), "what was saved is what was measured"


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_there_without_torch(script: str) -> None:
    code = f"import sys, {script}\ntry: {script}.main(['--help'])\nexcept SystemExit as e: sys.exit(e.code or ('torch' in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "usage" in done.stdout


# ---- wrong inputs --------------------------------------------------------------------------------------------------------------

Change = Callable[[Path, Path], list[object]]


def _weights(content: bytes) -> Change:
    def make(work: Path, tmp: Path) -> list[object]:
        (tmp / "bad.pt").write_bytes(content)
        return ["--weights", tmp / "bad.pt"]

    return make


def _truncated(work: Path, tmp: Path) -> list[object]:
    (tmp / "cut.pt").write_bytes((work / "sparse/weights/last.pt").read_bytes()[:20000])
    return ["--weights", tmp / "cut.pt"]


def _edited_cfg(work: Path, tmp: Path) -> list[object]:
    text = next((work / "pruned").glob("*.cfg")).read_text()
    name = re.search(r"name=model\.4\.cv3\n(?:.*\n)*?filters=(\d+)", text)
    (tmp / "edited.cfg").write_text(text[: name.start(1)] + str(int(name.group(1)) + 8) + text[name.end(1) :])
    return ["--weights", next((work / "pruned").glob("*.pt")), "--cfg", tmp / "edited.cfg"]


def _other_data(**changes: object) -> Change:
    def make(work: Path, tmp: Path) -> list[object]:
        spec = yaml.safe_load((work / "data/data.yaml").read_text()) | changes
        (tmp / "data.yaml").write_text(yaml.safe_dump({k: v for k, v in spec.items() if v is not None}))
        return ["--weights", work / "sparse/weights/last.pt", "--data", tmp / "data.yaml"]

    return make


def _class_out_of_range(work: Path, tmp: Path) -> list[object]:
    data = write_dataset(tmp / "d", images=2)
    for name in ("000", "001"):  # in few of many files it would be a slip, which is skipped and named
        (tmp / f"d/labels/val/{name}.txt").write_text("7 0.5 0.5 0.2 0.2\n")
    return ["--weights", work / "sparse/weights/last.pt", "--data", data]


WRONG: dict[str, tuple[str, Change, str]] = {
    "missing weights": (
        "val",
        lambda w, t: ["--weights", w / "sparse/weights/lst.pt"],
        r"lst\.pt.*did you mean last\.pt.*Nothing is downloaded",
    ),
    "weights are text": ("val", _weights(b"hello world, no checkpoint at all"), r"bad\.pt"),
    "weights are empty": ("prune", _weights(b""), r"bad\.pt"),
    "truncated checkpoint": ("slim_prune", _truncated, r"cut\.pt.*truncated"),
    "cfg that does not fit": (
        "val",
        _edited_cfg,
        r"edited\.cfg does not fit.*model\.4\.cv3.*Use the cfg that was written with these weights",
    ),
    "cfg of the wrong kind": (
        "val",
        lambda w, t: ["--weights", w / "sparse/weights/last.pt", "--cfg", w / "data/images/val/000.png"],
        "neither a .yaml nor a .cfg",
    ),
    "percent of 1": ("prune", lambda w, t: ["--weights", w / "sparse/weights/last.pt", "--percent", "1.0"], "below 1, got 1.0; try 0.5"),
    "exclude nothing": (
        "prune",
        lambda w, t: ["--weights", w / "sparse/weights/last.pt", "--exclude", "model.99"],
        "--exclude model.99: matches no",
    ),
    "missing data": ("val", lambda w, t: ["--weights", w / "sparse/weights/last.pt", "--data", t / "no.yaml"], r"no\.yaml"),
    "missing images": ("val", _other_data(val="images/nowhere"), r"nowhere"),
    "other classes": ("val", _other_data(nc=2, names=["a", "b"]), r"has 3 classes.*has 2; evaluate on the data"),
    "download runs nothing": ("val", _other_data(val="images/nowhere", download="touch HACKED"), r"nowhere|download"),
    "class out of range": ("val", _class_out_of_range, r"000\.txt.*7"),
    "missing source": (
        "detect",
        lambda w, t: ["--weights", w / "sparse/weights/last.pt", "--source", t / "none.jpg"],
        r"none\.jpg: no such file",
    ),
    "device": ("val", lambda w, t: ["--weights", w / "sparse/weights/last.pt", "--device", "7"], "--device 7.*use --device cpu"),
    "teacher is missing": (
        "finetune_pruned",
        lambda w, t: ["--weights", w / "sparse/weights/last.pt", "--distill"],
        "--distill needs a teacher",
    ),
    "unknown hyp": (
        "train",
        lambda w, t: ["--weights", w / "sparse/weights/last.pt", "--hyp", t / "hyp.scratch-lo.yaml"],
        r"did you mean hyp\.scratch-low\.yaml",
    ),
    "nothing to train": ("train", lambda w, t: [], "give --weights .* --cfg"),
    "negative strength": ("train_sparsity", lambda w, t: ["--weights", w / "sparse/weights/last.pt", "--sr", "-1"], "must not be negative"),
    "strength that is no number": (
        "train_sparsity",
        lambda w, t: ["--weights", w / "sparse/weights/last.pt", "--sr", "nan"],
        "must not be negative",
    ),
    "finished run": ("train", lambda w, t: ["--resume", w / "sparse/weights/last.pt"], "is finished"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_input_gets_one_line_and_writes_nothing(
    case: str, work: Path, pruned: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    script, change, message = WRONG[case]
    args = change(work, tmp_path)
    if script not in ("detect", "prune_detect") and "--data" not in args and "--resume" not in args:
        args = [*args, "--data", work / "data/data.yaml"]
    out = tmp_path / "out"
    before = sorted(p for p in tmp_path.rglob("*") if not p.name.endswith(".cache.npz"))
    with pytest.raises(SystemExit) as ended:
        run_script(lambda: call(script, *args, "--project", out))
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    lines = 3 if case == "download runs nothing" else 1  # what the yaml says of its images stands on lines of its own
    assert len(error.strip().splitlines()) == lines and error.startswith("error: ")
    assert sorted(p for p in tmp_path.rglob("*") if not p.name.endswith(".cache.npz")) == before and not (ROOT / "HACKED").exists()


def test_an_unknown_flag_is_one_line() -> None:
    done = subprocess.run(
        [sys.executable, "val.py", "--weights", "x.pt", "--cofn", "0.3"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and done.stderr.startswith("error: unrecognized arguments: --cofn") and len(done.stderr.splitlines()) == 1


def test_a_corrupt_image_and_a_six_column_label_are_named_and_skipped(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data = write_dataset(tmp_path / "d", images=4)
    (tmp_path / "d/images/val/000.png").write_bytes(b"no image")
    (tmp_path / "d/labels/val/001.txt").write_text("1 0.5 0.5 0.2 0.2 0.9\n")
    call("val", "--weights", work / "sparse/weights/last.pt", "--data", data, "--project", tmp_path, "--name", "v")
    out = capsys.readouterr().out
    assert "000.png" in out and "001" in out and "2 corrupt" in out
    assert json.loads((tmp_path / "v/metrics.json").read_text())["images"] == 2


def test_a_failing_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = Network(small())
    model = Model(network.blocks, network.state_dict(), ("a", "b", "c"))
    save_model(tmp_path / "m.pt", model)
    before = (tmp_path / "m.pt").read_bytes()

    def full(*args: object, **kwargs: object) -> None:
        args[1].write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(InputError, match="No space left"):
        save_model(tmp_path / "m.pt", model)
    assert (tmp_path / "m.pt").read_bytes() == before and os.listdir(tmp_path) == ["m.pt"]


def test_checkpoints_round_trip_and_refuse_what_they_do_not_know(tmp_path: Path) -> None:
    network = Network(small())
    model = Model(network.blocks, network.state_dict(), ("a", "b", "c"), 96, hyp={"lr0": 0.1}, options={"epochs": 3})
    save_model(tmp_path / "m.pt", model)
    again = load_model(tmp_path / "m.pt")
    assert (again.blocks, again.names, again.imgsz, again.hyp, again.options) == (model.blocks, model.names, 96, model.hyp, model.options)
    for key, value in model.state.items():
        assert torch.allclose(again.state[key].float(), value.float(), atol=1e-3), key
        if "conv.weight" not in key and ".m." not in key:
            assert torch.equal(again.state[key], value), "only convolutions are stored in half precision"
    content = torch.load(tmp_path / "m.pt", weights_only=True)
    content["extensions"] = {"quantisation": 1}
    torch.save(content, tmp_path / "m.pt")
    with pytest.raises(InputError, match="holds quantisation, which this version does not know"):
        load_model(tmp_path / "m.pt")


@pytest.mark.parametrize("alias", ["--img", "--imgsz", "--img-size", "--img_size"])
def test_size_aliases(alias: str) -> None:
    from engine.train_flags import add_train_flags, train_options
    from utils.flags import parser

    p = parser("x")
    add_train_flags(p, 10)
    assert train_options(p.parse_args([alias, "96", "--data", "d", "--batch_size", "4", "--exist_ok", "--adam"])).imgsz == 96


def test_video_is_annotated(work: Path, tmp_path: Path) -> None:
    path = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 5.0, (64, 64))
    for i in range(3):
        writer.write(np.full((64, 64, 3), 50 * i, np.uint8))
    writer.release()
    call("detect", "--weights", work / "sparse/weights/last.pt", "--source", path, "--project", tmp_path, "--name", "v", "--device", "cpu")
    capture = cv2.VideoCapture(str(tmp_path / "v/clip.mp4"))
    assert int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) == 3


def test_single_cls_models_are_pruned_on_the_data_they_were_trained_on(work: Path, tmp_path: Path) -> None:
    data, common = work / "data/data.yaml", ["--project", tmp_path, "--device", "cpu"]
    flags = ["--img", 64, "--batch", 4, "--workers", 0, "--epochs", 1, "--nosave", "--single-cls"]
    call("train", "--cfg", work / "small.yaml", "--data", data, *flags, *common, "--name", "one")
    assert load_model(tmp_path / "one/weights/last.pt").names == ("item",), "--nosave still saves the last epoch"
    call("slim_prune", "--weights", tmp_path / "one/weights/last.pt", "--data", data, "--percent", 0.3, *common, "--name", "cut")
    assert (tmp_path / "cut/report.json").exists()


def test_weights_with_a_yaml_keep_their_anchors(work: Path, tmp_path: Path) -> None:
    trained = load_model(work / "base/weights/last.pt")
    flags = ["--img", 64, "--batch", 4, "--workers", 0, "--epochs", 1, "--noautoanchor", "--project", tmp_path, "--name", "again"]
    call("train", "--weights", work / "base/weights/last.pt", "--cfg", work / "small.yaml", "--data", work / "data/data.yaml", *flags)
    anchors = [
        [b.anchors for b in blocks if b.kind == "yolo"]
        for blocks in (trained.blocks, load_model(tmp_path / "again/weights/last.pt").blocks)
    ]
    assert anchors[0] == anchors[1]


def test_convert_does_not_write_over_its_source(work: Path, tmp_path: Path) -> None:
    from models import convert

    source = tmp_path / "m.pt"
    source.write_bytes((work / "base/weights/last.pt").read_bytes())
    with pytest.raises(InputError, match="choose another folder"):
        convert.main([str(source), "--out", str(tmp_path / "m.cfg")])
    assert [p.name for p in tmp_path.iterdir()] == ["m.pt"]
