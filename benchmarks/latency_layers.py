"""Which layers a cut makes faster, and which it does not: ONNX Runtime's own times of every convolution, before and after.

    python benchmarks/latency_layers.py                       # YOLOv5s with half of its FLOPs removed, one thread
    python benchmarks/latency_layers.py --divisor 16 --rows 20
    python benchmarks/latency_layers.py --weights base.pt --pruned pruned.pt

Beside what a layer gains stands what its FLOPs promise, and what they promise once its filters are counted in blocks of 16, as 512-bit vectors
compute them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common import report

import numpy as np  # isort: skip
import torch
from latency import pruned_to, random_model
from runtimes import onnx_bytes

from models.blocks import Blocks, flops
from models.checkpoint import Model, load_model

LANES = 16


@dataclass(frozen=True)
class Profile:
    """Milliseconds by the name of a convolution, and of everything else together."""

    convolutions: dict[str, float]
    other: float


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--weights", default="", help="checkpoint before")
    p.add_argument("--pruned", default="", help="checkpoint after")
    p.add_argument("--cfg", default="yolov5s", help="a model yaml of models/, by its stem, where no --weights are given")
    p.add_argument("--flops", type=float, default=0.5, help="share of the FLOPs that stays, where no --pruned is given")
    p.add_argument("--divisor", type=int, default=8)
    p.add_argument("--img", type=int, default=640)
    p.add_argument("--rows", type=int, default=16, help="layers in the table, the costliest first")
    p.add_argument("--repeats", type=int, default=25)
    p.add_argument("--threads", type=int, default=1)
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    before = load_model(args.weights) if args.weights else random_model(args.cfg)
    after = load_model(args.pruned) if args.pruned else pruned_to(before, args.flops, args.img, args.divisor)
    first, second = profiles([before, after], args.img, args.threads, args.repeats)
    print_layers(before.blocks, after.blocks, first, second, args.img, args.rows)
    totals = [sum(x.convolutions.values()) + x.other for x in (first, second)]
    print(f"\neverything but convolutions: {first.other:.1f} -> {second.other:.1f} ms; all: {totals[0]:.1f} -> {totals[1]:.1f} ms")
    report("latency_layers", f"{totals[0] / totals[1]:.2f}x as fast", ms=[round(t, 2) for t in totals], divisor=args.divisor, img=args.img)


def profiles(models: list[Model], imgsz: int, threads: int, repeats: int) -> list[Profile]:
    """ONNX Runtime's profile of each model at batch 1, run in turns."""
    import onnx
    import onnxruntime

    images = np.random.default_rng(0).random((1, 3, imgsz, imgsz), dtype=np.float32)
    with tempfile.TemporaryDirectory() as folder:
        sessions, names = [], []
        for number, model in enumerate(models):
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads, options.enable_profiling = threads, True
            options.profile_file_prefix = str(Path(folder) / str(number))
            graph = onnx_bytes(model, images.shape)
            sessions.append(onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"]))
            names.append(_conv_outputs(onnx.load_from_string(graph), model.blocks))
        for _ in range(repeats + 1):
            for session in sessions:
                session.run(None, {session.get_inputs()[0].name: images})
        return [_profile(json.loads(Path(s.end_profiling()).read_text()), found) for s, found in zip(sessions, names)]


def _conv_outputs(graph: Any, blocks: Blocks) -> dict[str, str]:
    """What the runtime may call a convolution (its node's name, its output's) -> the block's name; both list them in network order."""
    nodes = [node for node in graph.graph.node if node.op_type == "Conv"]
    convolutions = [b.name for b in blocks if b.kind == "convolutional"]
    return {own: name for node, name in zip(nodes, convolutions, strict=True) for own in (node.name, node.output[0]) if own}


def _profile(events: list[Mapping[str, Any]], names: Mapping[str, str]) -> Profile:
    """The least of each node's times: a busy moment only adds."""
    times: dict[str, list[float]] = {}
    kinds: dict[str, str] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            node = event["name"].removesuffix("_kernel_time")
            times.setdefault(node, []).append(event["dur"] / 1e3)
            kinds[node] = event["args"]["op_name"]
    convolutions: dict[str, float] = {}
    other = 0.0
    for node, values in times.items():
        ms = min(values)
        if "Conv" in kinds[node]:
            convolutions[names[max((n for n in names if node.startswith(n)), key=len)]] = ms
        else:
            other += ms
    return Profile(convolutions, other)


def print_layers(before: Blocks, after: Blocks, first: Profile, second: Profile, imgsz: int, rows: int) -> None:
    """The costliest layers: widths, milliseconds, and how many times as fast the layer is, should be by its FLOPs, and by whole vectors."""
    cost = [flops(blocks, imgsz, imgsz) for blocks in (before, after)]
    whole = [flops(rounded(blocks), imgsz, imgsz) for blocks in (before, after)]
    named = [(b.name, i) for i, b in enumerate(before) if b.kind == "convolutional"]
    named.sort(key=lambda item: -first.convolutions[item[0]])
    print(f"\n| convolution | in → out before | after | ms before | after | speed-up | by FLOPs | by FLOPs in {LANES}s |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    for name, i in named[:rows]:
        widths = [f"{blocks[blocks[i].inputs[0]].channels} → {blocks[i].channels}" for blocks in (before, after)]
        a, b = first.convolutions[name], second.convolutions[name]
        print(
            f"| {name} | {widths[0]} | {widths[1]} | {a:.2f} | {b:.2f} | {a / b:.2f} | {cost[0][i] / cost[1][i]:.2f} | {whole[0][i] / whole[1][i]:.2f} |"
        )


def rounded(blocks: Blocks) -> Blocks:
    """The structure with every convolution's filters rounded up to whole vectors; what reads one reads as many."""
    return tuple(replace(b, channels=-(-b.channels // LANES) * LANES) if b.kind == "convolutional" and b.groups == 1 else b for b in blocks)


if __name__ == "__main__":
    main()
