"""What an evaluation leaves in a run folder: `metrics.json`, curves, confusion matrix, pictures of batches with labels and predictions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from engine.evaluate import Evaluation
from engine.observers import boxes_of
from models.blocks import Blocks, flops, parameters
from utils import plots
from utils.dataset import Batch
from utils.files import write_text


def metrics_of(evaluation: Evaluation, blocks: Blocks | None, imgsz: int) -> dict[str, Any]:
    """The machine-readable figures: counts, precision, recall, map50, map, params, flops (of one image at `imgsz`), speed_ms per image.

    `blocks` None: an exported model, whose params and flops are not known.
    """
    return {
        "images": evaluation.images,
        "instances": evaluation.instances,
        **evaluation.metrics(),
        "params": sum(parameters(blocks)) if blocks else None,
        "flops": sum(flops(blocks, imgsz, imgsz)) if blocks else None,
        "speed_ms": evaluation.speed_ms,
    }


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON, atomically."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def plot_evaluation(evaluation: Evaluation, names: Sequence[str], folder: Path) -> None:
    """PR, P, R and F1 curves and the confusion matrix, under YOLOv5's file names."""
    plots.plot_pr_curve(evaluation.result, names, folder / "PR_curve.png")
    for which in ("F1", "P", "R"):
        plots.plot_confidence_curve(evaluation.result, names, which, folder / f"{which}_curve.png")
    plots.plot_confusion_matrix(evaluation.confusion.matrix, names, folder / "confusion_matrix.png")


class BatchPlots:
    """Batch sink of `evaluate`: `val_batch{0,1,2}_{labels,pred}.jpg`."""

    def __init__(self, folder: Path, names: Sequence[str], count: int = 3) -> None:
        self.folder, self.names, self.count = folder, names, count

    def __call__(self, index: int, batch: Batch, detections: list[Tensor]) -> None:
        if index >= self.count:
            return
        images, paths = batch.images.numpy(), batch.paths
        predicted = [d.cpu().numpy()[:, [5, 0, 1, 2, 3, 4]] for d in detections]
        plots.plot_images(images, boxes_of(batch.images, batch.targets), self.names, self.folder / f"val_batch{index}_labels.jpg", paths)
        plots.plot_images(images, [np.asarray(p) for p in predicted], self.names, self.folder / f"val_batch{index}_pred.jpg", paths)


def per_class(evaluation: Evaluation, names: Sequence[str]) -> list[dict[str, Any]]:
    """The figures of every class that has labels, in the order of the classes: name, labels, precision, recall, map50, map."""
    r = evaluation.result
    return [
        {
            "name": names[c] if c < len(names) else str(c), "labels": int(r.labels[i]), "precision": float(r.precision[i]),
            "recall": float(r.recall[i]), "map50": float(r.ap[i, 0]), "map": float(r.ap[i].mean()),
        }
        for i, c in enumerate(r.classes)
    ]  # fmt: skip
