"""Do two processes train as one does? The same batches, sliced, against the whole; losses step by step, gradients averaged by DDP.

    python benchmarks/two_processes.py --data data/digits.yaml      # two cores: about two minutes

Starts itself by torchrun with one and with two processes (gloo, CPU): first with the running statistics of the batch norms frozen, where the
losses must agree step by step, then with live ones, where each process normalises by its own half of a batch and the means of an epoch
stay close. Prints both differences, and exits with 1 where they exceed 1e-4 and 1%.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from common import first_images, report

import torch  # isort: skip
from torch import Tensor  # isort: skip

from engine.loop import Loop, LoopOptions
from engine.objectives import DetectionObjective, DistillationObjective
from engine.optim import build_optimizer
from engine.schedule import ScheduleOptions, YoloSchedule
from engine.seams import Observer, Seams
from models.checkpoint import read_structure
from models.network import Network, init_detect_biases
from pruning.sparsity import SparsityOptions, SparsityTerm, penalised
from utils.augment import AugmentOptions
from utils.data_config import read_data
from utils.dataset import DatasetOptions, DetectionDataset, make_loader
from utils.device import Precision
from utils.labels import scan_labels
from utils.loss import DetectionLoss
from utils.world import World, join


class FrozenNorms:
    """An objective under which batch norms use their running statistics, as the whole batch's do not depend on how it is sliced."""

    def __init__(self, objective: DistillationObjective) -> None:
        self.objective, self.names = objective, objective.names

    def __call__(self, network: torch.nn.Module, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
        return self.objective(network, images, targets)


class Record(Observer):
    """The parts of the loss, batch by batch, from the running means that the loop shows its observers."""

    def __init__(self) -> None:
        self.steps: list[list[float]] = []
        self.epochs: list[dict[str, float]] = []
        self._mean = torch.zeros(0)

    def batch_end(self, loop: Loop, index: int, images: Tensor, targets: Tensor, items: Tensor) -> None:
        previous = self._mean if index else torch.zeros_like(items)
        self.steps.append((items * (index + 1) - previous * index).tolist())
        self._mean = items.clone()

    def epoch_end(self, loop: Loop, record) -> bool:
        self.epochs.append(dict(record.losses))
        return False


def build(args: argparse.Namespace, world: World, record: Record) -> Loop:
    """A loop with every seam that several processes touch: accumulation, distillation, sparsity, EMA; mosaic and the other augmentations."""
    config = read_data(args.data)
    labels = first_images(scan_labels(config.train, config.nc, quiet=True), args.images)
    loader = make_loader(
        DetectionDataset(labels, DatasetOptions(args.img, AugmentOptions(), batch_size=args.batch)), shuffle=True, world=world
    )
    torch.manual_seed(0)
    network, teacher = (Network(read_structure(args.cfg, config.nc)) for _ in range(2))
    init_detect_biases(network)
    loss = DetectionLoss(network.anchors, network.strides, config.nc, args.img, world=world)
    objective = DistillationObjective(loss, teacher, network.anchors) if args.frozen else DetectionObjective(loss)
    optimizer = build_optimizer(network, "SGD", args.lr, 0.9, 5e-4)
    schedule = YoloSchedule(optimizer, ScheduleOptions(args.epochs, args.lr, 1.0, 0.9, 0, 0.8, 0.1, accumulate=2 if args.frozen else 1))
    term = SparsityTerm(penalised(network.blocks, shortcuts=True), SparsityOptions(1e-3), args.epochs)
    seams = Seams(terms=[term] if args.frozen else [], observers=[record] if world.is_main else [])
    return Loop(
        network, FrozenNorms(objective) if args.frozen else objective, optimizer, schedule, loader, lambda n: (0.0, {}),
        Precision(torch.device("cpu")), LoopOptions(args.epochs), seams, world,
    )  # fmt: skip


def work(args: argparse.Namespace) -> None:
    """One process of a run: train, and let the first one write what it saw."""
    with join() as world:
        record = Record()
        loop = build(args, world, record)
        loop.run()
        sums = [float(v.double().sum()) for v in loop.ema.network.state_dict().values()]
        same = world.gather(sums)
        if world.is_main:
            Path(args.out).write_text(
                json.dumps({"steps": record.steps, "epochs": record.epochs, "aligned": all(s == same[0] for s in same)})
            )


def run(args: argparse.Namespace, processes: int, frozen: bool) -> dict:
    """The record of a run with so many processes."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "record.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), __file__]
        command += ["--out", str(out), "--data", args.data, "--cfg", args.cfg, "--lr", str(args.lr)]
        for name in ("images", "img", "batch", "epochs"):
            command += [f"--{name}", str(getattr(args, name))]
        # One thread each, as torchrun gives several processes: another number would already sum in another order.
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run(command + ["--frozen"] * frozen, check=True, stdout=subprocess.DEVNULL, env=environment)
        return json.loads(out.read_text())


def compare(args: argparse.Namespace) -> dict[str, float]:
    """Largest difference of a step's loss parts with frozen norms, and of an epoch's means, in relation to them, with live ones."""
    one, two = run(args, 1, True), run(args, 2, True)
    steps = max(abs(a - b) for x, y in zip(one["steps"], two["steps"], strict=True) for a, b in zip(x, y, strict=True))
    live, shared = run(args, 1, False), run(args, 2, False)
    means = max(abs(x[k] - y[k]) / abs(x[k]) for x, y in zip(live["epochs"], shared["epochs"], strict=True) for k in x)
    return {
        "steps": len(one["steps"]), "largest_step_difference": steps, "largest_epoch_mean_difference": means,
        "processes_aligned": two["aligned"] and shared["aligned"],
    }  # fmt: skip


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--data", default="data/digits.yaml")
    p.add_argument("--cfg", default="models/yolov5n.yaml")
    p.add_argument("--images", type=int, default=513, help="this number leaves a last batch with fewer images than processes")
    p.add_argument("--img", type=int, default=128)
    p.add_argument("--batch", type=int, default=32)
    p.add_argument("--epochs", type=int, default=2)
    p.add_argument("--lr", type=float, default=0.01)
    p.add_argument("--frozen", action="store_true", help=argparse.SUPPRESS)
    p.add_argument("--out", default="", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.out:
        work(args)
        return
    result = compare(args)
    text = (
        f"one process against two, {result['steps']} steps: losses differ by at most {result['largest_step_difference']:.1e} (bound 1e-4) with "
        f"frozen norms, epoch means by {result['largest_epoch_mean_difference']:.2%} (bound 1%) with live ones"
    )
    report("two_processes", text, **result)
    within = result["largest_step_difference"] <= 1e-4 and result["largest_epoch_mean_difference"] <= 0.01
    sys.exit(0 if within and result["processes_aligned"] else 1)


if __name__ == "__main__":
    main()
