"""The tables of docs/export.md on int8: what calibration without training costs the official YOLOv5n, by method and program.

    COCO128_DIR=... YOLOV5N_PT=... python benchmarks/calibration.py            # two cores: about five minutes
    COCO128_DIR=... YOLOV5N_PT=... python benchmarks/calibration.py --img 320 --images 16 32 64 128 --methods percentile

Ranges are found on images of train2017 and mAP is measured on val2017, 128 each, of which calibration sees none; and on train2017 too. The files
take any size (`--dynamic`), so that images are padded as little as for a checkpoint. COCO128_DIR and YOLOV5N_PT as in benchmarks/reference.py.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

from common import report
from reference import dataset_yaml

from engine.export_run import ExportOptions, export
from engine.val_run import ValOptions, validate
from utils.thresholds import METHODS

SPLITS = ("val", "train")
PROGRAMS = {"onnx": "ONNX Runtime", "openvino": "OpenVINO"}
ALLOWED = 0.02  # of mAP@.5
Figures = dict[str, tuple[float, float]]  # split -> mAP@.5, mAP@.5:.95


def measured(file: Path, data: Path, imgsz: int, folder: Path) -> Figures:
    """mAP of one exported file on each split."""
    found = {}
    for split in SPLITS:
        options = ValOptions(str(file), str(data), imgsz=imgsz, batch_size=16, task=split, plots=False, project=str(folder), name="val")
        metrics = json.loads((validate(options) / "metrics.json").read_text(encoding="utf-8"))
        found[split] = metrics["map50"], metrics["map"]
    return found


def exported(weights: Path, imgsz: int, **int8: object) -> dict[str, Path]:
    """The files of both programs."""
    formats = tuple(PROGRAMS)
    return dict(zip(formats, export(ExportOptions(str(weights), formats, imgsz=(imgsz,), dynamic=True, **int8))))


def row(name: str, program: str, found: Figures, first: Figures) -> str:
    cells = [f"{found[s][0]:.4f} / {found[s][1]:.4f} | {found[s][0] - first[s][0]:+.4f}" for s in SPLITS]
    return f"| {name} | {program} | {' | '.join(cells)} |"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--img", type=int, default=640)
    p.add_argument("--images", type=int, nargs="+", default=[128])
    p.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    args = p.parse_args()
    coco, weights = os.environ.get("COCO128_DIR"), os.environ.get("YOLOV5N_PT")
    if not (coco and weights):
        sys.exit("set COCO128_DIR (images/, labels/) and YOLOV5N_PT (the official v6.0 checkpoint)")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data, model = dataset_yaml(Path(coco), folder), folder / "yolov5n.pt"
        model.symlink_to(Path(weights).resolve())
        first = measured(exported(model, args.img)["onnx"], data, args.img, folder)
        rows, worst = [row("float32", "ONNX Runtime", first, first)], dict.fromkeys(args.methods, 0.0)
        for method in args.methods:
            for images in args.images:
                files = exported(model, args.img, int8=True, data=str(data), calibration=method, calibration_images=images)
                for kind, file in files.items():
                    found = measured(file, data, args.img, folder)
                    rows.append(row(f"{method}, {images} images", PROGRAMS[kind], found, first))
                    worst[method] = max(worst[method], *(first[s][0] - found[s][0] for s in SPLITS))
    print(
        f"\n{args.img} px\n\n| ranges | program | val2017: mAP@.5 / mAP@.5:.95 | change | train2017 | change |\n|---|---|--:|--:|--:|--:|"
    )
    print("\n".join(rows))
    told = ", ".join(f"{method} {lost:.4f} ({'within' if lost <= ALLOWED else 'beyond'} {ALLOWED})" for method, lost in worst.items())
    report("calibration", f"int8 loses of mAP@.5 at most: {told}", img=args.img, worst={m: round(v, 4) for m, v in worst.items()})


if __name__ == "__main__":
    main()
