"""The official YOLOv5n checkpoint on real COCO images gives YOLOv5's own figures. Needs COCO128_DIR and YOLOV5N_PT; skipped elsewhere."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

COCO, WEIGHTS = os.environ.get("COCO128_DIR"), os.environ.get("YOLOV5N_PT")
pytestmark = pytest.mark.skipif(
    not (COCO and WEIGHTS), reason="set COCO128_DIR (images/, labels/) and YOLOV5N_PT (the official v6.0 checkpoint)"
)


@pytest.mark.parametrize("source", ["pt", "pair"])
def test_the_320_px_row(source: str, tmp_path: Path) -> None:
    import val
    from models import convert

    data = tmp_path / "coco.yaml"
    data.write_text(f"path: {COCO}\ntrain: images/train2017\nval: images/val2017\nnc: 80\n")
    flags = ["--weights", WEIGHTS]
    if source == "pair":
        convert.main([WEIGHTS, "--out", str(tmp_path / "pair.cfg")])
        flags = ["--weights", str(tmp_path / "pair.pt"), "--cfg", str(tmp_path / "pair.cfg")]
    val.main(
        [
            *flags,
            "--data",
            str(data),
            "--img",
            "320",
            "--batch",
            "16",
            "--project",
            str(tmp_path),
            "--name",
            "v",
            "--device",
            "cpu",
            "--workers",
            "0",
        ]
    )
    metrics = json.loads((tmp_path / "v/metrics.json").read_text())
    assert metrics["instances"] == 898
    assert metrics["map50"] == pytest.approx(0.455, abs=0.005)
    assert metrics["map"] == pytest.approx(0.296, abs=0.005)
    assert (metrics["precision"], metrics["recall"]) == pytest.approx((0.473, 0.419), abs=0.02)
