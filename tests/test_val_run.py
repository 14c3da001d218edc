"""val.py's runs: `--save-json` judged by pycocotools, `--task speed`, `--augment`, `--half`."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import val
from engine import coco_json, val_run
from engine.inference import keep_ends_in_float32
from engine.val_run import ValOptions, validate
from models.checkpoint import Model, load_model, save_model
from models.network import fuse
from tests.helpers import alive, small, write_dataset
from utils import device as device_module
from utils.device import inference_precision
from utils.errors import InputError


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint and data on which it finds something: the labels of the images are some of its own detections, moved a little."""
    root = tmp_path_factory.mktemp("val")
    data = write_dataset(root / "data", images=8)
    network = alive(small(), seed=3)
    save_model(root / "m.pt", Model(network.blocks, network.state_dict(), ("a", "b", "c"), 64))
    options = ValOptions(
        str(root / "m.pt"), str(data), conf_thres=0.3, workers=0, save_txt=True, plots=False, project=str(root), name="own"
    )
    validate(options)
    rng = np.random.default_rng(0)
    for path in (root / "own/labels").glob("*.txt"):
        rows = np.loadtxt(path, ndmin=2)
        rows = rows[rng.permutation(len(rows))[:6]]
        rows[:, 3:] *= rng.uniform(0.7, 1.0, (len(rows), 2))
        np.savetxt(root / "data/labels/val" / path.name, rows, fmt="%g")
    return root


def run(work: Path, out: Path, **options: object) -> dict:
    """metrics.json of a run without pictures."""
    weights, data = str(work / "m.pt"), str(work / "data/data.yaml")
    folder = validate(ValOptions(weights, data, workers=0, device="cpu", plots=False, project=str(out), name="v", **options))
    return json.loads((folder / "metrics.json").read_text())


