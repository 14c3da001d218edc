"""A validation run: any checkpoint or exported model on any split, with YOLOv5's table, pictures and files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine import coco_json
from engine.classify import evaluate_classes, report, validation_images, validation_loader
from engine.evaluate import EvaluateOptions, evaluate
from engine.inference import inference_network
from engine.reporting import BatchPlots, metrics_of, plot_evaluation, write_json
from engine.runtime import Runtime
from engine.runtimes import open_runtime
from models.blocks import Blocks, is_classifier
from models.checkpoint import Model, load_model
from models.network import Network
from utils.boxes import label_text
from utils.data_config import DataConfig, read_data
from utils.dataset import DatasetOptions, DetectionDataset, make_loader
from utils.device import Precision, evaluation_workers, inference_precision, select_device
from utils.errors import InputError
from utils.files import make_folder, run_folder, write_text
from utils.flags import multiple
from utils.labels import LabelSet, scan_labels
from utils.log import LOGGER
from utils.world import World, join

SPEED_THRESHOLDS = (0.25, 0.45)  # confidence and IoU of `--task speed`


@dataclass(frozen=True)
class ValOptions:
    """A validation run. `imgsz` None: the size the checkpoint was trained at, or the file exported for. `dnn`: in OpenCV, a `.onnx` or a
    Darknet pair.

    `task`: train, val or test split; `speed` times the val split at fixed shape: squares without padding, and the confidence and
    IoU thresholds of detection.
    """

    weights: str
    data: str
    cfg: str = ""
    imgsz: int | None = None
    batch_size: int = 32
    conf_thres: float = 0.001
    iou_thres: float = 0.6
    max_det: int = 300
    task: str = "val"
    device: str = ""
    workers: int = 8
    single_cls: bool = False
    augment: bool = False
    verbose: bool = False
    save_txt: bool = False
    save_conf: bool = False
    save_json: bool = False
    plots: bool = True
    half: bool = False
    fuse: bool = True
    project: str = "runs/val"
    name: str = "exp"
    exist_ok: bool = False
    dialect: str = "auto"
    dnn: bool = False


def validate(options: ValOptions) -> Path:
    """Evaluate, print the table, save `metrics.json` and pictures; return the run folder. Under torchrun each process takes a share."""
    with join() as world:
        return _validate(options, world)


def _validate(options: ValOptions, world: World) -> Path:
    speed = options.task == "speed"
    split = "val" if speed else options.task
    device = select_device(options.device, world)
    runtime = open_runtime(options.weights, options.cfg, device, options.dnn)
    if runtime is None:
        model = load_model(options.weights, options.cfg or None, options.dialect)
        if is_classifier(model.blocks):
            return _validate_classes(options, model, split, world)
        subject = _checkpoint(options, model, device)
    else:
        subject = _exported(options, runtime)
    network, precision, imgsz = subject.network, subject.precision, subject.imgsz
    config = read_data(options.data, (split,))
    _check_classes(subject.names, config, options)
    names = _names(subject.names, config)
    with world.main_first():
        labels = scan_labels(getattr(config, split), config.nc, quiet=not world.is_main)
    dataset = DetectionDataset(labels, _dataset_options(options, subject))
    folder = world.from_main(run_folder(options.project, options.name, options.exist_ok))
    if world.is_main:
        make_folder(folder)
    sink = _Files(folder, options, labels, names)
    thresholds = SPEED_THRESHOLDS if speed else (options.conf_thres, options.iou_thres)
    evaluation = evaluate(
        network,
        make_loader(
            dataset, evaluation_workers(options.workers, precision.device, world), pin_memory=precision.device.type == "cuda", world=world
        ),
        precision,
        EvaluateOptions(*thresholds, options.max_det, options.single_cls, options.augment, progress=world.is_main),
        on_image=sink if options.save_txt or options.save_json else None,
        on_batch=BatchPlots(folder, names) if options.plots else None,
        world=world,
    )
    if not world.is_main:
        return folder
    LOGGER.info(evaluation.table(names, options.verbose or config.nc < 50))
    height, width = subject.shape or (imgsz, imgsz)
    LOGGER.info(
        "speed per image: "
        + ", ".join(f"{v:.1f} ms {k}" for k, v in evaluation.speed_ms.items())
        + f", at shape ({options.batch_size}, {network.channels}, {height}, {width})"
    )
    coco = sink.close(getattr(config, split))
    run = {"weights": str(options.weights), "data": str(options.data), "task": options.task, "imgsz": imgsz}
    write_json(folder / "metrics.json", metrics_of(evaluation, subject.blocks, imgsz) | run | coco)
    if options.plots:
        plot_evaluation(evaluation, names, folder)
    LOGGER.info(f"results saved to {folder}")
    return folder


@dataclass(frozen=True, eq=False)
class _Subject:
    """What is measured, ready to run. `shape`: the (height, width) that it is fixed to; `blocks`: None of an exported model."""

    network: Network | Runtime
    precision: Precision
    names: tuple[str, ...]
    imgsz: int
    shape: tuple[int, int] | None = None
    blocks: Blocks | None = None


def _checkpoint(options: ValOptions, model: Model, device: torch.device) -> _Subject:
    precision = inference_precision(device, options.half)
    if options.fuse:
        network = inference_network(model.network(), precision)
    else:
        network = model.network().to(device, memory_format=torch.channels_last)
    imgsz = multiple(options.imgsz or model.imgsz, network.max_stride)
    return _Subject(network, precision, tuple(model.names), imgsz, blocks=model.blocks)


def _exported(options: ValOptions, runtime: Runtime) -> _Subject:
    runtime.refuse(half=options.half, augment=options.augment)
    shape = runtime.sides((options.imgsz,) if options.imgsz else None)
    imgsz = max(shape) if shape else multiple(options.imgsz or max(runtime.metadata.imgsz), runtime.max_stride)
    if runtime.metadata.nms and options.conf_thres < runtime.metadata.conf:
        LOGGER.info(
            f"{options.weights}: leaves out what is below confidence {runtime.metadata.conf:g}, so its mAP is lower than the network's; "
            "measure that with a file that was exported without --nms"
        )
    return _Subject(runtime, Precision(runtime.device), runtime.names, imgsz, shape)


def _validate_classes(options: ValOptions, model: Model, split: str, world: World) -> Path:
    """The same for a classifier: accuracy on an image-folder data set."""
    for name in ("single_cls", "augment", "save_txt", "save_json"):
        if getattr(options, name):
            raise InputError(f"--{name.replace('_', '-')} is for detectors, and {options.weights} is a classifier; leave it out")
    device = select_device(options.device, world)
    precision = inference_precision(device, options.half)
    network = inference_network(model.network(), precision)
    imgsz = multiple(options.imgsz or model.imgsz, network.max_stride)
    labels = validation_images(options.data, split, model.names, options.weights, quiet=not world.is_main)
    folder = world.from_main(run_folder(options.project, options.name, options.exist_ok))
    workers = evaluation_workers(options.workers, device, world)
    loader = validation_loader(labels, imgsz, options.batch_size, network.channels, workers, world)
    found = evaluate_classes(network, loader, precision, world)
    if world.is_main:
        run = {"weights": str(options.weights), "data": str(options.data), "split": options.task}
        report(found, model.blocks, model.names, imgsz, make_folder(folder), options.verbose, **run)
        LOGGER.info(f"results saved to {folder}")
    return folder


def _dataset_options(options: ValOptions, subject: _Subject) -> DatasetOptions:
    rect = options.task != "speed" and subject.shape is None
    return DatasetOptions(
        subject.imgsz, rect=rect, pad=0.5 if rect else 0.0, stride=subject.network.max_stride, batch_size=options.batch_size,
        single_cls=options.single_cls, channels=subject.network.channels, shape=subject.shape,
    )  # fmt: skip


def _names(own: tuple[str, ...], config: DataConfig) -> tuple[str, ...]:
    """The class names of the data, or the model's `own` where the data says only how many there are."""
    unnamed = config.names == tuple(f"class{i}" for i in range(config.nc))
    return own if unnamed and len(own) == config.nc else config.names


