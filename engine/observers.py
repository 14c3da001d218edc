"""Observers of the loop: progress, results.csv, TensorBoard, checkpoints, early stopping and pictures."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from engine.loop import Loop
from engine.seams import EpochRecord, Observer
from models.checkpoint import Model, load_model, save_model, stripped
from utils import plots
from utils.boxes import denormalise, xywh_to_xyxy
from utils.files import copy_file, sync, write_text
from utils.labels import load_image
from utils.log import LOGGER

CSV_WIDTH = 20
SHORT = {
    "metrics/precision": "P", "metrics/recall": "R", "metrics/mAP_0.5": "mAP50", "metrics/mAP_0.5:0.95": "mAP50-95",
    "metrics/accuracy_top1": "top1", "metrics/accuracy_top5": "top5",
}  # fmt: skip


class Progress(Observer):
    """One bar per epoch with the running means of the loss parts, as YOLOv5 shows them."""

    def __init__(self, batches: int, epochs: int, names: Sequence[str], imgsz: int) -> None:
        self.batches, self.epochs, self.names, self.imgsz = batches, epochs, names, imgsz
        self.bar: tqdm | None = None
        self._epoch = 0

    def train_start(self, loop: Loop) -> None:
        LOGGER.info("".join(f"{name:>14}" for name in ("Epoch", "GPU_mem", *self.names, "Instances", "Size")))
        self._epoch = loop.start_epoch

    def batch_end(self, loop: Loop, index: int, images: Tensor, targets: Tensor, items: Tensor) -> None:
        if self.bar is None:
            self.bar = tqdm(
                total=self.batches,
                bar_format="{desc} {percentage:3.0f}%|{bar:10}| {n_fmt}/{total_fmt} {elapsed}<{remaining}",
                mininterval=0.5,
            )
        memory = f"{torch.cuda.memory_reserved() / 1e9:.3g}G" if torch.cuda.is_available() else "0G"
        head = f"{f'{self._epoch + 1}/{self.epochs}':>14}{memory:>14}"
        self.bar.set_description_str(
            head + "".join(f"{v:>14.4g}" for v in items.tolist()) + f"{len(targets):>14}{images.shape[-1]:>14}", refresh=False
        )
        self.bar.update()

    def epoch_end(self, loop: Loop, record: EpochRecord) -> bool:
        if self.bar is not None:
            self.bar.close()
        self.bar, self._epoch = None, record.epoch + 1
        if record.metrics:
            shown = "  ".join(f"{short} {record.metrics[name]:.3f}" for name, short in SHORT.items() if name in record.metrics)
            LOGGER.info(f"{'':>14}{shown}")
        return False


class CsvLog(Observer):
    """`results.csv` in YOLOv5's columns, one row per epoch. The checkpoint carries the lines: a resumed run begins with those up to it.

    `metrics` are the columns of the evaluation; they read nan in an epoch without one.
    """

    def __init__(self, path: Path, metrics: Sequence[str]) -> None:
        self.path, self.metrics = path, metrics
        self.lines: list[str] = []

    def train_start(self, loop: Loop) -> None:
        if self.lines:
            self._write()
        else:  # --exist-ok: an older run's rows must not pass for this one's
            self.path.unlink(missing_ok=True)

    def epoch_end(self, loop: Loop, record: EpochRecord) -> bool:
        metrics = {name: record.metrics.get(name, float("nan")) for name in self.metrics}
        values = {"epoch": record.epoch, **record.losses, **metrics, **record.rates}
        if not self.lines:
            self.lines.append(",".join(f"{name:>{CSV_WIDTH}}" for name in values))
        self.lines.append(",".join(f"{v:>{CSV_WIDTH}.5g}" for v in values.values()))
        self._write()
        return False

    def _write(self) -> None:
        write_text(self.path, "\n".join(self.lines) + "\n")

    def state_dict(self) -> dict[str, Any]:
        return {"lines": list(self.lines)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.lines = list(state["lines"])


class TensorBoard(Observer):
    """Scalars under YOLOv5's names, and the graph at batch 0. `writer`, open from `train_start` on, is shared with the observers that
    log histograms. `board_pictures` adds the pictures once they are drawn.

    The checkpoint carries the size that each events file had: what a killed run wrote after it is cut off when the run is resumed, so
    that no event is lost and none stands twice.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.writer: Any = None
        self._graph_due = False
        self.sizes: dict[str, int] = {}

    def train_start(self, loop: Loop) -> None:
        from torch.utils.tensorboard import SummaryWriter  # heavy: TensorBoard pulls in a good deal

        self._cut()
        self.writer = SummaryWriter(str(self.folder))
        self._graph_due = loop.start_epoch == 0

    def batch_end(self, loop: Loop, index: int, images: Tensor, targets: Tensor, items: Tensor) -> None:
        if self._graph_due:
            self._graph_due = False
            self._add_graph(loop, images)

    def _add_graph(self, loop: Loop, images: Tensor) -> None:
        """Trace the EMA, which is in eval mode: neither running statistics nor random numbers of the training are touched."""
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                traced = torch.jit.trace(loop.ema.network, loop.precision.images(images[:1]), strict=False, check_trace=False)
                self.writer.add_graph(traced, [])
        except Exception as error:  # noqa: BLE001 - a picture of the network is no reason to lose a training
            LOGGER.warning(f"TensorBoard: no graph of this model ({str(error).splitlines()[0] if str(error) else type(error).__name__})")

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("events.out.tfevents.*"))

    def _cut(self) -> None:
        for path in self._files():
            size = self.sizes.get(path.name, 0)
            if size == 0:
                path.unlink()
            elif size < path.stat().st_size:
                os.truncate(path, size)

    def state_dict(self) -> dict[str, Any]:
        self.writer.flush()
        for path in self._files():
            sync(path)
        return {"sizes": {path.name: path.stat().st_size for path in self._files()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sizes = dict(state["sizes"])

    def epoch_end(self, loop: Loop, record: EpochRecord) -> bool:
        for name, value in {**record.losses, **record.metrics, **record.rates}.items():
            self.writer.add_scalar(name, value, record.epoch)
        self.writer.flush()  # for who is watching
        return False

    def train_end(self, loop: Loop) -> None:
        self.writer.close()


PICTURES = (
    "results", "confusion_matrix", "F1_curve", "PR_curve", "P_curve", "R_curve", "labels", "labels_correlogram",
    *(f"train_batch{i}" for i in range(3)), *(f"val_batch{i}_{what}" for i in range(3) for what in ("labels", "pred")),
)  # fmt: skip


def board_pictures(folder: Path) -> None:
    """Show the finished run's pictures under TensorBoard's Images, by the stems of their files, at the step of the last epoch in
    `results.csv`. The files go in as they are, not encoded again."""
    from tensorboard.compat.proto.summary_pb2 import Summary
    from torch.utils.tensorboard import SummaryWriter

    epoch = int((folder / "results.csv").read_text(encoding="utf-8").splitlines()[-1].split(",")[0])
    writer = SummaryWriter(str(folder))
    for stem in PICTURES:
        for path in (folder / f"{stem}.png", folder / f"{stem}.jpg"):
            if path.exists():
                height, width = load_image(path).shape[:2]
                image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=path.read_bytes())
                writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=stem, image=image)]), epoch)
    writer.close()


