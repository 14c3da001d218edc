"""Classification: its objective, its evaluation, and the task that trains it with the loop of detection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.inference import inference_network
from engine.options import TrainOptions
from engine.reporting import write_json
from engine.seams import Evaluator, Forward
from engine.task import Goal, Hyp, Task, TrainData
from models.blocks import Blocks, flops, parameters
from models.cfg import read_cfg_text, write_cfg
from models.checkpoint import Model
from models.network import Network
from utils import plots
from utils.augment import AugmentOptions
from utils.dataset import DatasetOptions, EpochLoader, make_loader
from utils.device import Precision, evaluation_workers, worker_count
from utils.errors import InputError
from utils.flags import multiple
from utils.image_folder import ClassificationDataset, read_image_folders, scan_folder
from utils.labels import LabelSet
from utils.log import LOGGER
from utils.world import SOLO, World

METRICS = ("metrics/accuracy_top1", "metrics/accuracy_top5", "val/cls_loss")
_ONLY_BOXES = ("rect", "quad", "multi_scale", "image_weights", "single_cls", "cache", "teacher")  # options without a meaning here


class ClassificationObjective:
    """Cross entropy with label smoothing (Szegedy et al. 2016), the mean over the images of the batch."""

    names = ("cls_loss",)

    def __init__(self, label_smoothing: float = 0.0, world: World = SOLO) -> None:
        self.label_smoothing, self.world = label_smoothing, world

    def __call__(self, network: Forward, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return self.loss(network(images), targets)

    def loss(self, maps: list[Tensor], targets: Tensor) -> tuple[Tensor, Tensor]:
        """[(B, nc, 1, 1)] logits and the (B, 6) targets of a batch, whose column 1 is the class -> the loss, and it as its only part (1,)."""
        mean = F.cross_entropy(maps[0].flatten(1).float(), targets[:, 1].long(), label_smoothing=self.label_smoothing)
        count = targets.new_tensor(float(len(targets)))
        mean = mean * self.world.share(count, self.world.total(count))
        return mean, mean.detach().view(1)


# ---- evaluation ----------------------------------------------------------------------------------------------------------------


@dataclass
class Accuracy:
    """The figures of an evaluation. `matrix`: (nc + 1, nc + 1) counts, rows predicted, columns true (the last row and column, of what is
    no object, stay empty). `seconds`: of the network."""

    matrix: np.ndarray
    images: int = 0
    top1: int = 0
    top5: int = 0
    loss: float = 0.0
    seconds: float = 0.0

    @property
    def fitness(self) -> float:
        """Top-1 accuracy."""
        return self.top1 / max(self.images, 1)

    def metrics(self) -> dict[str, float]:
        """accuracy_top1, accuracy_top5 and the mean cross entropy without label smoothing."""
        n = max(self.images, 1)
        return {"accuracy_top1": self.top1 / n, "accuracy_top5": self.top5 / n, "loss": self.loss / n}

    def add(self, logits: Tensor, classes: Tensor) -> None:
        """Count a batch: (B, nc) logits, (B,) classes. With fewer than five classes top-5 is always right."""
        order = logits.topk(min(5, logits.shape[1])).indices
        right = order == classes[:, None]
        self.images += len(classes)
        self.top1 += int(right[:, 0].sum())
        self.top5 += int(right.any(1).sum())
        self.loss += float(F.cross_entropy(logits, classes, reduction="sum"))
        np.add.at(self.matrix, (order[:, 0].numpy(), classes.numpy()), 1)

    def merged(self, others: Sequence[Accuracy]) -> Accuracy:
        """This and `others` as one."""
        whole = Accuracy(self.matrix.copy(), self.images, self.top1, self.top5, self.loss, self.seconds)
        for other in others:
            whole.matrix += other.matrix
            for name in ("images", "top1", "top5", "loss", "seconds"):
                setattr(whole, name, getattr(whole, name) + getattr(other, name))
        return whole

    def table(self, names: Sequence[str], verbose: bool) -> str:
        """Header, the row of all classes and, if `verbose`, the accuracy of each class that has images."""
        m = self.metrics()
        lines = [f"{'Class':>22}{'Images':>11}{'top1':>11}{'top5':>11}", f"{'all':>22}{self.images:>11}"]
        lines[1] += f"{m['accuracy_top1']:>11.3g}{m['accuracy_top5']:>11.3g}"
        counts = self.matrix.sum(0)
        for c, name in enumerate(names if verbose else ()):
            if counts[c]:
                lines.append(f"{name:>22}{int(counts[c]):>11}{self.matrix[c, c] / counts[c]:>11.3g}")
        return "\n".join(lines)


@torch.no_grad()
def evaluate_classes(network: Network, loader: EpochLoader, precision: Precision, world: World = SOLO) -> Accuracy:
    """Measure `network` (put into eval mode) on the loader's images; of several processes each measures its slice, all return the whole."""
    network.eval()
    found = Accuracy(np.zeros((network.classes + 1,) * 2))
    for batch in loader.epoch(0):
        images = precision.images(batch.images)
        start = precision.clock()
        with precision.autocast():
            (logits,) = network(images)
        found.seconds += precision.clock() - start
        found.add(logits.flatten(1).float().cpu(), batch.targets[:, 1].long())
    first, *others = world.gather(found)
    return first.merged(others)


