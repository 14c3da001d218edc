"""The official YOLOv5n checkpoint on real COCO images gives YOLOv5's own figures. Needs COCO128_DIR and YOLOV5N_PT; skipped elsewhere."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from benchmarks.reference import FIGURES, ROWS, TOLERANCES, Row, converted, dataset_yaml, measure
from engine import val_run
from utils.device import Precision

COCO, WEIGHTS = os.environ.get("COCO128_DIR"), os.environ.get("YOLOV5N_PT")
pytestmark = pytest.mark.skipif(
    not (COCO and WEIGHTS), reason="set COCO128_DIR (images/, labels/) and YOLOV5N_PT (the official v6.0 checkpoint)"
)
SMALL = ROWS[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reference")


@pytest.fixture(scope="module")
def data(folder: Path) -> Path:
    return dataset_yaml(Path(COCO), folder)


@pytest.fixture(scope="module")
def pair(folder: Path) -> tuple[str, str]:
    return converted(Path(WEIGHTS), folder)


def _is_quick(row: Row, source: str, fuse: bool) -> bool:
    return row is SMALL and source == "pair" and fuse


CASES = [
    pytest.param(
        row, source, fuse,
        id=f"{row.split}-{row.imgsz}-{source}-{'fused' if fuse else 'unfused'}",
        marks=[] if _is_quick(row, source, fuse) else [pytest.mark.slow],
    )
    for row in ROWS for source in ("pt", "pair") for fuse in (False, True)
]  # fmt: skip


@pytest.mark.parametrize(("row", "source", "fuse"), CASES)
def test_the_published_row(row: Row, source: str, fuse: bool, data: Path, pair: tuple[str, str], folder: Path) -> None:
    metrics = measure(row, *((WEIGHTS, "") if source == "pt" else pair), fuse, data, folder)
    assert (metrics["images"], metrics["instances"]) == (128, row.instances)
    for key, published, tolerance in zip(FIGURES, row.published, TOLERANCES):
        assert metrics[key] == pytest.approx(published, abs=tolerance), key


@pytest.mark.slow
def test_pycocotools_agrees_on_what_is_found(data: Path, folder: Path) -> None:
    """It interpolates otherwise and takes 100 detections per image, so the figures are near, not equal; the ids are COCO's."""
    pytest.importorskip("pycocotools")
    metrics = measure(SMALL, WEIGHTS, "", True, data, folder, save_json=True)
    assert metrics["coco"] == pytest.approx({"map": metrics["map"], "map50": metrics["map50"]}, abs=0.02)


@pytest.mark.slow
def test_bfloat16_is_near_float32(data: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = measure(SMALL, WEIGHTS, "", True, data, folder)
    monkeypatch.setattr(val_run, "inference_precision", lambda device, half: Precision(device, torch.bfloat16))
    half = measure(SMALL, WEIGHTS, "", True, data, folder, half=True)
    assert half["map50"] != full["map50"]
    assert half["map50"] == pytest.approx(full["map50"], abs=0.003)
    assert half["map"] == pytest.approx(full["map"], abs=0.005)
