"""Flags shared by the scripts: YOLOv5's names and aliases, with `_` and `-` both accepted everywhere."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` in which every flag can be typed with `_` or with `-`, and errors are one line."""

    def add_argument(self, *names: str, **kwargs: Any) -> argparse.Action:
        every: list[str] = []
        for name in names:
            every.append(name)
            if name.startswith("--"):
                body = name[2:]
                every += [f"--{spelling}" for spelling in (body.replace("-", "_"), body.replace("_", "-"))]
        return super().add_argument(*dict.fromkeys(every), **kwargs)

    def error(self, message: str) -> None:
        print(f"error: {message}; {self.prog} --help lists the flags", file=sys.stderr)
        sys.exit(2)


class _Help(argparse.RawDescriptionHelpFormatter):
    """Keeps the examples of a script's docstring as they are, and shows a default where there is one to show."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        return text if action.default in (None, "", False, [], argparse.SUPPRESS) or not text else f"{text} (default: %(default)s)"


def parser(description: str) -> Parser:
    """A parser without prefix matching, so that a misspelt flag is an error and not another flag."""
    return Parser(description=description, allow_abbrev=False, formatter_class=_Help)


def typed(p: Parser, argv: Argv = None) -> set[str]:
    """The names of the arguments that `argv` gives itself, rather than leave to their defaults."""
    untyped = object()
    names = [action.dest for action in p._actions if action.dest != "help"]
    found = p.parse_args(argv, argparse.Namespace(**dict.fromkeys(names, untyped)))
    return {name for name in names if getattr(found, name) is not untyped}


_SIZE = "long side of the network input, pixels"
_SIDES = "network input, pixels: the long side, or height and width"


class _Size(argparse.Action):
    """Stores one side as a number, or with `sides` 2 one or two as a tuple; more of them are an error that says so."""

    def __init__(self, *args: Any, sides: int = 1, **kwargs: Any) -> None:
        super().__init__(*args, nargs="+", **kwargs)
        self.sides = sides

    def __call__(self, p: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        if len(values) > self.sides:
            expected = "one size, the long side" if self.sides == 1 else "one size, or height and width"
            p.error(f"{option} {' '.join(map(str, values))}: give {expected}")
        if min(values) < 1:
            p.error(f"{option} {min(values)}: a size is at least 1 pixel")
        setattr(namespace, self.dest, values[0] if self.sides == 1 else tuple(values))


def add_size(p: Parser, default: int | None = 640, sides: int = 1) -> None:
    """`--imgsz`: an int, or with `sides` 2 a tuple of one or two."""
    text = _SIZE if sides == 1 else _SIDES
    p.add_argument(
        "--imgsz",
        "--img",
        "--img-size",
        type=int,
        action=_Size,
        sides=sides,
        metavar="N" if sides == 1 else ("N", "N"),
        default=default,
        help=text if default else f"{text}; the size it was trained at if left out",
    )


def add_cfg(p: Parser, *aliases: str, text: str = "structure (.yaml or .cfg) if not the checkpoint's own") -> None:
    """`--cfg` and `--dialect`."""
    p.add_argument("--cfg", *aliases, default="", help=text)
    dialects = "ours, darknet, yolov5_prune (the pruning repositories before us), or auto: told by its keys"
    p.add_argument("--dialect", default="auto", metavar="NAME", help=f"whose .cfg it is: {dialects}")


def add_runnable(p: Parser) -> None:
    """`--weights` of what can be run, a checkpoint or an exported model, with `--cfg`, `--dialect` and `--dnn`."""
    exported = "an exported .onnx, _openvino_model folder or .torchscript, a Darknet .weights (with --cfg)"
    p.add_argument("--weights", required=True, help=f"any checkpoint: ours, a pruned one, a YOLOv5 .pt; {exported}")
    add_cfg(p)
    p.add_argument("--dnn", action="store_true", help="run a .onnx or a Darknet pair in OpenCV's own reader")


def add_device(p: Parser, workers: bool = True) -> None:
    p.add_argument("--device", default="", help="cpu, or a CUDA device number; empty: CUDA where there is one")
    if workers:
        p.add_argument("--workers", type=int, default=8, help="loader processes (no more than CPUs)")


def add_run(p: Parser, project: str, name: str = "exp") -> None:
    p.add_argument("--project", default=project, help="save results to PROJECT/NAME")
    p.add_argument("--name", default=name, help="save results to PROJECT/NAME")
    p.add_argument("--exist-ok", action="store_true", help="write into PROJECT/NAME even if it exists")


def multiple(size: int, stride: int) -> int:
    """`size` raised to a multiple of `stride`, at least two strides (YOLOv5's rule)."""
    return max((size + stride - 1) // stride * stride, 2 * stride)


Argv = Sequence[str] | None
