"""What the demo leaves behind: `results.json`, `table.md` and `demo.png`, all made from the runs' own files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from engine.latency import latency_ms
from engine.predictor import Limits, Predictor
from engine.reporting import write_json
from models.blocks import flops, parameters
from models.checkpoint import Model, load_model
from models.network import fuse
from pruning.criteria import gamma_scores
from pruning.sparsity import near_zero_share
from utils.device import Precision
from utils.files import megabytes, write_text
from utils.plots import draw_boxes

SIZES = (128, 640)
ROWS = {
    "base": ("trained", "base/weights/best.pt"),
    "sparse": ("trained sparsely", "sparse/weights/last.pt"),
    "prune": ("prune.py, not tuned", None),
    "shortcut_prune": ("shortcut_prune.py, not tuned", None),
    "slim_prune": ("slim_prune.py, not tuned", None),
    "slim_prune_8x": ("slim_prune_8x.py, not tuned", None),
    "finetune": ("**8x, fine-tuned**", "finetune/weights/best.pt"),
    "distill": ("**8x, fine-tuned with distillation**", "distill/weights/best.pt"),
    "scratch": ("the 8x cfg trained from scratch", "scratch/weights/best.pt"),
}


def report(folder: Path, epochs: dict[str, int]) -> None:
    """Collect the figures of a finished demo in `folder`; measure all models' latency in turns; draw the picture."""
    models = {name: load_model(_weights(folder, name)) for name in ROWS}
    rows = {name: _figures(folder, name, model) for name, model in models.items()}
    networks = {name: fuse(model.network()).to(memory_format=torch.channels_last) for name, model in models.items()}
    for size in SIZES:
        for name, ms in latency_ms(networks, size, torch.device("cpu"), repeats=15).items():
            rows[name]["latency_ms"][str(size)] = round(ms, 2)
    results = {"epochs": epochs, "rows": rows, "sparsity": _sparsity(folder), "first_epoch_map50": _first_epoch(folder)}
    write_json(folder / "results.json", results)
    write_text(folder / "table.md", table(results) + "\n")
    _picture(folder, models, results)


def _weights(folder: Path, name: str) -> Path:
    relative = ROWS[name][1]
    return folder / relative if relative else Path(json.loads((folder / name / "report.json").read_text())["pair"][1])


def _figures(folder: Path, name: str, model: Model) -> dict[str, Any]:
    if ROWS[name][1] is None:
        m = json.loads((folder / name / "report.json").read_text())["pruned"]
    else:
        m = json.loads((folder / name / "metrics.json").read_text())
    return {
        "map50": round(m["map50"], 4), "map": round(m["map"], 4), "params": sum(parameters(model.blocks)),
        "gflops": round(sum(flops(model.blocks)) / 1e9, 4), "size_mb": round(megabytes(_weights(folder, name)), 2), "latency_ms": {},
    }  # fmt: skip


def _sparsity(folder: Path) -> dict[str, float]:
    shares = {}
    for name in ("base", "sparse"):
        model = load_model(_weights(folder, name))
        shares[name] = round(near_zero_share(list(gamma_scores(model.blocks, model.state).values())), 4)
    return shares


def _first_epoch(folder: Path) -> float:
    """mAP@.5 of the base after its first epoch, about a tenth of its training."""
    header, first = (folder / "base/results.csv").read_text().splitlines()[:2]
    return float(dict(zip((h.strip() for h in header.split(",")), first.split(",")))["metrics/mAP_0.5"])


