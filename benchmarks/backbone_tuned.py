"""What a kept neck is worth after training: a pruned detector fine-tuned with its neck sliced, and with the neck's entry made anew.

    python train.py --cfg models/yolov5n.yaml --weights '' --data data/digits.yaml --hyp hyp.digits.yaml --img 128 --epochs 13 --optimizer AdamW --cos-lr
    python benchmarks/backbone_tuned.py --weights runs/train/exp/weights/best.pt     # about six minutes on two cores

25% of each backbone layer by L1, recalibrated, then `--epochs` of fine-tuning alike for both. What "made anew" is: benchmarks/backbone.py.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from dataclasses import replace
from pathlib import Path

from backbone import made_anew, measure
from common import report

from engine.backbone_run import BackboneOptions, backbone_cut
from engine.options import TrainOptions
from engine.prune_run import PruneOptions, prepare
from engine.session import train
from models.checkpoint import save_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", required=True)
    parser.add_argument("--data", default="data/digits.yaml")
    parser.add_argument("--imgsz", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=6)
    args = parser.parse_args()
    options = PruneOptions(args.weights, args.data, "", imgsz=args.imgsz, workers=0)
    job = prepare(options)
    measure(job, job.model.blocks, job.model.state)
    before = job.bench.stages["cut"]["map50"]
    cut = backbone_cut(job.model, BackboneOptions(options, "L1", 0.25))
    ways = {"sliced": dict(cut.state), "made anew": made_anew(cut.blocks, cut.state)}
    rows: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, state in ways.items():
            start = measure(job, cut.blocks, state)["recalibrated"]["map50"]
            weights = Path(folder) / f"{name}.pt"
            save_model(weights, replace(job.model, blocks=cut.blocks, state=state, training=None, epoch=-1))
            run = train(TrainOptions(
                args.data, str(weights), hyp="hyp.digits-finetune.yaml", epochs=args.epochs, imgsz=args.imgsz, workers=0, optimizer="AdamW",
                cos_lr=True, strict=True, cache="ram", project=folder, name=f"{name} run",
            ))  # fmt: skip
            with open(run / "results.csv", newline="", encoding="utf-8") as file:
                epochs = [float(row["metrics/mAP_0.5"]) for row in csv.DictReader(file, skipinitialspace=True)]
            rows[name] = [start, *epochs]
    print(
        f"\n| neck's entry | cut, recalibrated | {' | '.join(f'epoch {i + 1}' for i in range(args.epochs))} |\n|---|{'--:|' * (args.epochs + 1)}"
    )
    for name, values in rows.items():
        print(f"| {name} | {' | '.join(f'{v:.3f}' for v in values)} |")
    report("backbone_tuned", f"mAP@.5 of the full network {before:.3f}", rows=rows)


if __name__ == "__main__":
    main()
