"""Networks and data that tests share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from engine import prune_bench
from models.blocks import Block, Blocks, check, make
from models.network import Network
from models.yaml_reader import from_spec, read_yaml
from pruning.criteria import gamma_scores
from pruning.policy import PrunePolicy, select_masks
from pruning.spaces import find_spaces
from pruning.surgery import fold_constants, prune
from utils import plots

ROOT = Path(__file__).resolve().parent.parent
STOCK = ("n", "s", "m", "l", "x")

SMALL_YAML = {
    "nc": 3, "depth_multiple": 0.33, "width_multiple": 0.25, "anchors": [[10, 13, 16, 30, 33, 23], [30, 61, 62, 45, 59, 119]],
    "backbone": [
        [-1, 1, "Conv", [32, 6, 2, 2]], [-1, 1, "Conv", [64, 3, 2]], [-1, 3, "C3", [64]], [-1, 1, "Conv", [64, 3, 2]], [-1, 6, "C3", [64]],
        [-1, 1, "Conv", [128, 3, 2]], [-1, 1, "SPPF", [128, 5]],
    ],
    "head": [
        [-1, 1, "Conv", [64, 1, 1]], [-1, 1, "nn.Upsample", ["None", 2, "nearest"]], [[-1, 4], 1, "Concat", [1]], [-1, 3, "C3", [64, False]],
        [-1, 1, "Conv", [64, 3, 2]], [[-1, 7], 1, "Concat", [1]], [-1, 3, "C3", [128, False]], [[10, 13], 1, "Detect", ["nc", "anchors"]],
    ],
}  # fmt: skip

SMALL_CLASSIFIER = {
    "nc": 3, "depth_multiple": 0.33, "width_multiple": 0.25,
    "backbone": SMALL_YAML["backbone"][:6],
    "head": [[-1, 1, "nn.AdaptiveAvgPool2d", [1]], [-1, 1, "Classify", ["nc"]]],
}  # fmt: skip


def stock(size: str, nc: int | None = None) -> Blocks:
    """The blocks of models/yolov5{size}.yaml."""
    return read_yaml(ROOT / "models" / f"yolov5{size}.yaml", nc)


def small(nc: int = 3) -> Blocks:
    """A two-level detector of a few thousand parameters, with C3, SPPF, upsampling and concats."""
    return from_spec(SMALL_YAML, "small", nc)


def with_module(module: str, args: list, nc: int = 2) -> Blocks:
    """A one-level detector around one composite module, fed and read by convolutions."""
    spec = {
        "nc": nc, "anchors": [[10, 13, 16, 30, 33, 23]],
        "backbone": [[-1, 1, "Conv", [16, 3, 2]], [-1, 1, "Conv", [24, 3, 2]], [-1, 3, module, args], [-1, 1, "Conv", [24, 3, 2]]],
        "head": [[[3], 1, "Detect", ["nc", "anchors"]]],
    }  # fmt: skip
    return from_spec(spec, module, nc)


def alive(blocks: Blocks, seed: int = 0, size: int = 64, calm: bool = False) -> Network:
    """A network with random gamma and beta and running statistics estimated on data: removing channels moves its logits.

    (A freshly initialised network proves nothing: its logits hardly depend on its inner channels.) `calm`: gammas that are small beside the betas.
    A deep network is otherwise chaotic, as no trained one is: two exact programs differ in it by what float32 rounds, grown by every layer.
    """
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    network = Network(blocks)
    spread, least, shift = (0.4, 0.1, 1.0) if calm else (1.5, 0.2, 0.5)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.weight.data = torch.rand(module.weight.shape, generator=generator) * spread + least
            module.bias.data = torch.randn(module.bias.shape, generator=generator) * shift
            module.momentum = None  # a cumulative mean
    network.train()
    with torch.no_grad():
        for _ in range(3):
            network(torch.rand(4, network.channels, size, size, generator=generator))
    return network.eval()


def slim(network: Network, percent: float = 0.5) -> Network:
    """`network` pruned as slim_prune_8x.py prunes: by gamma, multiples of 8, constants folded."""
    blocks, state = network.blocks, network.state_dict()
    spaces = find_spaces(blocks)
    mask = select_masks(spaces, gamma_scores(blocks, state), PrunePolicy(percent, "union", 0.01, 8)).mask
    blocks, state = prune(blocks, fold_constants(blocks, state, spaces, mask), spaces, mask)
    pruned = Network(blocks)
    pruned.load_state_dict(state)
    return pruned.eval()


def random_blocks(seed: int) -> Blocks:
    """A random detector out of primitive blocks: convolutions (some depthwise), adds, concats, slices, pools, upsamples."""
    rng = np.random.default_rng(seed)
    blocks: list[Block] = [Block("input", channels=3)]

    def conv(x: int, c: int, k: int = 1, s: int = 1, groups: int = 1) -> int:
        act = str(rng.choice(["silu", "leaky", "relu", "hardswish"]))
        blocks.append(Block("convolutional", f"model.{len(blocks)}", (x,), c, k, s, k // 2, groups, act, True))
        return len(blocks) - 1

    def add(kind: str, *inputs: int, **fields) -> int:
        blocks.append(make(Block(kind, "", inputs, **fields), blocks))
        return len(blocks) - 1

    x = conv(conv(0, 12, 3, 2), 16, 3, 2)
    for _ in range(8):
        width, choice = blocks[x].channels, rng.integers(7)
        if choice == 0:
            x = conv(x, int(rng.integers(6, 20)), int(rng.choice([1, 3])))
        elif choice == 1:
            x = add("shortcut", conv(conv(x, width // 2), width, 3), x)
        elif choice == 2:
            x = add("route", x, conv(x, int(rng.integers(4, 10))))
        elif choice == 3 and width >= 8:
            cut = int(rng.integers(2, width - 2))
            left, right = add("route", x, slice=(0, cut)), add("route", x, slice=(cut, width))
            x = add("route", left, add("shortcut", conv(right, width - cut, 3), right))
        elif choice == 4:
            x = add("route", x, add("maxpool", x, size=5, padding=2))
        elif choice == 5:
            x = add("upsample", conv(x, width, 3, 2), stride=2)
        else:
            x = conv(x, width, 3, groups=width)
    x = conv(x, 16)
    blocks.append(Block("convolutional", "model.90.m.0", (x,), 3 * 7, bias=True))
    add("yolo", len(blocks) - 1, anchors=((8.0, 9.0), (16.0, 12.0), (30.0, 40.0)), classes=2)
    blocks[-1] = Block("yolo", "model.90", blocks[-1].inputs, blocks[-1].channels, anchors=blocks[-1].anchors, classes=2)
    return check(blocks)


def write_dataset(root: Path, images: int = 8, size: int = 64, nc: int = 3, seed: int = 0) -> Path:
    """A dataset of coloured squares on noise, in YOLOv5's layout; returns its yaml."""
    rng = np.random.default_rng(seed)
    for split in ("train", "val"):
        (root / "images" / split).mkdir(parents=True, exist_ok=True)
        (root / "labels" / split).mkdir(parents=True, exist_ok=True)
        for i in range(images):
            image = rng.integers(0, 60, (size, size, 3), dtype=np.uint8)
            rows = []
            for _ in range(int(rng.integers(1, 4))):
                side, c = int(rng.integers(size // 6, size // 2)), int(rng.integers(nc))
                x, y = rng.integers(0, size - side, 2)
                image[y : y + side, x : x + side] = [(255, 0, 0), (0, 255, 0), (0, 0, 255)][c % 3]
                rows.append(f"{c} {(x + side / 2) / size:.6f} {(y + side / 2) / size:.6f} {side / size:.6f} {side / size:.6f}")
            cv2.imwrite(str(root / "images" / split / f"{i:03d}.png"), image)
            (root / "labels" / split / f"{i:03d}.txt").write_text("\n".join(rows) + "\n")
    path = root / "data.yaml"
    names = "\n".join(f"  {i}: shape{i}" for i in range(nc))
    path.write_text(f"path: {root}\ntrain: images/train\nval: images/val\nnc: {nc}\nnames:\n{names}\n")
    return path


def write_folder(root: Path, images: int = 6, size: int = 64, nc: int = 3) -> Path:
    """An image folder of noise in as many colours as there are classes."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for c in range(nc):
            (root / split / f"kind{c}").mkdir(parents=True)
            for i in range(images):
                image = rng.integers(0, 80, (size, size + 8, 3), dtype=np.uint8)
                image[..., c % 3] += 150
                cv2.imwrite(str(root / split / f"kind{c}" / f"{i}.png"), image)
    return root


def without_pictures_and_timings(monkeypatch: pytest.MonkeyPatch, keep: Sequence[str] = ()) -> None:
    """Take out of the scripts what takes most of their time on small models and is tested elsewhere: plots, but those of `keep`, and latencies."""
    for name in (name for name in dir(plots) if name.startswith("plot_") and name not in keep):
        monkeypatch.setattr(plots, name, lambda *args, **kwargs: None)
    monkeypatch.setattr(prune_bench, "latency_ms", lambda networks, *args: dict.fromkeys(networks, 1.0))
