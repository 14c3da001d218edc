"""A validation run: any checkpoint on any split, with YOLOv5's table, pictures and files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from engine.evaluate import EvaluateOptions, evaluate
from engine.reporting import BatchPlots, metrics_of, plot_evaluation, write_json
from models.checkpoint import Model, load_model
from models.network import fuse
from utils.boxes import label_text
from utils.data_config import DataConfig, read_data
from utils.dataset import DatasetOptions, DetectionDataset, make_loader
from utils.device import Precision, select_device, worker_count
from utils.errors import InputError
from utils.files import make_folder, run_folder
from utils.flags import multiple
from utils.labels import scan_labels
from utils.log import LOGGER
from utils.world import World, join

# COCO's 80 classes keep the ids of its 91: these are the gaps.
_COCO_GAPS = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
_COCO_IDS = [i for i in range(1, 91) if i not in _COCO_GAPS]


@dataclass(frozen=True)
class ValOptions:
    """A validation run. `imgsz` None: the size the checkpoint was trained at. `task`: train, val or test split."""

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
    verbose: bool = False
    save_txt: bool = False
    save_conf: bool = False
    save_json: bool = False
    half: bool = False
    fuse: bool = True
    project: str = "runs/val"
    name: str = "exp"
    exist_ok: bool = False


def validate(options: ValOptions) -> Path:
    """Evaluate, print the table, save `metrics.json` and pictures; return the run folder. Under torchrun each process takes a share."""
    with join() as world:
        return _validate(options, world)


def _validate(options: ValOptions, world: World) -> Path:
    model = load_model(options.weights, options.cfg or None)
    config = read_data(options.data, (options.task,))
    _check_classes(model, config, options)
    device = select_device(options.device, world)
    if options.half and device.type != "cuda":
        LOGGER.info("--half matters on CUDA only; evaluating in float32")
    precision = Precision(device, torch.float16 if options.half and device.type == "cuda" else None)
    network = fuse(model.network()) if options.fuse else model.network()
    network = network.to(device, memory_format=torch.channels_last)
    imgsz = multiple(options.imgsz or model.imgsz, network.max_stride)
    with world.main_first():
        labels = scan_labels(getattr(config, options.task), config.nc, quiet=not world.is_main)
    dataset = DetectionDataset(
        labels,
        DatasetOptions(
            imgsz,
            rect=True,
            pad=0.5,
            stride=network.max_stride,
            batch_size=options.batch_size,
            single_cls=options.single_cls,
            channels=network.channels,
        ),  # fmt: skip
    )
    folder = world.from_main(run_folder(options.project, options.name, options.exist_ok))
    if world.is_main:
        make_folder(folder)
    sink = _Files(folder, options, coco=len(config.names) == 80)
    limits = EvaluateOptions(options.conf_thres, options.iou_thres, options.max_det, options.single_cls)
    evaluation = evaluate(
        network,
        make_loader(dataset, worker_count(options.workers, world), world=world),
        precision,
        limits,
        on_image=sink,
        on_batch=BatchPlots(folder, config.names),
        world=world,
    )
    if not world.is_main:
        return folder
    sink.close()
    LOGGER.info(evaluation.table(config.names, options.verbose or config.nc < 50))
    LOGGER.info(
        "speed per image: "
        + ", ".join(f"{v:.1f} ms {k}" for k, v in evaluation.speed_ms.items())
        + f", at shape ({options.batch_size}, {network.channels}, {imgsz}, {imgsz})"
    )
    write_json(folder / "metrics.json", metrics_of(evaluation, model.blocks, imgsz))
    plot_evaluation(evaluation, config.names, folder)
    LOGGER.info(f"results saved to {folder}")
    return folder


def _check_classes(model: Model, config: DataConfig, options: ValOptions) -> None:
    if len(model.names) != config.nc and not options.single_cls:
        raise InputError(
            f"{options.weights} has {len(model.names)} classes, {options.data} has {config.nc}; evaluate on the data it was trained on"
        )


class _Files:
    """Image sink of `evaluate`: `--save-txt` labels and `--save-json` rows."""

    def __init__(self, folder: Path, options: ValOptions, coco: bool) -> None:
        self.folder, self.options = folder, options
        self.ids: Sequence[int] = _COCO_IDS if coco else range(10**6)
        self.rows: list[dict] = []

    def __call__(self, path: Path, shape: tuple[int, int], found: np.ndarray) -> None:
        if self.options.save_txt:
            self._write_txt(path, shape, found)
        if self.options.save_json:
            image_id = int(path.stem) if path.stem.isnumeric() else path.stem
            for (x1, y1, x2, y2), conf, c in zip(found[:, :4].tolist(), found[:, 4].tolist(), found[:, 5].astype(int).tolist()):
                box = [round(v, 3) for v in (x1, y1, x2 - x1, y2 - y1)]
                self.rows.append({"image_id": image_id, "category_id": self.ids[c], "bbox": box, "score": round(conf, 5)})

    def _write_txt(self, path: Path, shape: tuple[int, int], found: np.ndarray) -> None:
        text = label_text(found, shape, self.options.save_conf)
        (make_folder(self.folder / "labels") / f"{path.stem}.txt").write_text(text, encoding="utf-8")

    def close(self) -> None:
        if self.options.save_json:
            write_json(self.folder / f"{Path(self.options.weights).stem}_predictions.json", self.rows)
