"""The flags that the training scripts share, and how they become `TrainOptions`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from engine.options import TrainOptions
from utils.errors import InputError
from utils.flags import Parser, add_cfg, add_device, add_run, add_size


def add_train_flags(p: Parser, epochs: int, hyp: str = "hyp.scratch-low.yaml", project: str = "runs/train") -> None:
    """YOLOv5's training flags."""
    p.add_argument("--weights", default="", help="checkpoint to start from: ours or a YOLOv5 .pt; empty: from scratch")
    add_cfg(p, "--model-cfg", "--yaml-cfg", text="structure: a model .yaml or a .cfg; empty: the checkpoint's own")
    p.add_argument("--data", default="data/digits.yaml", help="dataset .yaml, or Darknet .data")
    p.add_argument("--hyp", default=hyp, help="hyper-parameters (a path, or a name in data/hyps)")
    p.add_argument("--epochs", type=int, default=epochs)
    p.add_argument("--batch-size", "--batch", type=int, default=16, help="images per batch over all processes; -1: as many as fit on CUDA")
    add_size(p)
    p.add_argument("--rect", action="store_true", help="rectangular batches, no mosaic")
    p.add_argument("--quad", action="store_true", help="join four images of a batch into one, at twice the size or tiled")
    p.add_argument("--multi-scale", action="store_true", help="vary the image size by +-50%% from batch to batch")
    p.add_argument("--image-weights", action="store_true", help="draw images with rare or badly found classes more often")
    p.add_argument("--sync-bn", action="store_true", help="batch norm statistics over all processes (CUDA, under torchrun)")
    p.add_argument(
        "--resume", nargs="?", const="newest", default="", help="continue a run: the path of its last.pt, or nothing for the newest"
    )
    p.add_argument("--nosave", action="store_true", help="save the last epoch only")
    p.add_argument("--noval", action="store_true", help="evaluate the last epoch only")
    p.add_argument("--noautoanchor", action="store_true", help="keep the anchors as they are")
    p.add_argument("--cache", nargs="?", const="ram", default=None, choices=["ram", "disk"], help="keep images in memory or as .npy files")
    add_device(p, workers=False)
    p.add_argument("--workers", type=int, help="loader processes, no more than CPUs (default: 8; with --resume, as before)")
    p.add_argument("--single-cls", action="store_true", help="treat all classes as one")
    p.add_argument("--optimizer", default="SGD", choices=["SGD", "Adam", "AdamW"])
    p.add_argument("--adam", action="store_true", help="the same as --optimizer Adam")
    p.add_argument("--cos-lr", action="store_true", help="cosine instead of linear learning rate")
    p.add_argument("--label-smoothing", type=float, default=0.0)
    p.add_argument("--patience", type=int, default=100, help="stop after so many epochs without a better result; 0: never")
    p.add_argument("--freeze", nargs="+", type=int, default=[0], help="freeze the first N layers, or the layers listed")
    p.add_argument("--save-period", type=int, default=-1, help="also save epochN.pt every so many epochs")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--no-amp", action="store_true", help="float32 even where a faster precision is available")
    p.add_argument(
        "--recipe",
        "--sparsification-recipe",
        default="",
        help="a recipe (.yaml, .yml, .md) whose modifiers drive the run: pruning, QAT, rates",
    )
    p.add_argument("--recipe-args", default="", help="values for the recipe's variables: NAME=VALUE,NAME=VALUE or a JSON object")
    p.add_argument(
        "--t_weight",
        "--teacher-weights",
        default="",
        help="the teacher's checkpoint, for a recipe's DistillationModifier; self: that of --weights",
    )
    p.add_argument("--t_cfg", default="", help="the teacher's structure; empty: the checkpoint's own")
    add_run(p, project)


def train_options(args: argparse.Namespace, distill: bool = False, **extra: Any) -> TrainOptions:
    """`TrainOptions` from the shared flags; `extra` are those of one script. `distill`: the teacher acts throughout, whatever a recipe says."""
    name = Path(args.cfg).stem if args.name == "cfg" and args.cfg else args.name
    same = (
        "weights cfg dialect data hyp epochs batch_size imgsz rect quad multi_scale image_weights sync_bn nosave noval noautoanchor cache device workers single_cls "
        "cos_lr label_smoothing patience save_period seed project exist_ok recipe recipe_args"
    )
    values = {key: getattr(args, key) for key in same.split()}
    values["workers"] = 8 if args.workers is None else args.workers
    teacher, values["teacher_cfg"] = _teacher(args, extra.get("strict", False))
    values["teacher" if distill else "recipe_teacher"] = teacher
    return TrainOptions(
        **values, name=name, optimizer="Adam" if args.adam else args.optimizer, freeze=tuple(args.freeze), amp=not args.no_amp, **extra
    )


def _teacher(args: argparse.Namespace, strict: bool) -> tuple[str, str]:
    """The teacher's checkpoint and structure: of `self`, those that the run itself starts from."""
    if args.t_weight != "self":
        return args.t_weight, args.t_cfg
    if not args.weights and not args.resume:
        raise InputError("--t_weight self is the checkpoint that the run starts from; give --weights")
    return args.weights, args.t_cfg or (args.cfg if strict else "")


def start(args: argparse.Namespace, options: TrainOptions) -> None:
    """Train as `options` say, or continue the run that `--resume` names. (torch is imported only now: `--help` is instant.)"""
    from engine.session import resume, train

    if args.resume:
        resume("" if args.resume == "newest" else args.resume, args.device, args.workers)
    else:
        train(options)