@dataclass
class Checkpoints(Observer):
    """`weights/last.pt` every epoch, `best.pt` when the fitness equals its maximum, `epochN.pt` every `period`; stripped at the end.

    An epoch counts as finished once its last.pt is in place. The others are copies of it with its time, so they are never newer; a
    resumed run makes those that a kill prevented. `hyp` and `options` go into every file.

    Where the run has phases, `best.pt` is that of the present one, and when one is over its best stays as `best_<phase>.pt`; but none of a
    phase in `passing`, whose fitness says nothing about what comes of it.
    """

    folder: Path
    names: tuple[str, ...]
    imgsz: int
    hyp: dict[str, Any]
    options: dict[str, Any]
    period: int = -1
    save: bool = True
    passing: Callable[[str], bool] = lambda phase: False
    last: Path = field(init=False)
    best: Path = field(init=False)
    saved: int = field(init=False, default=0)  # epochs that last.pt holds
    is_best: bool = field(init=False, default=False)
    phase: str = field(init=False, default="")  # of what last.pt holds
    unsaved: EpochRecord | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.last, self.best = self.folder / "last.pt", self.folder / "best.pt"

    def train_start(self, loop: Loop) -> None:
        if self.saved:
            self._copy()
        else:  # --exist-ok: an older run's weights must not pass for this one's
            for path in (self.last, self.best, *self._of_phases()):
                path.unlink(missing_ok=True)

    def _of_phases(self) -> list[Path]:
        return sorted(self.folder.glob("best_*.pt"))

    def epoch_end(self, loop: Loop, record: EpochRecord) -> bool:
        self.unsaved = None if self.save else record
        if self.save:
            self._write(loop, record)
        return False

    def train_end(self, loop: Loop) -> None:
        if self.unsaved is not None:  # --nosave: the last epoch only, whichever that came to be
            self._write(loop, self.unsaved)

    def _write(self, loop: Loop, record: EpochRecord) -> None:
        if self.phase not in (record.phase, ""):
            self._keep_best()  # the first of the new phase takes its place
        self.saved, self.is_best, self.phase, before = record.epoch + 1, record.is_best, record.phase, (self.saved, self.phase)
        quantization = loop.ema.network.quantization
        model = Model(
            loop.network.blocks, loop.ema.network.weights(), self.names, self.imgsz, record.epoch, loop.best_fitness, self.hyp,
            self.options, loop.state_dict(), quantization.saved() if quantization is not None else None,
        )  # fmt: skip
        try:
            save_model(self.last, model)
        except BaseException:
            self.saved, self.phase = before
            raise
        self._copy()

    def _keep_best(self) -> None:
        if self.best.exists() and not self.passing(self.phase):
            copy_file(self.best, self.folder / f"best_{self.phase}.pt")

    def _copy(self) -> None:
        if self.is_best:
            copy_file(self.last, self.best)
        if self.period > 0 and self.saved % self.period == 0:
            copy_file(self.last, self.folder / f"epoch{self.saved}.pt")

    def strip_best(self) -> list[Path]:
        """Drop the state of training from the best of the last phase and of those before it; return them, the last phase's first."""
        paths = [path for path in (self.best, *self._of_phases()) if path.exists()]
        for path in paths:
            _strip(path)
        return paths

    def strip_last(self) -> None:
        """Drop the state of training from last.pt; with that the run is finished and can no longer be resumed."""
        if self.last.exists():
            _strip(self.last)

    def state_dict(self) -> dict[str, Any]:
        return {"saved": self.saved, "is_best": self.is_best, "phase": self.phase}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.saved, self.is_best, self.phase = state["saved"], state["is_best"], state.get("phase", "")