def test_save_json_gives_what_pycocotools_gives_on_its_file(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The judge is run here once more, on the written file and on annotations built from the label files by hand."""
    coco = pytest.importorskip("pycocotools.coco").COCO
    from pycocotools.cocoeval import COCOeval

    metrics = run(work, tmp_path, save_json=True)
    truth: dict[str, list] = {"images": [], "annotations": [], "categories": [{"id": i, "name": str(i)} for i in range(3)]}
    for path in sorted((work / "data/labels/val").glob("*.txt")):
        truth["images"].append({"id": int(path.stem)})
        for c, x, y, w, h in np.loadtxt(path, ndmin=2):
            box = [64 * max(x - w / 2, 0), 64 * max(y - h / 2, 0), 64 * min(x + w / 2, 1), 64 * min(y + h / 2, 1)]
            box = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
            number = len(truth["annotations"]) + 1
            truth["annotations"].append(
                {"id": number, "image_id": int(path.stem), "category_id": int(c), "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
            )
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    reference = coco(str(tmp_path / "truth.json"))
    judge = COCOeval(reference, reference.loadRes(str(tmp_path / "v/m_predictions.json")), "bbox")
    judge.evaluate()
    judge.accumulate()
    judge.summarize()
    assert judge.stats[1] > 0.02, "something is found"
    assert metrics["coco"] == pytest.approx({"map": judge.stats[0], "map50": judge.stats[1]}, abs=1e-3)
    assert metrics["coco"]["map50"] == pytest.approx(metrics["map50"], abs=0.05), "other interpolation, same detections"
    assert "pycocotools on the labels: mAP50" in capsys.readouterr().out


def test_the_rows_of_the_json(work: Path, tmp_path: Path) -> None:
    run(work, tmp_path, save_json=True, conf_thres=0.3)
    rows = json.loads((tmp_path / "v/m_predictions.json").read_text())
    assert rows and {tuple(r) for r in rows} == {("image_id", "category_id", "bbox", "score")}
    for row in rows:
        assert row["image_id"] in range(8) and row["category_id"] in range(3)
        assert [round(v, 3) for v in row["bbox"]] == row["bbox"] and round(row["score"], 5) == row["score"]
        x, y, w, h = row["bbox"]
        assert x >= 0 and y >= 0 and x + w <= 64.001 and y + h <= 64.001


def test_ids() -> None:
    def ids(*names: str) -> list[int | str]:
        return list(coco_json.image_ids([Path(n) for n in names]).values())

    assert ids("a/000139.jpg", "a/000285.jpg") == [139, 285]
    assert ids("a/000139.jpg", "a/cat.jpg") == ["000139", "cat"], "pycocotools sorts the ids, so they are of one kind"
    assert ids("a/1.jpg", "a/01.jpg") == ["1", "01"]
    assert ids("a/1.jpg", "b/1.jpg") == [str(Path("a/1.jpg")), str(Path("b/1.jpg"))]
    coco = ["person", *(f"c{i}" for i in range(78)), "toothbrush"]
    assert coco_json.category_ids(coco)[:13] == (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 14)
    assert coco_json.category_ids(coco)[-1] == 90 and len(set(coco_json.category_ids(coco))) == 80
    assert coco_json.category_ids(["a"] * 80) == tuple(range(80))


def test_cocos_own_annotations_are_preferred(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    names = ["person", *(f"c{i}" for i in range(78)), "toothbrush"]
    for folder in ("images/val2017", "annotations"):
        (tmp_path / folder).mkdir(parents=True)
    file = tmp_path / "annotations/instances_val2017.json"
    file.write_text(json.dumps({"images": [{"id": 7}], "annotations": [], "categories": []}))
    for source in (tmp_path / "images/val2017", tmp_path / "val2017.txt"):
        assert coco_json.official_truth([source], [7], names)[0] == file
        assert coco_json.official_truth([source], [7], ["a"]) is None
        assert coco_json.official_truth([source], [7, 8], names) is None and "has no image 8" in capsys.readouterr().out
    file.write_text("[]")
    with pytest.raises(InputError, match="not a COCO annotation file"):
        coco_json.official_truth([tmp_path / "val2017.txt"], [7], names)


def test_without_pycocotools_the_json_is_written_and_one_line_says_what_to_install(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
    metrics = run(work, tmp_path, save_json=True)
    assert "coco" not in metrics and json.loads((tmp_path / "v/m_predictions.json").read_text())
    assert "pip install pycocotools" in capsys.readouterr().out


def test_nothing_found_is_judged_0(work: Path, tmp_path: Path) -> None:
    pytest.importorskip("pycocotools")
    assert run(work, tmp_path, save_json=True, conf_thres=0.9999)["coco"] == {"map": 0.0, "map50": 0.0}


def test_task_speed_uses_squares_and_the_thresholds_of_detection(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}

    def spy(network, loader, precision, options, **sinks):
        seen.update(options=options, dataset=loader.dataset.options)
        return real(network, loader, precision, options, **sinks)

    real = val_run.evaluate
    monkeypatch.setattr(val_run, "evaluate", spy)
    assert run(work, tmp_path, task="speed")["images"] == 8
    assert (seen["options"].conf_thres, seen["options"].iou_thres) == (0.25, 0.45)
    assert not seen["dataset"].rect and seen["dataset"].pad == 0


def test_augment_and_fusing(work: Path, tmp_path: Path) -> None:
    plain = run(work, tmp_path / "plain")
    augmented = run(work, tmp_path / "augmented", augment=True)
    assert augmented["map50"] != plain["map50"] and augmented["images"] == 8
    unfused = run(work, tmp_path / "unfused", fuse=False)
    assert [unfused[k] for k in ("map50", "map", "precision", "recall")] == pytest.approx(
        [plain[k] for k in ("map50", "map", "precision", "recall")], abs=1e-3
    )


def test_names_come_from_the_checkpoint_where_the_data_has_none(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    spec = yaml.safe_load((work / "data/data.yaml").read_text())
    del spec["names"]
    (tmp_path / "bare.yaml").write_text(yaml.safe_dump(spec))
    model = load_model(work / "m.pt")
    save_model(tmp_path / "m.pt", replace(model, names=("ant", "bee", "cat")))
    validate(ValOptions(str(tmp_path / "m.pt"), str(tmp_path / "bare.yaml"), workers=0, plots=False, project=str(tmp_path)))
    assert " bee " in capsys.readouterr().out


def test_the_flags_reach_the_options(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[ValOptions] = []
    monkeypatch.setattr(val_run, "validate", seen.append)
    val.main("--weights w.pt --data d.yaml --img 96 --batch 4 --task speed --augment --half --save-json --save_txt --max-det 7".split())
    assert seen == [
        ValOptions("w.pt", "d.yaml", "", 96, 4, max_det=7, task="speed", augment=True, half=True, save_json=True, save_txt=True)
    ]


def test_the_ends_stay_in_float32_under_bfloat16() -> None:
    for network in (alive(small()), fuse(alive(small()))):
        images = torch.rand(1, 3, 64, 64)
        with torch.no_grad():
            exact = network(images)
            with torch.autocast("cpu", torch.bfloat16):
                rounded = network(images)
                keep_ends_in_float32(network)
                mixed = network(images)
            plain = network(images)
        assert all(m.dtype == torch.bfloat16 for m in rounded) and all(m.dtype == torch.float32 for m in mixed)
        for a, b, c, d in zip(exact, rounded, mixed, plain):
            assert 0 < (c - a).abs().mean() < (b.float() - a).abs().mean(), "nearer to float32, yet not float32"
            assert torch.equal(a, d), "without autocast nothing changes"


def test_half(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    cpu = torch.device("cpu")
    assert inference_precision(cpu, False).autocast_dtype is None
    monkeypatch.setattr(device_module, "cpu_accelerates_bfloat16", lambda: True)
    assert inference_precision(cpu, True).autocast_dtype == torch.bfloat16
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(device_module, "cpu_accelerates_bfloat16", lambda: False)
    assert inference_precision(cpu, True).autocast_dtype is None
    assert "--half" in capsys.readouterr().out
    assert inference_precision(torch.device("cuda"), True).autocast_dtype == torch.float16
