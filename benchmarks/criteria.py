"""The table of docs/pruning.md: mAP@.5 for every criterion and script at an equal share, recalibrated, without any training.

    COCO128_DIR=... YOLOV5N_PT=... python benchmarks/criteria.py                 # 30% of the channels; about ten minutes on two cores
    COCO128_DIR=... YOLOV5N_PT=... python benchmarks/criteria.py --percent 0.1

The official YOLOv5n on the 128 validation images at 320 px. Recalibration sees 8 batches of 16 of the 128 training images.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from dataclasses import replace
from pathlib import Path

from common import ROOT, report

from engine.prune_run import ChannelOptions, Job, PruneOptions, prepare, select_cut
from engine.recalibrate import recalibrate, training_batches
from engine.scoring import Scoring
from models.blocks import flops, parameters
from models.network import fuse
from pruning.choices import CRITERIA
from pruning.policy import PrunePolicy

SCRIPTS = {
    "prune.py": ("keep", 0.0, 1),
    "shortcut_prune.py": ("first", 0.0, 1),
    "slim_prune.py": ("union", 0.01, 1),
    "slim_prune_8x.py": ("union", 0.01, 8),
}


def coco_yaml(folder: Path, coco: Path) -> Path:
    """A dataset yaml of COCO128's two halves, linked, so that no cache is written beside them."""
    for kind in ("images", "labels"):
        (folder / kind).mkdir()
        for split in ("train2017", "val2017"):
            (folder / kind / split).symlink_to(coco / kind / split)
    names = (ROOT / "data/coco.yaml").read_text(encoding="utf-8").partition("names:")[2]
    path = folder / "coco128.yaml"
    path.write_text(f"path: {folder}\ntrain: images/train2017\nval: images/val2017\nnc: 80\nnames:{names}", encoding="utf-8")
    return path


def measure(job: Job, criterion: str, script: str, percent: float) -> dict[str, float]:
    """What is left after one cut."""
    rule, layer_keep, divisor = SCRIPTS[script]
    cut = select_cut(job, ChannelOptions(PrunePolicy(percent, rule, layer_keep, divisor), Scoring(criterion)))
    network = replace(job.model, blocks=cut.blocks, state=dict(cut.state)).network()
    job.bench.measure("cut", fuse(network), cut.blocks)
    o = job.options
    recalibrate(network, training_batches(o.data, network, job.imgsz, o.batch_size, 8, job.device, o.workers))
    job.bench.measure("recalibrated", fuse(network), cut.blocks)
    full = job.model.blocks
    return {
        "cut": job.bench.stages["cut"]["map50"], "recalibrated": job.bench.stages["recalibrated"]["map50"],
        "params": 1 - sum(parameters(cut.blocks)) / sum(parameters(full)), "flops": 1 - sum(flops(cut.blocks)) / sum(flops(full)),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--percent", type=float, default=0.3)
    percent = parser.parse_args().percent
    weights, coco = os.environ.get("YOLOV5N_PT"), os.environ.get("COCO128_DIR")
    if not weights or not coco:
        raise SystemExit("set YOLOV5N_PT to the official yolov5n.pt and COCO128_DIR to the folder of its images and labels")
    with tempfile.TemporaryDirectory() as folder:
        job = prepare(PruneOptions(weights, str(coco_yaml(Path(folder), Path(coco))), "", imgsz=320, device="cpu", workers=0))
        job.bench.measure("full", fuse(job.model.network()), job.model.blocks)
        network = job.model.network()
        recalibrate(network, training_batches(job.options.data, network, job.imgsz, job.options.batch_size, 8, job.device, 0))
        job.bench.measure("full, recalibrated", fuse(network), job.model.blocks)
        rows = {c: {s: measure(job, c, s, percent) for s in SCRIPTS} for c in CRITERIA}
    print(f"\n{percent:.0%} of the channels; in each cell: mAP@.5 recalibrated (cut, FLOPs removed)\n")
    print(f"| criterion | {' | '.join(SCRIPTS)} |\n|---|{'--:|' * len(SCRIPTS)}")
    for criterion, row in rows.items():
        cells = [f"{r['recalibrated']:.3f} ({r['cut']:.3f}, {r['flops']:.0%})" for r in row.values()]
        print(f"| {criterion} | {' | '.join(cells)} |")
    full = [job.bench.stages[stage]["map50"] for stage in ("full", "full, recalibrated")]
    report("criteria", f"mAP@.5 of the full network {full[0]:.3f}, recalibrated {full[1]:.3f}", percent=percent, rows=rows)


if __name__ == "__main__":
    main()
