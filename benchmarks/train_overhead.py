"""What the training loop costs beside the arithmetic: time of an epoch / time of bare forward + backward + optimizer step.

    python benchmarks/train_overhead.py            # YOLOv5n, 320 px, batch 16; two cores: about four minutes
    python benchmarks/train_overhead.py --cache ram --data data/digits.yaml

Both are measured in one process, in turns, on the same tensors: the epoch's batches are kept, and the bare loop runs over them with
the same network, loss, optimizer and precision. The epoch includes loading, mosaic and augmentation, the schedule, clipping, EMA and
logging. Bounds: 1.25 with the images in memory, 1.8 with JPEGs decoded as they are needed. The default images are JPEGs: COCO128
where COCO128_DIR is set, else generated ones of 640 x 480 px.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from common import first_images, in_turns, jpeg_yaml, median_ratio, report

import torch  # isort: skip

from engine.loop import Loop, LoopOptions
from engine.objectives import DetectionObjective
from engine.observers import Progress
from engine.optim import build_optimizer
from engine.schedule import ScheduleOptions, YoloSchedule
from engine.seams import Seams
from models.checkpoint import read_structure
from models.network import Network
from utils.augment import AugmentOptions
from utils.data_config import read_data
from utils.dataset import DatasetOptions, DetectionDataset, make_loader
from utils.device import training_precision, worker_count
from utils.hyp import read_hyp
from utils.labels import scan_labels
from utils.loss import DetectionLoss

BOUNDS = {"ram": 1.25, "none": 1.8}


def build(args: argparse.Namespace, data: str | Path, cache: str) -> Loop:
    """A loop as train.py assembles it, with the default hyper-parameters (mosaic, perspective, HSV, flips)."""
    config = read_data(data)
    labels = first_images(scan_labels(config.train, config.nc), args.images)
    augment = AugmentOptions.from_hyp(read_hyp("hyp.scratch-low.yaml"))
    dataset = DetectionDataset(labels, DatasetOptions(args.img, augment, batch_size=args.batch, cache=None if cache == "none" else cache))
    loader = make_loader(dataset, worker_count(args.workers), shuffle=True)
    network = Network(read_structure(args.cfg, config.nc)).to(memory_format=torch.channels_last)
    objective = DetectionObjective(DetectionLoss(network.anchors, network.strides, config.nc, args.img))
    optimizer = build_optimizer(network, "SGD", 0.001, 0.9, 0.0)
    schedule = YoloSchedule(optimizer, ScheduleOptions(10**6, 0.001, 1.0, 0.9, 0, 0.8, 0.1, 1))
    precision = training_precision(torch.device("cpu"))
    progress = Progress(len(loader), args.repeats, objective.names, args.img)
    return Loop(
        network, objective, optimizer, schedule, loader, lambda n: (0.0, {}), precision, LoopOptions(10**6), Seams(observers=[progress])
    )


def bare_epoch(loop: Loop, batches: list) -> float:
    """Seconds of forward, backward and step over `batches`, nothing else."""
    loop.network.train()
    start = time.perf_counter()
    for images, targets in batches:
        with loop.precision.autocast():
            loss, _ = loop.objective(loop.network, images, targets)
        loss.backward()
        loop.optimizer.step()
        loop.optimizer.zero_grad()
    return time.perf_counter() - start


def whole_epoch(loop: Loop, number: int) -> float:
    """Seconds of one epoch of the loop."""
    start = time.perf_counter()
    loop._epoch(number)
    return time.perf_counter() - start


def measure(args: argparse.Namespace, data: str | Path, cache: str) -> None:
    loop = build(args, data, cache)
    for observer in loop.seams.observers:
        observer.train_start(loop)
    batches = [(loop.precision.images(b.images), b.targets) for b in loop.data.epoch(0)]  # starts the workers, too
    bare_epoch(loop, batches[:3])
    epochs = iter(range(args.repeats))
    seconds = in_turns({"epoch": lambda: whole_epoch(loop, next(epochs)), "bare": lambda: bare_epoch(loop, batches)}, args.repeats)
    for epoch, bare in zip(seconds["epoch"], seconds["bare"]):
        print(f"epoch {epoch:.2f} s, bare {bare:.2f} s, ratio {epoch / bare:.3f}")
    ratio = median_ratio(seconds["epoch"], seconds["bare"])
    report(
        f"train_overhead, cache {cache}",
        f"median ratio {ratio:.3f}, bound {BOUNDS[cache]} ({args.img} px, batch {args.batch}, {len(batches)} batches, "
        f"{torch.get_num_threads()} threads, {loop.precision.autocast_dtype or torch.float32})",
        ratio=ratio, bound=BOUNDS[cache], repeats=args.repeats, seconds=seconds,
    )  # fmt: skip


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--cfg", default="models/yolov5n.yaml")
    p.add_argument("--data", help="a dataset yaml; left out: JPEGs as said above")
    p.add_argument("--cache", choices=[*BOUNDS], nargs="+", default=[*BOUNDS])
    p.add_argument("--img", type=int, default=320)
    p.add_argument("--batch", type=int, default=16)
    p.add_argument("--images", type=int, default=320, help="no more than so many")
    p.add_argument("--workers", type=int, default=8)
    p.add_argument("--repeats", type=int, default=7)
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = args.data or jpeg_yaml(Path(folder))
        for cache in args.cache:
            measure(args, data, cache)


if __name__ == "__main__":
    main()
