"""How much faster a training step is than the same step in contiguous float32.

    python benchmarks/train_step.py                # YOLOv5n, 320 px, batch 16; two cores: about one minute

One process, in turns, equal weights, images and targets, in-place SiLU on both sides. The faster side is channels last with bfloat16
autocast where the CPU has the instructions (AVX-512 BF16 or AMX); there the bound is 1.8. On other CPUs it is channels last in
float32, as training runs there, and the ratio has no bound.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

from common import in_turns, median_ratio, report

import torch  # isort: skip

from engine.optim import build_optimizer
from models.checkpoint import read_structure
from models.network import Network
from utils.device import Precision, training_precision
from utils.loss import DetectionLoss

BOUND = 1.8


def random_targets(batch: int, nc: int, per_image: int = 7) -> torch.Tensor:
    """Targets (m, 6) of boxes between a twentieth and a half of the image."""
    count = batch * per_image
    image = torch.arange(batch).repeat_interleave(per_image)
    boxes = torch.cat((torch.rand(count, 2) * 0.6 + 0.2, torch.rand(count, 2) * 0.45 + 0.05), 1)
    return torch.cat((torch.stack((image, torch.randint(nc, (count,))), 1).float(), boxes), 1)


def stepper(args: argparse.Namespace, layout: torch.memory_format, precision: Precision) -> Callable[[], float]:
    """A function that trains `args.steps` steps and returns their seconds."""
    torch.manual_seed(0)
    network = Network(read_structure(args.cfg)).to(memory_format=layout).train()
    for module in network.modules():
        if isinstance(module, torch.nn.SiLU):
            module.inplace = True
    images = torch.rand(args.batch, 3, args.img, args.img).to(memory_format=layout)
    targets = random_targets(args.batch, network.classes)
    loss = DetectionLoss(network.anchors, network.strides, network.classes, args.img)
    optimizer = build_optimizer(network, "SGD", 0.001, 0.9, 0.0)

    def run() -> float:
        start = time.perf_counter()
        for _ in range(args.steps):
            with precision.autocast():
                value, _ = loss(network(images), targets)
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
        return time.perf_counter() - start

    return run


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--cfg", default="models/yolov5n.yaml")
    p.add_argument("--img", type=int, default=320)
    p.add_argument("--batch", type=int, default=16)
    p.add_argument("--steps", type=int, default=3, help="steps per repeat")
    p.add_argument("--repeats", type=int, default=7)
    args = p.parse_args()
    cpu = torch.device("cpu")
    precision = training_precision(cpu)
    work = {
        "contiguous float32": stepper(args, torch.contiguous_format, Precision(cpu)),
        "channels last": stepper(args, torch.channels_last, precision),
    }
    for run in work.values():
        run()
    seconds = in_turns(work, args.repeats)
    ratio = median_ratio(seconds["contiguous float32"], seconds["channels last"])
    accelerated = precision.autocast_dtype is not None
    dtype = str(precision.autocast_dtype or torch.float32).removeprefix("torch.")
    bound = f"bound {BOUND}" if accelerated else f"no bound: this CPU has no bfloat16 instructions ({BOUND} where it has)"
    each = {name: round(statistics.median(values) / args.steps * 1e3) for name, values in seconds.items()}
    report(
        "train_step",
        f"channels last {dtype} is {ratio:.2f} times as fast as contiguous float32; {bound} (ms a step: {each}, "
        f"{args.img} px, batch {args.batch}, {torch.get_num_threads()} threads)",
        ratio=ratio, bound=BOUND, bound_applies=accelerated, dtype=dtype, repeats=args.repeats, ms_per_step=each,
    )  # fmt: skip


if __name__ == "__main__":
    main()
