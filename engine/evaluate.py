"""Evaluation by YOLOv5's protocol: predictions of a network over a loader -> precision, recall, mAP, speed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from engine.behind import one_behind
from engine.runner import Runner, runner_of
from engine.runtime import Runtime
from models.network import Network
from utils.boxes import denormalise, scale_boxes, xywh_to_xyxy
from utils.dataset import Batch, EpochLoader
from utils.device import Precision, ReusedImages
from utils.loss import DetectionLoss
from utils.metrics import APResult, ConfusionMatrix, ap_per_class, fitness, match
from utils.world import SOLO, World


@dataclass(frozen=True)
class EvaluateOptions:
    """YOLOv5's defaults for measuring mAP. `single_cls` makes every class 0 and suppression class-blind; `augment`: see `engine/tta.py`."""

    conf_thres: float = 0.001
    iou_thres: float = 0.6
    max_det: int = 300
    single_cls: bool = False
    augment: bool = False
    progress: bool = True


@dataclass(frozen=True)
class Evaluation:
    """The figures of one evaluation. `speed_ms`: per image, of pre-processing, inference and NMS; `losses` (3,) where a loss was given."""

    images: int
    instances: int
    result: APResult
    confusion: ConfusionMatrix
    speed_ms: dict[str, float]
    losses: tuple[float, ...] = ()

    @property
    def fitness(self) -> float:
        return fitness(self.result.map50, self.result.map)

    def metrics(self) -> dict[str, float]:
        """Precision, recall, mAP@.5, mAP@.5:.95 as plain numbers."""
        r = self.result
        return {"precision": float(r.mp), "recall": float(r.mr), "map50": float(r.map50), "map": float(r.map)}

    def row(self, name: str = "all") -> str:
        """The table row of YOLOv5."""
        m = self.metrics()
        return f"{name:>22}{self.images:>11}{self.instances:>11}" + "".join(
            f"{m[k]:>11.3g}" for k in ("precision", "recall", "map50", "map")
        )

    def table(self, names: Sequence[str], verbose: bool) -> str:
        """Header, the row of all classes and, if `verbose`, a row per class."""
        lines = [HEADER, self.row()]
        r = self.result
        for i, c in enumerate(r.classes if verbose else ()):
            values = (r.precision[i], r.recall[i], r.ap[i, 0], r.ap[i].mean())
            lines.append(f"{names[c]:>22}{self.images:>11}{r.labels[i]:>11}" + "".join(f"{v:>11.3g}" for v in values))
        return "\n".join(lines)


HEADER = "".join(f"{h:>{w}}" for h, w in zip(("Class", "Images", "Instances", "P", "R", "mAP50", "mAP50-95"), (22, 11, 11, 11, 11, 11, 11)))
ImageSink = Callable[[Path, tuple[int, int], np.ndarray], None]
BatchSink = Callable[[int, Batch, list[Tensor]], None]


@dataclass
class _Tally:
    """What accumulates over the batches."""

    confusion: ConfusionMatrix
    correct: list[np.ndarray] = field(default_factory=list)
    conf: list[np.ndarray] = field(default_factory=list)
    predicted: list[np.ndarray] = field(default_factory=list)
    true: list[np.ndarray] = field(default_factory=list)
    images: int = 0
    times: np.ndarray = field(default_factory=lambda: np.zeros(3))
    losses: Tensor | None = None
    batches: int = 0
    found: list[tuple[Path, tuple[int, int], np.ndarray]] = field(default_factory=list)  # for the main process's `on_image`
    order: list[tuple[int, int, int]] = field(default_factory=list)  # (batch, rank, image) of each image

    def keep(self, path: Path, shape: tuple[int, int], found: np.ndarray) -> None:
        """An `ImageSink` that remembers."""
        self.found.append((path, shape, found))


def _merged(tallies: list[_Tally]) -> _Tally:
    """The tallies of several processes as one, with the images in the order in which one process would have met them."""
    if len(tallies) == 1:
        return tallies[0]
    whole = _Tally(tallies[0].confusion)
    order = [place for t in tallies for place in t.order]
    by_place = sorted(range(len(order)), key=order.__getitem__)
    for name in ("correct", "conf", "predicted", "true", "found"):
        items = [item for t in tallies for item in getattr(t, name)]
        setattr(whole, name, [items[i] for i in by_place] if items else [])
    for t in tallies[1:]:
        whole.confusion.matrix += t.confusion.matrix
    whole.images, whole.batches = sum(t.images for t in tallies), sum(t.batches for t in tallies)
    whole.times = sum(t.times for t in tallies)
    losses = [t.losses for t in tallies if t.losses is not None]
    whole.losses = torch.stack(losses).sum(0) if losses else None
    return whole


