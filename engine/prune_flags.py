"""The flags that the pruning scripts share, what they become, and the names of the files that are written."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from pruning.choices import CRITERIA, EQUALIZE, NORMALIZE
from utils.errors import InputError
from utils.flags import Parser, add_cfg, add_device, add_run, add_size


@dataclass(frozen=True)
class Strategy:
    """What a script prunes like where no flag says otherwise. `equalize`: see `PrunePolicy`; `percent`: its default share."""

    percent: float
    equalize: str = "union"


def add_prune_flags(p: Parser, project: str = "runs/prune", required: bool = True) -> None:
    """What every pruning script takes. `required`: `--weights` must be given."""
    p.add_argument("--weights", required=required, help="any checkpoint: ours, a pruned one, a YOLOv5 .pt")
    add_cfg(p)
    p.add_argument("--data", default="data/digits.yaml", help="dataset .yaml, or Darknet .data")
    add_size(p, None)
    p.add_argument("--batch-size", "--batch", type=int, default=16, help="for evaluations, calibration and recalibration")
    add_device(p)
    p.add_argument(
        "--exclude", nargs="+", default=[], metavar="NAME|GLOB", help="convolutions to leave alone, such as model.9 or model.*.cv3"
    )
    p.add_argument(
        "--recalibrate", type=int, default=0, metavar="N", help="re-estimate batch norm statistics on N training batches after the cut"
    )
    p.add_argument("--dry-run", action="store_true", help="print the table; measure and write nothing")
    add_run(p, project)


def add_channel_flags(p: Parser, strategy: Strategy, percent: tuple[str, ...] = ("--percent",)) -> None:
    """How channels are judged and how many go. `percent`: the names of the flag that says the share."""
    p.add_argument(
        *percent, dest="percent", type=float, help=f"share of the pooled channels to prune, 0..1 (default: {strategy.percent:g})"
    )
    p.add_argument(
        "--target-params", metavar="X", help="instead of a share: prune down to this fraction (0.5) or number (1.2M) of parameters"
    )
    p.add_argument("--target-flops", metavar="X", help="the same for FLOPs (0.5, 2.1G) of one image of --img pixels")
    p.add_argument("--target-latency", metavar="X", help="the same for the latency (0.5, 12ms) at batch 1 on this machine")
    p.add_argument("--config", default="", metavar="FILE", help="shares layer by layer: a list in NNI's style, YAML or JSON")
    add_scoring_flags(p, "groups tied by a shortcut stay whole" if strategy.equalize == "keep" else strategy.equalize)
    p.add_argument("--min-filters", type=int, default=1, metavar="N", help="fewest channels that stay in any layer")


def add_scoring_flags(p: Parser, equalize: str) -> None:
    """How channels are judged. `equalize`: what is said of `--equalize` left out."""
    p.add_argument("--criterion", choices=CRITERIA, default="gamma", help="what a channel is judged by")
    p.add_argument(
        "--normalize", choices=NORMALIZE, default="", help="how scores of layers are made comparable; gamma, random: none, others: mean"
    )
    p.add_argument("--equalize", choices=EQUALIZE, default="", help=f"how the members of a group decide together; if left out: {equalize}")
    p.add_argument("--calibration-batches", type=int, default=8, metavar="N", help="training batches that --criterion taylor looks at")
    p.add_argument("--seed", type=int, default=0, help="for --criterion random, and for which images taylor sees")


def add_layer_keep(p: Parser) -> None:
    """`--layer_keep` of strategy 3 and its multiple-of-8 form."""
    p.add_argument("--layer_keep", type=float, default=0.01, help="share of each layer's channels that stays whatever their score")


def shared(args: argparse.Namespace) -> dict[str, Any]:
    """The shared flags as fields of `PruneOptions`, without `prefix`."""
    same = "weights data cfg dialect imgsz batch_size device workers recalibrate dry_run project name exist_ok"
    return {key: getattr(args, key) for key in same.split()} | {"exclude": tuple(args.exclude)}


def start(args: argparse.Namespace, strategy: Strategy, layer_keep: float | None = None, divisor: int = 1) -> None:
    """Prune channels as the flags say. (torch is imported only now: `--help` is instant.)"""
    amount = _amount(args)
    from engine.prune_run import ChannelOptions, PruneOptions, run
    from engine.scoring import Scoring
    from pruning.budget import parse_target
    from pruning.policy import PrunePolicy

    target = next((parse_target(what, text) for what, text in _targets(args).items()), None)
    percent = strategy.percent if args.percent is None else args.percent
    policy = PrunePolicy(percent, args.equalize or strategy.equalize, layer_keep or 0.0, divisor, args.min_filters)
    scoring = Scoring(args.criterion, args.normalize, args.calibration_batches, args.seed)
    words = [amount or f"{percent:g}", *([args.criterion] if args.criterion != "gamma" else [])]
    words += [f"keep_{layer_keep:g}"] if layer_keep is not None else []
    words += [f"{divisor}x"] if divisor > 1 else []
    run(
        PruneOptions(prefix=f"prune_{'_'.join(words)}_", **shared(args)),
        ChannelOptions(policy, scoring, args.config, target),
    )


def _targets(args: argparse.Namespace) -> dict[str, str]:
    every = {"params": args.target_params, "flops": args.target_flops, "latency": args.target_latency}
    return {what: text for what, text in every.items() if text is not None}


def _amount(args: argparse.Namespace) -> str:
    """What file names say of how much is pruned (empty: the percentage). Raises `InputError` where flags contradict each other."""
    targets = _targets(args)
    if len(targets) > 1:
        raise InputError(f"{' and '.join('--target-' + what for what in targets)}: give one budget")
    if args.percent is not None and (targets or args.config):
        other = f"--target-{next(iter(targets))}" if targets else "--config"
        raise InputError(f"a percentage and {other}: each says how much to prune; give one of them")
    if targets:
        return "_".join(f"{what}_{text}" for what, text in targets.items())
    return "config" if args.config else ""
