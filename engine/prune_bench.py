"""What measures every stage of a pruning run alike: accuracy on the validation split, parameters, FLOPs, file size, latency."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from engine.evaluate import EvaluateOptions, evaluate
from engine.latency import latency_ms
from engine.reporting import metrics_of, per_class
from models.blocks import Blocks
from models.checkpoint import Model, save_model
from models.network import Network, fuse
from pruning.masked import largest_difference
from utils.data_config import read_data
from utils.dataset import DatasetOptions, DetectionDataset, EpochLoader, make_loader
from utils.device import Precision, evaluation_workers
from utils.errors import InputError
from utils.files import megabytes
from utils.labels import LabelSet, scan_labels
from utils.log import LOGGER


@dataclass
class Bench:
    """The validation data of a run, how networks are run on it, and the figures of every stage measured so far."""

    labels: LabelSet
    loader: EpochLoader
    precision: Precision
    imgsz: int
    names: tuple[str, ...]
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)

    def measure(self, stage: str, network: Network, blocks: Blocks) -> None:
        """Evaluate `network`; `blocks` are its unfused ones, whose parameters and FLOPs are reported."""
        network = network.to(self.precision.device, memory_format=torch.channels_last)
        evaluation = evaluate(network, self.loader, self.precision, EvaluateOptions(single_cls=len(self.names) == 1))
        self.stages[stage] = metrics_of(evaluation, blocks, self.imgsz) | {"per_class": per_class(evaluation, self.names)}
        m = self.stages[stage]
        LOGGER.info(f"{stage:>12}: mAP@.5 {m['map50']:.4f}  mAP@.5:.95 {m['map']:.4f}")

    def measure_cost(self, before: Model, pruned: Model) -> None:
        """File size (both stripped) and latency (both fused float32, in turns) of every stage, at the run's size and at 640 px."""
        models = {"before": before, "pruned": pruned}
        sizes = {stage: file_mb(model) for stage, model in models.items()}
        networks = {k: fuse(m.network()).to(self.precision.device, memory_format=torch.channels_last) for k, m in models.items()}
        measured = {size: latency_ms(networks, size, self.precision.device) for size in dict.fromkeys((self.imgsz, 640))}
        for stage, row in self.stages.items():
            source = "pruned" if stage in ("pruned", "recalibrated") else "before"  # the others run at full width
            row["size_mb"] = sizes[source]
            row["latency_ms"] = {str(size): values[source] for size, values in measured.items()}


def make_bench(
    model: Model, weights: str, data: str, imgsz: int, batch_size: int, device: torch.device, workers: int, images: int = 0, cache: str | None = None
) -> Bench:  # fmt: skip
    """The bench of a checkpoint on the validation split of `data`. `images`: on so many of its images alone, evenly spaced; `cache`: see
    `DatasetOptions`."""
    config = read_data(data, ("val",))
    single = len(model.names) == 1
    if len(config.names) != len(model.names) and not single:
        raise InputError(f"{data} has {len(config.names)} classes, {weights} has {len(model.names)}; use the data it was trained on")
    network = model.network()
    labels = scan_labels(config.val, config.nc)
    if 0 < images < len(labels):
        labels = labels.subset(np.linspace(0, len(labels) - 1, images).round().astype(int).tolist())
    options = DatasetOptions(
        imgsz,
        rect=True,
        pad=0.5,
        stride=network.max_stride,
        batch_size=batch_size,
        single_cls=single,
        channels=network.channels,
        cache=cache,
    )
    loader = make_loader(DetectionDataset(labels, options), evaluation_workers(workers, device))
    return Bench(labels, loader, Precision(device), imgsz, model.names)


def check_oracle(masked: Network, pruned: Network, original: Network, bench: Bench) -> dict[str, float]:
    """The equality that pruning stands on, on real images: masked = pruned, while both differ from the original."""
    batch = next(iter(bench.loader.epoch(0)))
    images = Precision(torch.device("cpu")).images(batch.images[:8])
    difference, bound = largest_difference(masked, pruned, images)
    changed, _ = largest_difference(original, pruned, images)
    LOGGER.info(
        f"masked = pruned on {len(images)} images: max |difference| of the logits {difference:.2e} (bound {bound:.2e}); "
        f"the cut changed them by up to {changed:.3g}"
    )
    if not math.isfinite(changed):
        raise InputError("--weights: the network gives numbers that are not finite on your images; this checkpoint is broken")
    if not difference <= bound:
        raise RuntimeError(f"surgery is wrong: the pruned network differs from the masked one by {difference}, more than {bound}")
    return {"difference": difference, "bound": bound, "changed": changed, "images": len(images)}


def file_mb(model: Model) -> float:
    """Size in MB of the stripped checkpoint."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt"
        save_model(path, replace(model, training=None))
        return megabytes(path)


def stage_table(stages: Mapping[str, Mapping[str, Any]], imgsz: int) -> str:
    """A row per stage, and what was gained."""
    sizes = list(dict.fromkeys((imgsz, 640)))
    head = f"{'':<13}{'mAP@.5':>8}{'mAP@.5:.95':>12}{'parameters':>13}{'GFLOPs':>9}{'file MB':>9}"
    lines = [head + "".join(f"{f'ms @{s}':>10}" for s in sizes)]
    for stage, m in stages.items():
        lines.append(
            f"{stage:<13}{m['map50']:>8.4f}{m['map']:>12.4f}{m['params']:>13,}{m['flops'] / 1e9:>9.4g}{m['size_mb']:>9.2f}"
            + "".join(f"{m['latency_ms'][str(s)]:>10.2f}" for s in sizes)
        )
    before, after = stages["before"], stages["pruned"]
    lines.append(
        f"removed: {1 - after['params'] / before['params']:.1%} of the parameters, {1 - after['flops'] / before['flops']:.1%} of the FLOPs; "
        + ", ".join(f"{before['latency_ms'][str(s)] / after['latency_ms'][str(s)]:.2f}x as fast at {s} px" for s in sizes)
    )
    return "\n".join(lines)