def _strip(path: Path) -> None:
    modified = path.stat().st_mtime_ns
    save_model(path, stripped(load_model(path)))
    os.utime(path, ns=(modified, modified))


class EarlyStopping(Observer):
    """Asks to stop when `patience` epochs of a phase passed without a fitness at least equal to its best. 0: never; and never in the first
    `least` epochs of the run."""

    def __init__(self, patience: int, least: int = 0) -> None:
        self.patience, self.least, self.best, self.best_epoch, self.phase = patience, least, 0.0, 0, ""

    def epoch_end(self, loop: Loop, record: EpochRecord) -> bool:
        if record.fitness >= self.best or record.phase != self.phase:
            self.best, self.best_epoch, self.phase = record.fitness, record.epoch, record.phase
        stop = 0 < self.patience <= record.epoch - self.best_epoch and record.epoch >= self.least
        if stop:
            LOGGER.info(
                f"stopping early: no better result in {self.patience} epochs; the best was epoch {self.best_epoch + 1}. "
                "--patience 0 turns this off"
            )
        return stop

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "best_epoch": self.best_epoch, "phase": self.phase}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.best_epoch, self.phase = state["best"], state["best_epoch"], state.get("phase", "")


class BatchPictures(Observer):
    """`train_batch{0,1,2}.jpg`: the first three batches as the network sees them."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder, self.names = folder, names

    def train_start(self, loop: Loop) -> None:
        for index in range(3 if loop.start_epoch == 0 else 0):
            (self.folder / f"train_batch{index}.jpg").unlink(missing_ok=True)

    def batch_end(self, loop: Loop, index: int, images: Tensor, targets: Tensor, items: Tensor) -> None:
        path = self.folder / f"train_batch{index}.jpg"
        if index < 3 and not path.exists():
            plots.plot_images(images.numpy(), boxes_of(images, targets), self.names, path)


def boxes_of(images: Tensor, targets: Tensor) -> list[np.ndarray]:
    """Targets (m, 6) of a batch as per-image arrays (n, 5): class, corners in pixels of the input."""
    corners = xywh_to_xyxy(denormalise(targets[:, 2:], tuple(images.shape[2:])))
    rows = torch.cat([targets[:, 1:2], corners], 1)
    return [rows[targets[:, 0] == i].numpy() for i in range(len(images))]
