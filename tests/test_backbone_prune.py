"""Backbone pruning: what the backbone is, uniform shares, the sliced neck, grafts into trained and fresh detectors, rounds that resume."""

from __future__ import annotations

import importlib
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from benchmarks.reference import dataset_yaml
from engine import backbone_rounds
from engine.backbone_rounds import epochs_of
from engine.backbone_run import BackboneOptions, backbone_cut, combined
from engine.cut import Cut
from engine.prune_bench import check_oracle
from engine.prune_run import PruneOptions, prepare
from models.blocks import Blocks
from models.checkpoint import Model, load_model, save_model
from models.network import Network, fuse
from models.yaml_reader import from_spec, read_yaml
from pruning.backbone import backbone_end, neck_entries
from pruning.masked import largest_difference
from tests.helpers import ROOT, SMALL_CLASSIFIER, SMALL_YAML, alive, small, stock, write_dataset, write_folder
from utils.errors import InputError

METHODS = ("L1", "L2", "FPGM")


def call(*args: object) -> None:
    importlib.import_module("backbone_prune").main([str(a) for a in args])


def options(method: str = "L1", sparsity: float = 0.25, **fields: object) -> BackboneOptions:
    run = PruneOptions(
        str(fields.pop("weights", "w.pt")), "d", "p_", cfg=str(fields.pop("cfg", "")), exclude=tuple(fields.pop("exclude", ()))
    )
    return BackboneOptions(run, method, sparsity, **fields)


def model_of(blocks: Blocks, names: tuple[str, ...] | None = None, seed: int = 0) -> Model:
    network = alive(blocks, seed)
    return Model(blocks, network.state_dict(), names or tuple(f"c{i}" for i in range(network.classes)))


def assert_masked_equals_pruned(model: Model, cut: Cut, moved: float = 0.1) -> None:
    images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    pruned = Network(cut.blocks).eval()
    pruned.load_state_dict(dict(cut.state))
    assert largest_difference(model.network(), pruned, images)[0] > moved, "a cut that changes nothing proves nothing"
    difference, bound = largest_difference(cut.masked, pruned, images)
    assert difference <= bound


def widths(blocks: Blocks) -> dict[str, int]:
    return {b.name: b.channels for b in blocks if b.kind == "convolutional"}


# ---- what the backbone is ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "last"),
    [("yolov5n", 8), ("yolov5nb", 8), ("yolov5x", 8), ("hub/yolov5n6", 10), ("hub/yolov5s-v5.0", 7), ("hub/yolov5s-ghost", 8)],
)
def test_the_backbone_is_what_comes_before_the_pyramid(path: str, last: int) -> None:
    blocks = read_yaml(ROOT / "models" / f"{path}.yaml", 2)
    end = backbone_end(blocks)
    named = [int(b.name.split(".")[1]) for b in blocks if b.name]
    inside = [int(b.name.split(".")[1]) for b in blocks[:end] if b.name]
    assert max(inside) == last and len(inside) == sum(n <= last for n in named)


def test_a_model_without_a_pyramid_asks_for_the_number_of_layers() -> None:
    blocks = read_yaml(ROOT / "models/hub/yolov3.yaml", 2)
    with pytest.raises(InputError, match="say with --backbone-layers"):
        backbone_end(blocks)
    assert blocks[backbone_end(blocks, 11)].name.startswith("model.11")


# ---- the cut -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", ["n", "nb"])
def test_the_oracle_holds(size: str, method: str) -> None:
    model = model_of(stock(size, 3))
    assert_masked_equals_pruned(model, backbone_cut(model, options(method)), 0.1 if size == "n" else 0.01)