def table(results: dict[str, Any]) -> str:
    """The demo's table as Markdown."""
    rows, base = results["rows"], results["rows"]["base"]
    lines = [
        "| YOLOv5n on data/digits.yaml, 128 px | mAP@.5 | mAP@.5:.95 | parameters | GFLOPs at 640 | file MB | ms at 128 | ms at 640 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, (title, _) in ROWS.items():
        r = rows[name]
        cut = "" if r["params"] == base["params"] else f" (−{1 - r['params'] / base['params']:.0%})"
        less = "" if r["gflops"] == base["gflops"] else f" (−{1 - r['gflops'] / base['gflops']:.0%})"
        latency = " | ".join(f"{r['latency_ms'][str(s)]:.1f}" for s in SIZES)
        lines.append(
            f"| {title} | {r['map50']:.3f} | {r['map']:.3f} | {r['params']:,}{cut} | {r['gflops']:.2f}{less} | {r['size_mb']:.2f} | {latency} |"
        )
    return "\n".join(lines)


def _picture(folder: Path, models: dict[str, Model], results: dict[str, Any]) -> None:
    """Detections of the base and of the tuned pruned model, cost and accuracy of all, and the gammas before and after sparsity training."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 9.3), layout="constrained", dpi=80)
    FigureCanvasAgg(figure)
    above, below = figure.subfigures(2, 1, height_ratios=(5.4, 3.9))
    images = sorted(Path("data/generated/digits/images/val").glob("*.jpg"))[:5]
    grid = above.subplots(2, len(images))
    for row, (name, title) in enumerate((("base", "trained"), ("finetune", "pruned 8x, fine-tuned"))):
        size = models[name].imgsz
        predictor = Predictor(models[name].network(), (size, size), Precision(torch.device("cpu")))
        r = results["rows"][name]
        for axes, path in zip(grid[row], images):
            axes.imshow(_annotated(predictor, path, models[name].names))
            axes.set_xticks([])
            axes.set_yticks([])
        grid[row][0].set_ylabel(f"{title}\n{r['params'] / 1e6:.2f} M parameters, mAP@.5 {r['map50']:.3f}", fontsize=10)
    left, right = below.subplots(1, 2, width_ratios=(1.25, 1))
    _bars(left, results)
    _gammas(right, models)
    figure.savefig(folder / "demo.png")


def _annotated(predictor: Predictor, path: Path, names: tuple[str, ...]) -> np.ndarray:
    image = cv2.imread(str(path))
    found = predictor([image], Limits(conf=0.4))[0].boxes
    large = cv2.resize(image, None, fx=3, fy=3, interpolation=cv2.INTER_CUBIC)
    found[:, :4] *= 3
    return draw_boxes(large, found, names, 2)[..., ::-1]


def _bars(axes: Any, results: dict[str, Any]) -> None:
    """A bar of FLOPs per model, with its mAP@.5 at the end."""
    rows = results["rows"]
    names = list(ROWS)[::-1]
    colours = {"base": "#8a8f98", "sparse": "#8a8f98", "scratch": "#c9d6e8", "finetune": "#1f5fa8", "distill": "#1f5fa8"}
    axes.barh(range(len(names)), [rows[n]["gflops"] for n in names], color=[colours.get(n, "#e07b27") for n in names], height=0.7)
    for i, name in enumerate(names):
        r = rows[name]
        axes.text(r["gflops"] + 0.05, i, f"mAP@.5 {r['map50']:.3f}   {r['params'] / 1e6:.2f} M", va="center", fontsize=9)
    axes.set_yticks(range(len(names)), [ROWS[n][0].strip("*") for n in names], fontsize=9)
    axes.set_xlim(0, 1.45 * rows["base"]["gflops"])
    axes.set_xlabel("GFLOPs at 640 px")
    axes.set_title("cost, and what is left of the accuracy", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)


def _gammas(axes: Any, models: dict[str, Model]) -> None:
    bins = np.linspace(0, 1.4, 71)
    for name, colour in (("base", "#999999"), ("sparse", "#d9822b")):
        values = np.concatenate(list(gamma_scores(models[name].blocks, models[name].state).values()))
        axes.hist(values.clip(0, 1.4), bins, color=colour, alpha=0.75, label="trained" if name == "base" else "trained sparsely")
    axes.set_xlabel("|gamma|")
    axes.set_ylabel("channels")
    axes.set_yscale("log")
    axes.legend(frameon=False)
    axes.set_title("batch norm gammas", fontsize=11)
