"""Latency of a checkpoint before and after pruning, in torch, ONNX Runtime, OpenVINO and OpenCV, beside its FLOPs.

    python benchmarks/latency.py                                      # YOLOv5s, half of its FLOPs removed; about ten minutes on two cores
    python benchmarks/latency.py --weights base.pt --pruned pruned.pt --img 640 --batch 1 8
    python benchmarks/latency.py --alignment                          # the same FLOPs met with multiples of 1, 8, 16 and 32
    python benchmarks/latency.py --int8 --divisor 16 --batch 1        # float32, int8, and int8 of what pruning leaves; --cfg yolov5n for another

Networks are run in turns, in one process and with as many threads each as there are cores, so that a slow spell of the machine hits all of them
alike; a speed-up is the median of the ratios of neighbours in time. Without `--weights` the network is a YOLOv5s of 80 classes with random
weights and live statistics, pruned as `slim_prune_8x.py --target-flops 0.5` does: what its weights are makes no difference to its latency.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from common import in_turns, median_ratio, report

import numpy as np  # isort: skip
import torch
from runtimes import RUNTIMES, Run

from models.blocks import Blocks, flops, parameters
from models.checkpoint import Model, load_model, read_structure
from models.quantization import QuantScheme, quantize
from pruning.budget import cost_of, select_for
from pruning.criteria import gamma_scores
from pruning.policy import PrunePolicy, Selector
from pruning.spaces import find_spaces
from pruning.surgery import fold_constants, prune
from tests.helpers import alive

SPELLS = 4  # each network is measured in so many spells, spread over the whole run
DIVISORS = (1, 8, 16, 32)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--weights", default="", help="checkpoint before")
    p.add_argument("--pruned", default="", help="checkpoint after; left out: WEIGHTS pruned to --flops of its FLOPs")
    p.add_argument("--cfg", default="yolov5s", help="a model yaml of models/, by its stem, where no --weights are given")
    p.add_argument("--flops", type=float, default=0.5, help="share of the FLOPs that stays, where no --pruned is given")
    p.add_argument("--divisor", type=int, default=8, help="filters are a multiple of this, where no --pruned is given")
    p.add_argument("--alignment", action="store_true", help="one budget met with multiples of 1, 8, 16 and 32")
    p.add_argument("--int8", action="store_true", help="float32 against int8, full and pruned, in the runtimes that have int8")
    p.add_argument("--img", type=int, default=640)
    p.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    p.add_argument("--runtimes", nargs="+", choices=list(RUNTIMES), help="default: all, with --int8 ONNX Runtime and OpenVINO")
    p.add_argument("--repeats", type=int, default=24, help="runs of each network at batch 1; larger batches have fewer")
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = p.parse_args()
    before = load_model(args.weights) if args.weights else random_model(args.cfg)
    if args.alignment:
        models = {"full": before} | {f"/{d}": pruned_to(before, args.flops, args.img, d) for d in DIVISORS}
    elif args.int8:
        after = load_model(args.pruned) if args.pruned else pruned_to(before, args.flops, args.img, args.divisor)
        models = {"float32": before, "int8": quantized(before), "pruned": after, "pruned int8": quantized(after)}
    else:
        models = {
            "before": before,
            "after": load_model(args.pruned) if args.pruned else pruned_to(before, args.flops, args.img, args.divisor),
        }
    print_costs(models, args.img)
    print(f"\n{args.img} px, {args.threads} threads; milliseconds of a batch: median (quartiles)\n")
    runtimes = args.runtimes or (["ONNX Runtime", "OpenVINO"] if args.int8 else list(RUNTIMES))
    rows = measure(models, runtimes, args.batch, args.img, args.threads, args.repeats)
    print_table(models, rows)
    first = next(iter(models))
    figures = {
        f"{runtime}, batch {batch}": {name: round(median_ratio(times[first], times[name]), 3) for name in models if name != first}
        for (runtime, batch), times in rows.items()
    }
    told = "; ".join(f"{place}: {', '.join(f'{name} {ratio:.2f}x' for name, ratio in row.items())}" for place, row in figures.items())
    report("latency", told, img=args.img, threads=args.threads, speedup=figures)


def random_model(stem: str) -> Model:
    """A network whose gammas differ and whose activations are those of a network at work: no zeros, no denormal numbers."""
    blocks = read_structure(f"{stem}.yaml", 80)
    return Model(blocks, alive(blocks).state_dict(), tuple(f"class{i}" for i in range(80)))


def pruned_to(model: Model, share: float, imgsz: int, divisor: int) -> Model:
    """Pruned by the policy of `slim_prune_8x.py` until `share` of the FLOPs is left, with filters in multiples of `divisor`."""
    spaces, cost = find_spaces(model.blocks), cost_of("flops", imgsz)
    selector = Selector(spaces, gamma_scores(model.blocks, model.state), PrunePolicy(0.6, "union", 0.01, divisor))
    mask = select_for(model.blocks, selector, cost, share * cost(model.blocks)).selection.mask
    blocks, state = prune(model.blocks, fold_constants(model.blocks, model.state, spaces, mask), spaces, mask)
    return replace(model, blocks=blocks, state=state)


def quantized(model: Model) -> Model:
    """`model` in int8, with the ranges of random images: what they are makes no difference to its latency. One that is quantised already stays."""
    if model.quantization is not None:
        return model
    network = model.network()
    quantize(network, QuantScheme())
    network.freeze_norms()
    network.train()
    with torch.no_grad():
        network(torch.rand(2, network.channels, 256, 256, generator=torch.Generator().manual_seed(0)))
    return replace(model, quantization=network.quantization.saved())


def measure(
    models: Mapping[str, Model], runtimes: list[str], batches: list[int], imgsz: int, threads: int, repeats: int
) -> dict[tuple[str, int], dict[str, list[float]]]:
    """Seconds of each network, by runtime and batch. Within a spell the networks of one runtime and batch take turns."""
    rows: dict[tuple[str, int], dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for batch in batches:
            images = np.random.default_rng(0).random((batch, 3, imgsz, imgsz), dtype=np.float32)
            ready = {name: build(name, models, images, threads, Path(folder)) for name in runtimes}
            turns = max(round(repeats / SPELLS / batch**0.5), 1)
            for spell in range(SPELLS):
                for runtime, runs in ready.items():
                    for run in runs.values():
                        run()  # brings its weights back into the caches, and its threads to life
                    order = list(runs) if spell % 2 == 0 else list(runs)[::-1]
                    times = in_turns({name: timed(runs[name]) for name in order}, turns)
                    for name, values in times.items():
                        rows.setdefault((runtime, batch), {n: [] for n in runs})[name] += values
            del ready
            gc.collect()
    return rows


def build(runtime: str, models: Mapping[str, Model], images: np.ndarray, threads: int, folder: Path) -> dict[str, Run]:
    """Every network in one runtime, run twice; none where a package is missing."""
    try:
        runs = {name: RUNTIMES[runtime](model, images, threads, folder) for name, model in models.items()}
    except ImportError as error:
        print(f"{runtime} is left out: {error}")
        return {}
    for run in runs.values():
        run()
    return runs


def timed(run: Run) -> Callable[[], float]:
    """`run`, returning its seconds."""

    def seconds() -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    return seconds


def print_costs(models: Mapping[str, Model], imgsz: int) -> None:
    """A table of what the structures alone tell."""
    cost = {name: sum(flops(m.blocks, imgsz, imgsz)) for name, m in models.items()}
    whole = next(iter(cost.values()))
    print(f"\n| | parameters | GFLOPs at {imgsz} px | of the first | filters in multiples of 8, 16, 32 |\n|---|--:|--:|--:|--:|")
    for name, model in models.items():
        params = sum(parameters(model.blocks))
        print(f"| {name} | {params:,} | {cost[name] / 1e9:.2f} | {cost[name] / whole:.1%} | {aligned(model.blocks)} |")


def aligned(blocks: Blocks) -> str:
    """How many of the convolutions have filters in multiples of 8, 16 and 32; those of a head never have."""
    widths = [b.channels for b in blocks if b.kind == "convolutional"]
    return f"{', '.join(str(sum(w % d == 0 for w in widths)) for d in (8, 16, 32))} of {len(widths)}"


def print_table(models: Mapping[str, Model], rows: Mapping[tuple[str, int], Mapping[str, list[float]]]) -> None:
    """A row per runtime and batch: milliseconds of each network, and how many times as fast as the first the others are."""
    first, *others = models
    head = [*models, *(f"speed-up {name}" if len(others) > 1 else "speed-up" for name in others)]
    print(f"| runtime | batch | {' | '.join(head)} |\n|---|--:|{'--:|' * len(head)}")
    for (runtime, batch), times in rows.items():
        cells = [spread(times[name]) for name in models] + [f"{median_ratio(times[first], times[name]):.2f}" for name in others]
        print(f"| {runtime} | {batch} | {' | '.join(cells)} |")


def spread(seconds: list[float]) -> str:
    """Median and quartiles in milliseconds."""
    low, middle, high = statistics.quantiles([1e3 * s for s in seconds], n=4) if len(seconds) > 1 else [1e3 * seconds[0]] * 3
    return f"{middle:.1f} ({low:.1f}–{high:.1f})"


if __name__ == "__main__":
    main()
