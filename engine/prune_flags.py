"""The flags that the pruning scripts share, and the names of the files they write."""

from __future__ import annotations

import argparse
from typing import Any

from utils.flags import Parser, add_device, add_run, add_size


def add_prune_flags(p: Parser) -> None:
    """What all four pruning scripts take."""
    p.add_argument("--weights", required=True, help="any checkpoint: ours, a pruned one, a YOLOv5 .pt")
    p.add_argument("--cfg", default="", help="structure (.yaml or .cfg) if not the checkpoint's own")
    p.add_argument("--data", default="data/digits.yaml", help="dataset .yaml, or Darknet .data")
    add_size(p, None)
    p.add_argument("--batch-size", "--batch", type=int, default=16, help="for the evaluations")
    add_device(p)
    p.add_argument(
        "--exclude", nargs="+", default=[], metavar="NAME|GLOB", help="convolutions to leave alone, such as model.9 or model.*.cv3"
    )
    add_run(p, "runs/prune")


def add_percent(p: Parser, default: float) -> None:
    """`--percent` of strategies 1 and 2."""
    p.add_argument("--percent", type=float, default=default, help="share of the pooled channels to prune, 0..1")


def add_global_percent(p: Parser, default: float) -> None:
    """`--global_percent` and `--layer_keep` of strategy 3 and its multiple-of-8 form."""
    p.add_argument("--global_percent", "--percent", type=float, default=default, help="share of all channels to prune, 0..1")
    p.add_argument("--layer_keep", type=float, default=0.01, help="share of each layer's channels that stays whatever their gamma")


def shared(args: argparse.Namespace) -> dict[str, Any]:
    """The shared flags as fields of `PruneOptions`."""
    same = "weights data cfg imgsz batch_size device workers project name exist_ok"
    return {key: getattr(args, key) for key in same.split()} | {"exclude": tuple(args.exclude)}
