"""The table of docs/backbone.md: mAP of a detector with a pruned backbone before any training, its neck sliced or made anew at its entry.

    COCO128_DIR=... YOLOV5N_PT=... python benchmarks/backbone.py         # three minutes on two cores

The official YOLOv5n on the 128 validation images at 320 px, L1, L2 and FPGM at 10% and 25%, recalibrated on 8 batches of 16 training images.
"Made anew": the convolutions that read the backbone get new random weights (PyTorch's default), as in the NNI-based repository before us.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from common import report
from criteria import coco_yaml

from engine.backbone_run import BackboneOptions, backbone_cut
from engine.prune_run import Job, PruneOptions, prepare
from engine.recalibrate import recalibrate, training_batches
from models.blocks import Blocks, flops, parameters
from models.network import Network, fuse
from pruning.backbone import METHODS, backbone_end, neck_entries

SPARSITIES = (0.0, 0.1, 0.25)


def made_anew(blocks: Blocks, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`state` with new random weights in the entries of the neck."""
    torch.manual_seed(0)
    fresh = Network(blocks).state_dict()
    keys = {f"{name}.conv.weight" for name in neck_entries(blocks, backbone_end(blocks))}
    return {k: fresh[k] if k in keys else v for k, v in state.items()}


def measure(job: Job, blocks: Blocks, state: Mapping[str, torch.Tensor]) -> dict[str, dict[str, float]]:
    """mAP@.5 and @.5:.95 as cut and recalibrated."""
    network = replace(job.model, blocks=blocks, state=dict(state)).network()
    job.bench.measure("cut", fuse(network), blocks)
    o = job.options
    recalibrate(network, training_batches(o.data, network, job.imgsz, o.batch_size, 8, job.device, o.workers))
    job.bench.measure("recalibrated", fuse(network), blocks)
    return {stage: {key: job.bench.stages[stage][key] for key in ("map50", "map")} for stage in ("cut", "recalibrated")}


def main() -> None:
    weights, coco = os.environ.get("YOLOV5N_PT"), os.environ.get("COCO128_DIR")
    if not weights or not coco:
        raise SystemExit("set YOLOV5N_PT to the official yolov5n.pt and COCO128_DIR to the folder of its images and labels")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        options = PruneOptions(weights, str(coco_yaml(Path(folder), Path(coco))), "", imgsz=320, device="cpu", workers=0)
        job = prepare(options)
        full = job.model.blocks
        for sparsity in SPARSITIES:
            for method in METHODS if sparsity else ("L1",):
                cut = backbone_cut(job.model, BackboneOptions(options, method, sparsity))
                rows.append({
                    "method": method, "sparsity": sparsity, "params": 1 - sum(parameters(cut.blocks)) / sum(parameters(full)),
                    "flops": 1 - sum(flops(cut.blocks)) / sum(flops(full)), "sliced": measure(job, cut.blocks, cut.state),
                    "anew": measure(job, cut.blocks, made_anew(cut.blocks, cut.state)),
                })  # fmt: skip
    print(
        "\n| method, share | parameters, FLOPs removed | sliced: cut | sliced, recalibrated | entries made anew, recalibrated |\n|---|--:|--:|--:|--:|"
    )
    for r in rows:
        cells = [f"{r['params']:.1%}, {r['flops']:.1%}"]
        for way, stage in (("sliced", "cut"), ("sliced", "recalibrated"), ("anew", "recalibrated")):
            cells.append(f"{r[way][stage]['map50']:.3f} / {r[way][stage]['map']:.3f}")
        print(f"| {r['method']}, {r['sparsity']:.0%} | {' | '.join(cells)} |")
    report("backbone", f"entries of the neck: {', '.join(neck_entries(full, backbone_end(full)))}; mAP@.5 / @.5:.95", rows=rows)


if __name__ == "__main__":
    main()
