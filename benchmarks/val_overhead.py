"""What evaluation costs beside the network: time of an evaluation / time of the bare network on the same inputs.

    python benchmarks/val_overhead.py                      # 128 digits images, 640 px, batch 16; two cores: about four minutes
    COCO128_DIR=... python benchmarks/val_overhead.py      # the first 128 images of COCO val2017 instead

YOLOv5n, batch norms folded, float32. Both are measured in one process, in turns. The evaluation starts its loader's processes, reads,
resizes and pads the images, runs the network, suppresses, matches and computes the figures; pictures are not drawn. With
YOLOV5N_PT the network is the official one, otherwise a fresh one, whose many poor boxes cost more than a trained network's few.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

from common import first_images, report
from reference import dataset_yaml

import torch  # isort: skip

from engine.evaluate import EvaluateOptions, evaluate
from models.checkpoint import load_model, read_structure
from models.network import Network, fuse, init_detect_biases
from utils.data_config import read_data
from utils.dataset import DatasetOptions, DetectionDataset, make_loader
from utils.device import Precision, evaluation_workers
from utils.labels import scan_labels


def the_network(weights: str, classes: int) -> Network:
    """YOLOv5n for `classes`, folded: the official one if its classes are as many, otherwise a fresh one."""
    if weights and classes == 80:
        network = load_model(weights).network()
    else:
        network = Network(read_structure("models/yolov5n.yaml", classes))
        init_detect_biases(network)
    return fuse(network.eval()).to(memory_format=torch.channels_last)


def clocks() -> tuple[float, float]:
    """Wall time, and processor time of this process (all its threads; not of the loader's processes), in seconds."""
    return time.perf_counter(), time.process_time()


def since(start: tuple[float, float]) -> tuple[float, float]:
    return tuple(now - then for now, then in zip(clocks(), start))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--img", type=int, default=640)
    p.add_argument("--batch", type=int, default=16)
    p.add_argument("--images", type=int, default=128)
    p.add_argument("--workers", type=int, default=8)
    p.add_argument("--rounds", type=int, default=7)
    args = p.parse_args()
    coco = os.environ.get("COCO128_DIR")
    with tempfile.TemporaryDirectory() as folder:
        config = read_data(dataset_yaml(Path(coco), Path(folder)) if coco else "data/digits.yaml", ("val",))
        labels = first_images(scan_labels(config.val, config.nc), args.images)
        network = the_network(os.environ.get("YOLOV5N_PT", ""), config.nc)
        dataset = DetectionDataset(labels, DatasetOptions(args.img, rect=True, pad=0.5, stride=network.max_stride, batch_size=args.batch))
        measure(network, dataset, args)


@torch.no_grad()
def measure(network: Network, dataset: DetectionDataset, args: argparse.Namespace) -> None:
    """Print each round and the medians."""
    precision, options = Precision(torch.device("cpu")), EvaluateOptions(progress=False)
    inputs = [precision.images(batch.images) for batch in make_loader(dataset).epoch(0)]
    network(inputs[0])
    wall, cpu = [], []
    for number in range(args.rounds):
        start = clocks()
        for images in inputs:
            network(images)
        bare = since(start)
        start = clocks()
        evaluation = evaluate(network, make_loader(dataset, evaluation_workers(args.workers, precision.device)), precision, options)
        whole = since(start)
        wall.append(whole[0] / bare[0])
        cpu.append(whole[1] / bare[1])
        speed = ", ".join(f"{v:.1f} ms {k}" for k, v in evaluation.speed_ms.items())
        print(
            f"round {number + 1}: evaluation {whole[0]:.2f} s, network {bare[0]:.2f} s, ratio {wall[-1]:.3f} (per image {speed})",
            flush=True,
        )
    ratio = statistics.median(wall)
    text = f"evaluation / network {ratio:.3f} (bound 1.3; {evaluation.images} images, {args.img} px, batch {args.batch}, {torch.get_num_threads()} threads)"
    report("val_overhead", text, ratio=ratio, cpu_ratio=statistics.median(cpu), rounds=wall, images=evaluation.images)


if __name__ == "__main__":
    main()
