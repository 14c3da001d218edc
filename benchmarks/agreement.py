"""The table of docs/export.md: how far OpenCV, ONNX Runtime, OpenVINO and TorchScript are from torch, for full and for pruned networks.

    python benchmarks/agreement.py                               # about three minutes on two cores
    COCO128_DIR=... YOLOV5N_PT=... python benchmarks/agreement.py    # on photographs, and with the official YOLOv5n too

Each network is exported at 640 px, run on 4 pictures by each program, and compared row by row with the unfolded network in torch: the largest
difference of a box's centre and size in pixels, and of objectness and objectness x probability. Pruned: half of the channels, as slim_prune_8x.py
takes them. Networks without a checkpoint have random gammas of 0.1 to 0.5 and betas, and statistics of these pictures. `rounding`: how far torch is from
itself when batch norms are folded into the convolutions; a network whose float32 rounding is larger than a limit proves nothing.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from common import ROOT, jpeg_yaml, report

import cv2  # isort: skip
import numpy as np
import torch
from torch import Tensor

from engine.export_check import LIMITS, Gap, Reference, gap, reported, run_onnx, run_opencv, run_openvino, run_torchscript
from models.blocks import parameters
from models.checkpoint import Model, load_model
from models.darknet import pair_files
from models.metadata import Metadata
from models.network import Network
from models.onnx_writer import onnx_model
from models.openvino_ir import openvino_files
from models.torchscript import torchscript_bytes
from models.yaml_reader import read_yaml
from tests.helpers import alive, slim
from utils.augment import letterbox
from utils.planes import stack, to_planes

YAMLS = ("yolov5n", "yolov5s", "hub/yolov5n6", "hub/yolov5s6")
PROGRAMS = {"OpenCV": "darknet", "ONNX Runtime": "onnx", "OpenVINO": "openvino", "TorchScript": "torchscript"}


def pictures(count: int, side: int) -> Tensor:
    """(count, 3, side, side) in 0..1, letterboxed."""
    with tempfile.TemporaryDirectory() as folder:
        files = sorted((jpeg_yaml(Path(folder)).parent / "images/train").iterdir())[:count]
        images = [letterbox(cv2.imread(str(file)), (side, side))[0] for file in files]
    return stack([to_planes(image, 3) for image in images]).float() / 255


def networks(images: Tensor) -> Iterator[tuple[str, Network]]:
    """What is compared, by name: stock models with random tensors, and the official checkpoint if it is there; each full, then pruned."""
    for yaml in YAMLS:
        network = settled(alive(read_yaml(ROOT / f"models/{yaml}.yaml"), size=256, calm=True), images)
        yield yaml.rpartition("/")[2], network
        yield f"{yaml.rpartition('/')[2]}, pruned", slim(network)
    if "YOLOV5N_PT" in os.environ:
        network = load_model(os.environ["YOLOV5N_PT"]).network()
        yield "official yolov5n", network
        yield "official yolov5n, pruned", slim(network)


@torch.no_grad()
def settled(network: Network, images: Tensor) -> Network:
    """`network` with the statistics of `images` in its batch norms."""
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.reset_running_stats()
    network.train()(images)
    return network.eval()


def gaps(network: Network, images: Tensor) -> dict[str, Gap]:
    """Each program's gap to torch, and torch's to itself (`rounding`)."""
    reference = Reference.of(network, images)
    names, (batch, _, height, width) = tuple(f"class{i}" for i in range(network.classes)), images.shape
    metadata = Metadata(names, network.max_stride, (height, width), batch=batch)
    pair = pair_files(Model(network.blocks, network.state_dict(), names), height, width, "agreement")
    onnx = onnx_model(network, metadata)
    ir = openvino_files(onnx, "m", {})
    each = np.split(reference.images, batch)
    rows = {
        "OpenCV": np.concatenate([run_opencv(pair[".cfg"], pair[".weights"], image, network.blocks) for image in each]),
        "ONNX Runtime": reported(run_onnx(onnx, reference.images)["output"]),
        "OpenVINO": reported(run_openvino(ir["m.xml"], ir["m.bin"], reference.images)["output"]),
        "TorchScript": reported(run_torchscript(torchscript_bytes(network, images, {}), reference.images)),
    }
    return {"rounding": reference.noise} | {program: gap(found, reference.rows) for program, found in rows.items()}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--images", type=int, default=4)
    p.add_argument("--img", type=int, default=640)
    args = p.parse_args()
    images = pictures(args.images, args.img)
    columns = ("rounding", *PROGRAMS)
    print(f"| network | parameters | {' | '.join(columns)} |\n|---|--:|{'--:|' * len(columns)}")
    worst: dict[str, Gap] = {}
    for name, network in networks(images):
        found = gaps(network, images)
        cells = [f"{found[c].boxes:.1g} px, {found[c].scores:.0e}" for c in columns]
        print(f"| {name} | {sum(parameters(network.blocks)):,} | {' | '.join(cells)} |", flush=True)
        for c in PROGRAMS:
            old = worst.get(c, Gap(0, 0))
            worst[c] = Gap(max(old.boxes, found[c].boxes), max(old.scores, found[c].scores))
    kept = {c: worst[c].boxes <= LIMITS[kind][0] and worst[c].scores <= LIMITS[kind][1] for c, kind in PROGRAMS.items()}
    told = "; ".join(
        f"{c} {worst[c]} ({'within' if kept[c] else 'BEYOND'} {LIMITS[k][0]} px and {LIMITS[k][1]})" for c, k in PROGRAMS.items()
    )
    report("agreement", told, worst={c: vars(g) for c, g in worst.items()}, kept=kept, images=args.images, img=args.img)


if __name__ == "__main__":
    main()