def test_each_layer_loses_its_share_and_the_neck_only_inputs() -> None:
    model = model_of(stock("n", 3))
    cut = backbone_cut(model, options(sparsity=0.25))
    before, after = widths(model.blocks), widths(cut.blocks)
    groups = [f"model.{i}" for i in (2, 4, 6, 8)]
    tied = {name for name in before if any(name == f"{g}.cv1" or (name.startswith(f"{g}.m.") and name.endswith("cv2")) for g in groups)}
    for name, width in before.items():
        if int(name.split(".")[1]) >= 9:
            assert after[name] == width
        elif name in tied:
            assert width - int(width * 0.25) <= after[name] <= width, "a group keeps what one member keeps"
        else:
            assert after[name] == width - int(width * 0.25), name


def test_the_necks_tensors_are_the_trained_ones_without_the_inputs_that_went() -> None:
    model = model_of(stock("n", 3))
    cut = backbone_cut(model, options("L2", 0.25))
    kept = torch.linalg.vector_norm(model.state["model.8.cv3.conv.weight"].flatten(1), dim=1).argsort(descending=True)[:192].sort().values
    assert torch.equal(cut.state["model.9.cv1.conv.weight"], model.state["model.9.cv1.conv.weight"][:, kept])
    same = [k for k in model.state if int(k.split(".")[1]) >= 14 and not k.startswith("model.17.cv") and "running_mean" not in k]
    assert all(torch.equal(cut.state[k], model.state[k]) for k in same)


