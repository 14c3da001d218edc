"""What the training loop costs beside the arithmetic: time of an epoch / time of bare forward + backward + optimizer step.

    python benchmarks/train_overhead.py            # YOLOv5n, 320 px, batch 16, --cache ram; two cores: about four minutes

Both are measured in one process, in turns, on the same tensors: the epoch's batches are kept, and the bare loop runs over them with
the same network, loss and optimizer. The epoch includes loading, mosaic and augmentation, the schedule, clipping, EMA and logging.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

from engine.loop import Loop, LoopOptions  # noqa: E402
from engine.objectives import DetectionObjective  # noqa: E402
from engine.observers import Progress  # noqa: E402
from engine.optim import build_optimizer  # noqa: E402
from engine.schedule import ScheduleOptions, YoloSchedule  # noqa: E402
from engine.seams import Seams  # noqa: E402
from models.checkpoint import read_structure  # noqa: E402
from models.network import Network  # noqa: E402
from utils.augment import AugmentOptions  # noqa: E402
from utils.data_config import read_data  # noqa: E402
from utils.dataset import DatasetOptions, DetectionDataset, make_loader  # noqa: E402
from utils.device import training_precision, worker_count  # noqa: E402
from utils.hyp import read_hyp  # noqa: E402
from utils.labels import LabelSet, scan_labels  # noqa: E402
from utils.loss import DetectionLoss  # noqa: E402


def first_images(labels: LabelSet, count: int) -> LabelSet:
    """The first `count` images of a label set."""
    return LabelSet(
        labels.images[:count], labels.labels[:count], labels.sizes[:count], labels.found, labels.missing, labels.empty, labels.corrupt, ()
    )


def build(args: argparse.Namespace) -> Loop:
    """A loop as train.py assembles it, with the default hyper-parameters (mosaic, perspective, HSV, flips)."""
    config = read_data(args.data)
    labels = first_images(scan_labels(config.train, config.nc), args.images)
    augment = AugmentOptions.from_hyp(read_hyp("hyp.scratch-low.yaml"))
    dataset = DetectionDataset(labels, DatasetOptions(args.img, augment, batch_size=args.batch, cache="ram"))
    loader = make_loader(dataset, worker_count(args.workers), shuffle=True)
    network = Network(read_structure(args.cfg, config.nc)).to(memory_format=torch.channels_last)
    objective = DetectionObjective(DetectionLoss(network.anchors, network.strides, config.nc, args.img))
    optimizer = build_optimizer(network, "SGD", 0.001, 0.9, 0.0)
    schedule = YoloSchedule(optimizer, ScheduleOptions(10**6, 0.001, 1.0, 0.9, 0, 0.8, 0.1, 1))
    precision = training_precision(torch.device("cpu"))
    progress = Progress(len(loader), args.rounds, objective.names, args.img)
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


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--cfg", default="models/yolov5n.yaml")
    p.add_argument("--data", default="data/digits.yaml")
    p.add_argument("--img", type=int, default=320)
    p.add_argument("--batch", type=int, default=16)
    p.add_argument("--images", type=int, default=320)
    p.add_argument("--workers", type=int, default=8)
    p.add_argument("--rounds", type=int, default=4)
    args = p.parse_args()
    loop = build(args)
    for observer in loop.seams.observers:
        observer.train_start(loop)
    batches = [(loop.precision.images(b.images), b.targets) for b in loop.data.epoch(0)]
    bare_epoch(loop, batches[:3])
    ratios = []
    for number in range(args.rounds):
        start = time.perf_counter()
        loop._epoch(number)
        whole = time.perf_counter() - start
        bare = bare_epoch(loop, batches)
        ratios.append(whole / bare)
        print(f"round {number + 1}: epoch {whole:.2f} s, bare {bare:.2f} s, ratio {whole / bare:.3f}")
    print(
        f"median ratio {statistics.median(ratios):.3f} "
        f"({args.img} px, batch {args.batch}, {len(batches)} batches, {torch.get_num_threads()} threads)"
    )


if __name__ == "__main__":
    main()