def _check_classes(own: tuple[str, ...], config: DataConfig, options: ValOptions) -> None:
    if len(own) != config.nc and not options.single_cls:
        raise InputError(
            f"{options.weights} has {len(own)} classes, {options.data} has {config.nc}; evaluate on the data it was trained on"
        )


class _Files:
    """Image sink of `evaluate`: `--save-txt` labels and `--save-json` rows."""

    def __init__(self, folder: Path, options: ValOptions, labels: LabelSet, names: Sequence[str]) -> None:
        self.folder, self.options, self.labels, self.names = folder, options, labels, names
        self.ids, self.categories = coco_json.image_ids(labels.images), coco_json.category_ids(names)
        self.rows: list[dict[str, Any]] = []

    def __call__(self, path: Path, shape: tuple[int, int], found: np.ndarray) -> None:
        if self.options.save_txt:
            text = label_text(found, shape, self.options.save_conf)
            (make_folder(self.folder / "labels") / f"{path.stem}.txt").write_text(text, encoding="utf-8")
        if self.options.save_json:
            self.rows += coco_json.result_rows(self.ids[path], found, self.categories)

    def close(self, sources: Sequence[Path]) -> dict[str, Any]:
        """Write the results of `--save-json` and have them judged; return what that adds to `metrics.json`."""
        if not self.options.save_json:
            return {}
        predictions = self.folder / f"{Path(self.options.weights).stem}_predictions.json"
        write_text(predictions, json.dumps(self.rows))
        ids = list(self.ids.values())
        official = None if self.options.single_cls else coco_json.official_truth(sources, ids, self.names)
        where, truth = official or ("the labels", coco_json.ground_truth(self.labels, self.ids, self.names, self.options.single_cls))
        judged = coco_json.judge(truth, predictions, ids)
        if judged is None:
            return {}
        LOGGER.info(f"pycocotools on {where}: mAP50 {judged['map50']:.4f}, mAP50-95 {judged['map']:.4f} ({predictions})")
        return {"coco": judged}