def accuracy_metrics(found: Accuracy, blocks: Blocks, imgsz: int) -> dict[str, Any]:
    """The machine-readable figures of metrics.json."""
    return {
        "task": "classify", "imgsz": imgsz, "images": found.images, **found.metrics(), "params": sum(parameters(blocks)), "flops": sum(flops(blocks, imgsz, imgsz)),
        "speed_ms": {"inference": found.seconds / max(found.images, 1) * 1e3},
    }  # fmt: skip


def validation_loader(labels: LabelSet, imgsz: int, batch_size: int, channels: int, workers: int = 0, world: World = SOLO) -> EpochLoader:
    """The images of a split as they are evaluated."""
    options = DatasetOptions(imgsz, batch_size=batch_size, channels=channels)
    return make_loader(ClassificationDataset(labels, options), workers, pin_memory=torch.cuda.is_available(), world=world)


def validation_images(data: str, split: str, names: Sequence[str], what: str, quiet: bool = False) -> LabelSet:
    """The images of a split of `--data`, whose classes must be as many as those of the checkpoint (`what` names it in the error)."""
    folders = read_image_folders(data)
    if len(folders.names) != len(names):
        raise InputError(f"{what} has {len(names)} classes, {data} has {len(folders.names)}; evaluate on the data it was trained on")
    return scan_folder(folders.folder(split), folders.names, quiet=quiet)


# ---- the task ------------------------------------------------------------------------------------------------------------------


def _read(options: TrainOptions, stride: int, world: World) -> TrainData:
    for name in _ONLY_BOXES:
        if getattr(options, name):
            flag = {"teacher": "--distill"}.get(name, "--" + name.replace("_", "-"))
            raise InputError(f"{flag} is for detectors, and this model is a classifier; leave it out")
    folders = read_image_folders(options.data)
    imgsz = multiple(options.imgsz, stride)
    if imgsz != options.imgsz:
        LOGGER.info(f"--imgsz {options.imgsz} is raised to {imgsz}, a multiple of {stride}")
    train, val = (scan_folder(folders.folder(split), folders.names, quiet=not world.is_main) for split in ("train", "val"))
    return TrainData(folders.names, train, val, imgsz)


def _fit(blocks: Blocks, data: TrainData, hyp: Hyp, options: TrainOptions) -> Blocks:
    return read_cfg_text(write_cfg(blocks), "model", data.nc)


def _loaders(
    data: TrainData, hyp: Hyp, options: TrainOptions, network: Network, precision: Precision, world: World
) -> tuple[EpochLoader, EpochLoader]:
    training = DatasetOptions(
        data.imgsz, AugmentOptions.from_hyp(hyp), batch_size=options.batch_size, seed=options.seed, channels=network.channels
    )
    beside = evaluation_workers(options.workers, precision.device, world)
    return (
        make_loader(
            ClassificationDataset(data.train, training), worker_count(options.workers, world), shuffle=True,
            pin_memory=torch.cuda.is_available(), world=world,
        ),
        validation_loader(data.val, data.imgsz, 2 * options.batch_size, network.channels, beside, world),
    )  # fmt: skip


def _goal(
    network: Network, data: TrainData, hyp: Hyp, options: TrainOptions, precision: Precision, loaders: tuple[EpochLoader, EpochLoader], world: World
) -> Goal:  # fmt: skip
    return Goal(ClassificationObjective(hyp["label_smoothing"], world), _evaluator(loaders[1], precision, world))


def _evaluator(loader: EpochLoader, precision: Precision, world: World) -> Evaluator:
    def run(network: Network) -> tuple[float, dict[str, float]]:
        found = evaluate_classes(network, loader, precision, world)
        return found.fitness, dict(zip(METRICS, found.metrics().values()))

    return run


def _measure(model: Model, data: TrainData, options: TrainOptions, precision: Precision, folder: Path) -> None:
    plain = Precision(precision.device)
    network = inference_network(model.network(), plain)
    found = evaluate_classes(network, validation_loader(data.val, data.imgsz, 2 * options.batch_size, network.channels), plain)
    report(found, model.blocks, data.names, data.imgsz, folder)


def report(found: Accuracy, blocks: Blocks, names: Sequence[str], imgsz: int, folder: Path, verbose: bool = False, **more: Any) -> None:
    """Print the table; write metrics.json (`more` goes in too) and the confusion matrix."""
    LOGGER.info(found.table(names, verbose or len(names) < 50))
    write_json(folder / "metrics.json", accuracy_metrics(found, blocks, imgsz) | more)
    plots.plot_confusion_matrix(found.matrix, names, folder / "confusion_matrix.png")


def _no_pictures(folder: Path, data: TrainData) -> None:
    """Where every label is the whole image, there is nothing to see in a picture of the labels."""


CLASSIFICATION = Task(METRICS, _read, _fit, _loaders, _goal, _no_pictures, _measure)
