"""The table of docs/sparsity.md: what a sparsity training left in the gammas, and what it is worth when it comes to cutting.

    python benchmarks/sparsity_methods.py RUN RUN ... --data data/digits.yaml --img 128      # run folders of train_sparsity.py

For each run's last.pt: the penalised gammas that are exactly zero and below 0.01, mAP@.5 on the validation split, and mAP@.5 after
prune.py at 50% and 60% and slim_prune.py at 70%, without any training.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from common import report

from engine.prune_run import ChannelOptions, PruneOptions, prepare, select_cut
from models.checkpoint import Model
from models.network import Network, fuse
from pruning.criteria import gamma_scores
from pruning.policy import PrunePolicy
from pruning.sparsity import penalised

CUTS = {
    "prune.py 0.5": PrunePolicy(0.5, "keep"),
    "prune.py 0.6": PrunePolicy(0.6, "keep"),
    "slim_prune.py 0.7": PrunePolicy(0.7, "union", 0.01),
}


def gammas_of(model: Model) -> np.ndarray:
    """|gamma| of all penalised batch norms of a checkpoint."""
    paths = set(penalised(model.blocks, shortcuts=True))
    return np.concatenate([g for i, g in gamma_scores(model.blocks, model.state).items() if model.blocks[i].bn_path in paths])


def measure(weights: Path, data: str, imgsz: int) -> dict[str, float]:
    """The row of one checkpoint."""
    job = prepare(PruneOptions(str(weights), data, "", imgsz=imgsz, device="cpu", workers=0))
    values = gammas_of(job.model)
    row = {"zero": float((values == 0).mean()), "below 0.01": float((values < 0.01).mean())}
    job.bench.measure("mAP@.5", fuse(job.model.network()), job.model.blocks)
    for name, policy in CUTS.items():
        cut = select_cut(job, ChannelOptions(policy))
        network = Network(cut.blocks).eval()
        network.load_state_dict(dict(cut.state))
        job.bench.measure(name, fuse(network), cut.blocks)
    return row | {stage: figures["map50"] for stage, figures in job.bench.stages.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--data", default="data/digits.yaml")
    parser.add_argument("--img", type=int, default=128)
    args = parser.parse_args()
    rows = {run.name: measure(run / "weights" / "last.pt", args.data, args.img) for run in args.runs}
    columns = list(next(iter(rows.values())))
    print(f"\n| run | {' | '.join(columns)} |\n|---|{'--:|' * len(columns)}")
    for name, row in rows.items():
        print(f"| {name} | " + " | ".join(f"{v:.1%}" if c in ("zero", "below 0.01") else f"{v:.3f}" for c, v in row.items()) + " |")
    report("sparsity_methods", f"{len(rows)} runs", rows=rows)


if __name__ == "__main__":
    main()