def test_methods_differ_and_exclusions_and_floors_hold() -> None:
    model = model_of(stock("n", 3))
    deep = [backbone_cut(model, options(m)).state["model.7.bn.weight"] for m in METHODS]
    assert all(not torch.equal(a, b) for a, b in zip(deep, [*deep[1:], deep[0]]))
    cut = backbone_cut(model, options(exclude=("model.7",)))
    assert widths(cut.blocks)["model.7"] == 256 and widths(cut.blocks)["model.5"] == 96
    with pytest.raises(InputError, match="--exclude model.9.cv1: matches no prunable"):
        backbone_cut(model, options(exclude=("model.9.cv1",)))
    assert widths(backbone_cut(model, options(sparsity=0.9, min_filters=8)).blocks)["model.0"] == 8


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "L3"}, "--method L3: choose one of L1, L2, FPGM"),
        ({"sparsity": 1.0}, "--sparsity 1.0: must be at least 0 and below 1"),
        ({"into": "a.pt", "cfg": "b.yaml"}, "--into names a trained detector and --cfg a fresh one"),
    ],
)  # fmt: skip
def test_wrong_options_are_named(fields: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        options(**fields)


# ---- into a detector -----------------------------------------------------------------------------------------------------------


def classifier(seed: int = 3) -> Model:
    return model_of(from_spec(SMALL_CLASSIFIER, "small"), seed=seed)


@pytest.mark.parametrize("method", METHODS)
def test_a_backbone_in_a_trained_detector(method: str) -> None:
    backbone, detector = classifier(), model_of(small())
    model = combined(backbone, detector, options(method, into="det.pt"), fresh=False)
    own = {k for k in model.state if int(k.split(".")[1]) <= 5}
    assert all(torch.equal(model.state[k], (backbone if k in own else detector).state[k]) for k in model.state)
    assert model.blocks == detector.blocks
    cut = backbone_cut(model, options(method, into="det.pt"))
    assert_masked_equals_pruned(model, cut, 0.01)
    alone = backbone_cut(backbone, options(method))
    assert {k: v for k, v in widths(alone.blocks).items() if "linear" not in k}.items() <= widths(cut.blocks).items()
    stem = "model.0.conv.weight"
    assert torch.equal(alone.state[stem], cut.state[stem]), "the masks are those that the classifier alone would have had"


def test_a_detectors_own_backbone_changes_nothing() -> None:
    detector = model_of(small())
    backbone = Model(
        from_spec(SMALL_CLASSIFIER, "b"),
        classifier().state | {k: v for k, v in detector.state.items() if k[6] in "012345" and k[7] == "."},
        ("a",) * 3,
    )
    model = combined(backbone, detector, options(into="det.pt"), fresh=False)
    assert model.blocks == detector.blocks and all(torch.equal(model.state[k], v) for k, v in detector.state.items())


def test_a_pruned_backbone_in_a_fresh_detector_and_in_a_trained_one() -> None:
    full = classifier()
    cut = backbone_cut(full, options(sparsity=0.5))
    pruned = replace(full, blocks=cut.blocks, state=dict(cut.state))
    model = combined(pruned, Model(small(), {}, ("a",) * 3), options(cfg="small.yaml"), fresh=True)
    model.network()  # loads strictly
    assert widths(cut.blocks)["model.5"] == widths(model.blocks)["model.5"] < widths(small())["model.5"]
    assert all(torch.equal(model.state[k], v) for k, v in cut.state.items() if k in model.state)
    with pytest.raises(InputError, match="it was pruned before.*into a fresh detector"):
        combined(pruned, model_of(small()), options(into="det.pt"), fresh=False)


def test_what_is_built_differently_is_named() -> None:
    with pytest.raises(InputError, match="w.pt does not fit into det.pt: the backbone has 43 blocks, that of the detector 22"):
        combined(model_of(stock("nb", 3)), model_of(small()), options(into="det.pt"), fresh=False)
    with pytest.raises(
        InputError, match=r"built differently: model.1 .convolutional 5x5/2. in the backbone, model.1 .convolutional 3x3/2. in the"
    ):
        rows = [*SMALL_CLASSIFIER["backbone"]]
        rows[1] = [-1, 1, "Conv", [64, 5, 2]]
        combined(
            model_of(from_spec(SMALL_CLASSIFIER | {"backbone": rows}, "other")), model_of(small()), options(into="det.pt"), fresh=False
        )
    with pytest.raises(InputError, match="channels there"):
        spec = SMALL_CLASSIFIER | {"width_multiple": 0.5}
        combined(model_of(from_spec(spec, "wide")), model_of(small()), options(into="det.pt"), fresh=False)


def test_activations_and_batch_norm_constants_come_along() -> None:
    backbone = classifier()
    relu = tuple(replace(b, activation="relu", bn_eps=1e-5, bn_momentum=0.1) if b.has_gamma else b for b in backbone.blocks)
    model = combined(replace(backbone, blocks=relu), model_of(small()), options(into="det.pt"), fresh=False)
    end = backbone_end(model.blocks)
    assert {(b.activation, b.bn_eps) for b in model.blocks[:end] if b.has_gamma} == {("relu", 1e-5)}
    assert {(b.activation, b.bn_eps) for b in model.blocks[end:] if b.has_gamma} == {("silu", 1e-3)}
    assert_masked_equals_pruned(model, backbone_cut(model, options(into="det.pt")), 0.01)


# ---- the script ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `boxes/data.yaml`, an image folder `images/`, `small.yaml`, `detector.pt` and `classifier.pt`."""
    root = tmp_path_factory.mktemp("backbone")
    write_dataset(root / "boxes")
    write_folder(root / "images")
    (root / "small.yaml").write_text(yaml.safe_dump(SMALL_YAML))
    save_model(root / "detector.pt", replace(model_of(small(), ("shape0", "shape1", "shape2")), imgsz=64))
    save_model(root / "classifier.pt", replace(classifier(), imgsz=64))
    return root


def common(root: Path, data: str = "boxes/data.yaml") -> list[object]:
    return ["--data", root / data, "--batch", 4, "--workers", 0, "--device", "cpu", "--img", 64, "--project", root]


def report_of(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


def test_the_backbone_of_a_detector(work: Path) -> None:
    call("--weights", work / "detector.pt", "--sparsity", 0.25, "--method", "fpgm", "--recalibrate", 2, "--name", "det", *common(work))
    report = report_of(work / "det")
    assert report["method"] == "FPGM" and report["criterion"] == "fpgm" and report["sparsity"] == 0.25
    page = (work / "det" / "report.html").read_text()
    assert "not what the channels were chosen by" in page and "largest score that was marked:" not in page
    assert report["oracle"]["difference"] <= report["oracle"]["bound"]
    assert report["pruned"]["params"] < report["before"]["params"] and "recalibrated" in report
    why = {x["name"]: x["kept"] for x in report["layers"]}
    assert why["model.7"] == "no part of the backbone" and why["model.0"] == ""
    assert load_model(report["pair"][1]).blocks == load_model(report["pair"][1], report["pair"][0]).blocks


def test_a_classifier_stays_one_without_a_detector(work: Path) -> None:
    call("--weights", work / "classifier.pt", "--recalibrate", 1, "--name", "cls", *common(work, "images"))
    report = report_of(work / "cls")
    assert {"before", "masked", "pruned", "recalibrated"} <= report.keys()
    assert report["masked"]["accuracy_top1"] == report["pruned"]["accuracy_top1"]
    assert report["oracle"]["difference"] <= report["oracle"]["bound"]
    assert load_model(report["pair"][1]).names == ("c0", "c1", "c2")


@pytest.mark.slow
def test_a_classifiers_backbone_in_both_kinds_of_detector(work: Path) -> None:
    call("--weights", work / "classifier.pt", "--into", work / "detector.pt", "--name", "into", *common(work))
    trained = report_of(work / "into")
    assert trained["weights"] == str(work / "detector.pt") and "--t_weight" in trained["commands"][0]["text"]
    call("--weights", work / "classifier.pt", "--cfg", work / "small.yaml", "--name", "fresh", *common(work))
    fresh = report_of(work / "fresh")
    assert "--t_weight" not in fresh["commands"][0]["text"], "an untrained network teaches nothing"
    stem = [load_model(r["pair"][1]).state["model.0.conv.weight"] for r in (trained, fresh)]
    assert torch.equal(*stem)
    assert load_model(fresh["pair"][1]).names == ("shape0", "shape1", "shape2")


def test_a_dry_run_writes_nothing(work: Path) -> None:
    call("--weights", work / "classifier.pt", "--dry-run", "--name", "dry", *common(work, "images"))
    assert not (work / "dry").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "--weights: give a detector, or a classifier"),
        (["--weights", "detector.pt", "--rounds", 2, "--epochs-per-round", 1, 2, 3], "3 numbers for 2 rounds"),
        (["--weights", "detector.pt", "--rounds", 2, "--dry-run"], "--dry-run shows one pruning"),
        (["--weights", "classifier.pt", "--into", "classifier.pt"], "classifier.pt: is a classifier, and this takes detectors"),
        (["--resume", "nowhere"], "--resume: no file nowhere"),
        (["--weights", "classifier.pt", "--into", "nowhere.pt"], "--into: no file nowhere.pt"),
        (["--weights", "detector.pt", "--epochs-per-round", 1], "--epochs-per-round is for the fine-tuning of --rounds"),
        (["--weights", "nowhere.pt", "--rounds", 2], "--weights: no file nowhere.pt"),
        (["--weights", "detector.pt", "--rounds", 2, "--hyp", "nowhere.yaml"], "--hyp: no file nowhere.yaml"),
        (["--weights", "detector.pt", "--rounds", 2, "--exclude", "model.99"], "--exclude model.99: matches no prunable"),
    ],
)  # fmt: skip
def test_wrong_flags_get_one_line(work: Path, args: list, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(work)
    with pytest.raises(InputError, match=message):
        call(*args, "--data", "boxes/data.yaml", "--workers", 0, "--project", work, "--name", "wrong")
    assert not (work / "wrong").exists()


# ---- rounds --------------------------------------------------------------------------------------------------------------------


def test_epochs_of_rounds() -> None:
    assert epochs_of(3, (5,)) == (5, 5, 5) and epochs_of(2, (1, 7)) == (1, 7)
    with pytest.raises(InputError, match="--rounds 0"):
        epochs_of(0, (1,))


class Killed(Exception):
    pass


def test_rounds_go_on_after_a_kill_as_if_there_had_been_none(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = ["--weights", work / "classifier.pt", "--rounds", 2, "--sparsity", 0.2, "--epochs-per-round", 1, 2, "--hyp", "hyp.digits.yaml"]
    call(*args, "--name", "whole", *common(work, "images"))
    real = backbone_rounds.train

    def dies(o: object) -> Path:
        if o.epochs == 2:
            raise Killed
        return real(o)

    monkeypatch.setattr(backbone_rounds, "train", dies)
    with pytest.raises(Killed):
        call(*args, "--name", "cut", *common(work, "images"))
    monkeypatch.setattr(backbone_rounds, "train", real)
    stamp = (work / "cut/round1/train/weights/last.pt").stat().st_mtime_ns
    call("--resume", work / "cut")
    assert (work / "cut/round1/train/weights/last.pt").stat().st_mtime_ns == stamp, "what was finished is not done again"
    rows = [json.loads((work / name / "rounds.json").read_text())["rounds"] for name in ("whole", "cut")]
    assert rows[0] == rows[1] and [r["round"] for r in rows[0]] == [1, 2]
    assert rows[0][1]["params"] < rows[0][0]["params"]
    a, b = (load_model(work / name / "round2/train/weights/last.pt").state for name in ("whole", "cut"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    first, second = (widths(load_model(report_of(work / f"whole/round{r}/prune")["pair"][1]).blocks)["model.5"] for r in (1, 2))
    full = widths(classifier().blocks)["model.5"]
    assert first == full - int(full * 0.2) and second == first - int(first * 0.2)


@pytest.mark.slow
def test_rounds_of_a_detector_map_the_backbone_once(work: Path) -> None:
    args = ["--weights", work / "classifier.pt", "--into", work / "detector.pt", "--rounds", 2, "--sparsity", 0.1, "--epochs-per-round", 1]
    call(*args, "--name", "detrounds", *common(work))
    rows = json.loads((work / "detrounds/rounds.json").read_text())["rounds"]
    assert len(rows) == 2 and rows[1]["params"] < rows[0]["params"] and rows[0]["measure"] == "map50"
    assert np.isfinite([r["tuned"] for r in rows]).all()


# ---- the official checkpoint ---------------------------------------------------------------------------------------------------

COCO, WEIGHTS = os.environ.get("COCO128_DIR"), os.environ.get("YOLOV5N_PT")


@pytest.mark.slow
@pytest.mark.skipif(not (COCO and WEIGHTS), reason="set COCO128_DIR (images/, labels/) and YOLOV5N_PT (the official v6.0 checkpoint)")
def test_a_sliced_neck_detects_where_one_made_anew_does_not(tmp_path: Path) -> None:
    data = dataset_yaml(Path(COCO), tmp_path)
    base = options("L2", 0.1)
    job = prepare(replace(base.run, weights=WEIGHTS, data=str(data), imgsz=320, device="cpu", workers=0))
    cut = backbone_cut(job.model, base)
    names = neck_entries(job.model.blocks, backbone_end(job.model.blocks))
    assert names == [f"model.{name}" for name in ("9.cv1", "13.cv1", "13.cv2", "17.cv1", "17.cv2")]
    network = replace(job.model, blocks=cut.blocks, state=dict(cut.state)).network()
    check_oracle(cut.masked, network, job.model.network(), job.bench)
    job.bench.measure("sliced", fuse(network), cut.blocks)
    torch.manual_seed(0)
    fresh = Network(cut.blocks).state_dict()
    anew = dict(cut.state) | {key: fresh[key] for key in (f"{name}.conv.weight" for name in names)}
    job.bench.measure("anew", fuse(replace(job.model, blocks=cut.blocks, state=anew).network()), cut.blocks)
    assert job.bench.stages["sliced"]["map50"] > 0.2 and job.bench.stages["anew"]["map50"] < 0.01
