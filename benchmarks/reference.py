"""The official YOLOv5n on 128 real COCO images: our figures beside those of YOLOv5's own code.

    COCO128_DIR=... YOLOV5N_PT=... python benchmarks/reference.py        # two cores: about five minutes
    COCO128_DIR=... YOLOV5N_PT=... python benchmarks/reference.py --quick  # the 320 px row only

COCO128_DIR holds images/{train,val}2017 and labels/{train,val}2017 (the first 128 of each); YOLOV5N_PT is the v6.0 checkpoint. Each
row is measured from the `.pt` and from the cfg + weights pair converted from it, as it is and with its batch norms folded.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

FIGURES = ("precision", "recall", "map50", "map")
TOLERANCES = (0.02, 0.02, 0.002, 0.002)


@dataclass(frozen=True)
class Row:
    """One row of the published table. YOLOv5's protocol: confidence 0.001, IoU 0.6, rectangular batches of 16, float32."""

    split: str
    imgsz: int
    instances: int
    published: tuple[float, float, float, float]


ROWS = (
    Row("val2017", 640, 898, (0.635, 0.438, 0.506, 0.336)),
    Row("train2017", 640, 929, (0.616, 0.413, 0.465, 0.308)),
    Row("val2017", 320, 898, (0.473, 0.419, 0.455, 0.296)),
)


def dataset_yaml(coco: Path, folder: Path) -> Path:
    """Write the data set's yaml into `folder`, and links to it, so that its label caches do not fall into the reference data."""
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        for split in ("train2017", "val2017"):
            (folder / kind / split).symlink_to(coco.resolve() / kind / split)
    path = folder / "coco.yaml"
    path.write_text(f"path: {folder}\ntrain: images/train2017\nval: images/val2017\nnc: 80\n", encoding="utf-8")
    return path


def converted(weights: Path, folder: Path) -> tuple[str, str]:
    """Convert a checkpoint into a pair in `folder`; return weights and cfg."""
    from models import convert

    convert.main([str(weights), "--out", str(folder / "pair.cfg")])
    return str(folder / "pair.pt"), str(folder / "pair.cfg")


def measure(row: Row, weights: str, cfg: str, fuse: bool, data: Path, folder: Path, **options: object) -> dict:
    """`metrics.json` of one evaluation."""
    from engine.val_run import ValOptions, validate

    task = row.split.removesuffix("2017")
    run = ValOptions(
        weights, str(data), cfg, row.imgsz, 16, task=task, device="cpu", fuse=fuse, plots=False, project=str(folder), name="run", **options
    )
    return json.loads((validate(run) / "metrics.json").read_text(encoding="utf-8"))


def lines(rows: tuple[Row, ...], coco: Path, weights: Path, folder: Path) -> Iterator[str]:
    """The table in Markdown, line by line."""
    yield "| images | size | from | P | R | mAP@.5 | mAP@.5:.95 | within |"
    yield "|---|---|---|---|---|---|---|---|"
    data, pair = dataset_yaml(coco, folder), converted(weights, folder)
    for row in rows:
        start = f"| {row.split} (128) | {row.imgsz} |"
        yield f"{start} published | " + " | ".join(f"{v:.3f}" for v in row.published) + " | |"
        for source, (file, cfg) in {".pt": (str(weights), ""), "pair": pair}.items():
            for fuse in (False, True):
                metrics = measure(row, file, cfg, fuse, data, folder)
                got = [metrics[k] for k in FIGURES]
                within = all(abs(a - b) <= t for a, b, t in zip(got, row.published, TOLERANCES)) and metrics["instances"] == row.instances
                what = f"{source}, {'fused' if fuse else 'unfused'}"
                yield f"{start} {what} | " + " | ".join(f"{v:.4f}" for v in got) + f" | {'yes' if within else 'NO'} |"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--quick", action="store_true", help="the 320 px row only")
    args = p.parse_args()
    coco, weights = os.environ.get("COCO128_DIR"), os.environ.get("YOLOV5N_PT")
    if not (coco and weights):
        sys.exit("set COCO128_DIR (images/, labels/) and YOLOV5N_PT (the official v6.0 checkpoint)")
    with tempfile.TemporaryDirectory() as folder:
        table = list(lines(ROWS[2:] if args.quick else ROWS, Path(coco), Path(weights), Path(folder)))
    print("\n".join(table))


if __name__ == "__main__":
    main()