@torch.no_grad()
def evaluate(
    network: Network | Runtime, loader: EpochLoader, precision: Precision, options: EvaluateOptions = EvaluateOptions(),
    loss: DetectionLoss | None = None, on_image: ImageSink | None = None, on_batch: BatchSink | None = None, world: World = SOLO,
) -> Evaluation:  # fmt: skip
    """Evaluate `network` (put into eval mode), or an exported model, on the loader's images.

    `on_image(path, (height, width), detections (n, 6) in pixels of the original)` sees every image; `on_batch(index, batch,
    detections in input pixels)` every batch; with `loss` the mean loss parts are measured too. While the network works on a batch,
    a thread suppresses and matches the detections of the one before and calls both sinks, in order. Of several processes each measures its
    slice of every batch; all return the figures of the whole, and the sinks run in the main one (`on_batch` with its slices).
    """
    tally = _Tally(ConfusionMatrix(network.classes))
    runner = runner_of(network, precision, options.augment)
    shared = world.size > 1  # then the main process's sink waits for the images of the others
    each = tally.keep if shared and on_image else on_image
    batches = on_batch if world.is_main else None
    after = _After(tally, options, runner, each, batches)
    bar = tqdm(
        loader.epoch(0),
        total=len(loader),
        desc=HEADER,
        bar_format="{desc} {n_fmt}/{total_fmt}",
        disable=None if options.progress else True,
        leave=False,
    )
    convert = ReusedImages(precision)
    with one_behind() as submit:
        for batch in bar:
            t0 = precision.clock()
            images = convert(batch.images)
            t1 = precision.clock()
            raw = runner.forward(images)
            tally.times[:2] += (t1 - t0, precision.clock() - t1)
            if loss is not None:
                parts = loss([m.float() for m in raw[0]], batch.targets.to(precision.device))[1].cpu()
                tally.losses = parts if tally.losses is None else tally.losses + parts
            tally.batches += 1
            tally.order += [(batch.number, world.rank, i) for i in range(len(batch))]
            submit(after, batch, raw)
    tally = _merged(world.gather(tally))
    for item in tally.found if on_image and world.is_main else ():
        on_image(*item)
    return _finish(tally)


@dataclass(frozen=True)
class _After:
    """What follows the network: from what it gives for a batch to its place in the tally."""

    tally: _Tally
    options: EvaluateOptions
    runner: Runner
    on_image: ImageSink | None
    on_batch: BatchSink | None

    @torch.no_grad()
    def __call__(self, batch: Batch, raw: Any) -> None:
        o, start = self.options, time.perf_counter()
        rows = self.runner.candidates(raw, batch.images.shape[3], o.conf_thres)
        detections = self.runner.suppress(rows, o.conf_thres, o.iou_thres, multi_label=True, agnostic=o.single_cls, max_det=o.max_det)
        detections = [d.cpu() for d in detections]
        self.tally.times[2] += time.perf_counter() - start
        if self.on_batch:
            self.on_batch(batch.number, batch, detections)
        _count(self.tally, batch, detections, o, self.on_image)


def _count(tally: _Tally, batch: Batch, detections: list[Tensor], options: EvaluateOptions, on_image: ImageSink | None) -> None:
    """Match each image's detections with its labels, both in pixels of the original image."""
    height, width = batch.images.shape[2:]
    for i, (found, (shape, (gain, *pad)), path) in enumerate(zip(detections, batch.shapes, batch.paths)):
        labels = batch.targets[batch.targets[:, 0] == i, 1:]
        native = scale_boxes(xywh_to_xyxy(denormalise(labels[:, 1:], (height, width))), gain, tuple(pad), shape)
        labels = np.concatenate([labels[:, :1].numpy(), native.numpy()], 1)
        found = torch.cat([scale_boxes(found[:, :4], gain, tuple(pad), shape), found[:, 4:]], 1).numpy()
        if options.single_cls:
            found[:, 5], labels[:, 0] = 0, 0
        tally.images += 1
        tally.true.append(labels[:, 0])
        tally.correct.append(match(found, labels))
        tally.conf.append(found[:, 4])
        tally.predicted.append(found[:, 5])
        tally.confusion.add(found, labels)
        if on_image:
            on_image(path, shape, found)


def _finish(tally: _Tally) -> Evaluation:
    true = np.concatenate(tally.true)
    result = ap_per_class(np.concatenate(tally.correct), np.concatenate(tally.conf), np.concatenate(tally.predicted), true)
    speed = dict(zip(("preprocess", "inference", "nms"), (tally.times / max(tally.images, 1) * 1e3).tolist()))
    losses = tuple((tally.losses / tally.batches).tolist()) if tally.losses is not None else ()
    return Evaluation(tally.images, len(true), result, tally.confusion, speed, losses)
