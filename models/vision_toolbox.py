"""Command: turn the weights of a `DarknetYOLOv5` backbone of vision_toolbox, trained on ImageNet with ReLU, into a classifier of this project.

python -m models.vision_toolbox darknet_yolov5s.pth --out backbone.pt                  # then: backbone_prune.py --weights backbone.pt ...
python -m models.vision_toolbox darknet_yolov5s.pth --out backbone.pt --classes 10     # then: train.py --weights backbone.pt --data FOLDER

The same layers have other names there, and a stage joins its branches in the other order: conv1 (YOLOv5's cv2) before the bottlenecks. So the two
halves of the input channels of out_conv (cv3) change places. ReLU and the batch norms' epsilon 1e-5 and momentum 0.1 are not in a
state dict; they are written into the structure. The norm is called `bn` or, in newer versions, `norm`. Only tensors are read.
"""

from __future__ import annotations

import argparse
import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from models.blocks import Blocks, check
from models.checkpoint import Model, check_fit, save_model
from models.modules import Graph, c3, classify, conv, global_pool
from models.network import Network, summary
from utils.errors import InputError, run_script
from utils.files import existing, make_folder
from utils.log import LOGGER

BN_EPS, BN_MOMENTUM = 1e-5, 0.1
_NORM = {"bn": "bn", "norm": "bn", "conv": "conv"}
_STAGE = {"conv": "", "conv1": "cv2", "conv2": "cv1", "out_conv": "cv3"}  # `conv` is the layer in front of the C3
_PREFIXES = ("", "module.", "backbone.", "module.backbone.")
State = dict[str, Tensor]


def new_name(key: str) -> str | None:
    """YOLOv5's name of a tensor of the backbone; None for a name that is none of its.

    `stem.conv.weight` -> `model.0.conv.weight`, `stages.1.blocks.0.conv2.norm.bias` -> `model.4.m.0.cv2.bn.bias`.
    """
    match = re.fullmatch(r"(stem|stages\.(\d+)\.(?:(conv|conv1|conv2|out_conv)|blocks\.(\d+)\.conv([12])))\.(conv|bn|norm)\.(\w+)", key)
    if match is None:
        return None
    _, stage, part, block, which, kind, tensor = match.groups()
    if stage is None:
        path = "model.0"
    elif part == "conv":
        path = f"model.{2 * int(stage) + 1}"
    else:
        path = f"model.{2 * int(stage) + 2}." + (_STAGE[part] if part else f"m.{block}.cv{which}")
    return f"{path}.{_NORM[kind]}.{tensor}"


def import_backbone(tensors: Mapping[str, Tensor], classes: int = 1000, source: str = "weights") -> Model:
    """The classifier of a vision_toolbox state dict: its backbone, and a linear layer to `classes`, which is random.

    Names may begin with `backbone.`; then what else the file holds is left out. Raises `InputError` naming what does not fit.
    """
    renamed = _renamed(tensors, source)
    blocks = _structure(renamed, classes, source)
    last = int(blocks[-1].name.split(".")[1])
    torch.manual_seed(0)
    head = {k: v for k, v in Network(blocks).state_dict().items() if k.startswith(f"model.{last}.")}
    counters = {f"{b.bn_path}.num_batches_tracked": torch.tensor(0) for b in blocks if b.has_gamma}
    state = counters | {k: v.float() if v.is_floating_point() else v for k, v in renamed.items()} | head
    check_fit(blocks, state, f"{source}: is no DarknetYOLOv5 backbone")
    return Model(blocks, _swapped(state), tuple(f"class{i}" for i in range(classes)), 224)


def _renamed(tensors: Mapping[str, Tensor], source: str) -> State:
    prefix = next((p for p in reversed(_PREFIXES) if any(k.startswith(f"{p}stem.") for k in tensors)), None)
    if prefix is None:
        raise InputError(f"{source}: holds no tensor stem.conv.weight, so it is no backbone of vision_toolbox; give its state dict")
    inside = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    found = {key: new_name(key) for key in inside}
    unknown = [key for key, name in found.items() if name is None]
    if unknown:
        raise InputError(f"{source}: {unknown[0]} (and {len(unknown) - 1} more) is no name of a DarknetYOLOv5 backbone")
    if len(inside) < len(tensors):
        LOGGER.info(f"{source}: {len(tensors) - len(inside)} tensors beside the backbone are left out")
    return {name: inside[key] for key, name in found.items() if name}


def _structure(state: State, classes: int, source: str) -> Blocks:
    """The blocks that the shapes of the (renamed) tensors describe."""
    widths = {k.removesuffix(".conv.weight"): tuple(v.shape) for k, v in state.items() if k.endswith(".conv.weight")}
    layers = max(int(path.split(".")[1]) for path in widths) + 1
    g = Graph(activation="relu")
    try:
        x = g.add("input", (), channels=widths["model.0"][1])
        for i in range(layers):
            path, inner = f"model.{i}", f"model.{i}.cv3"
            if inner in widths:
                n = len({p.split(".")[3] for p in widths if p.startswith(f"{path}.m.")})
                x = c3(g, path, x, widths[inner][0], n, e=widths[f"{path}.cv1"][0] / widths[inner][0])
            else:
                channels, _, size, _ = widths[path]
                x = conv(g, path, x, channels, size, 2, (size - 1) // 2)
        classify(g, f"model.{layers + 1}", global_pool(g, f"model.{layers}", x), classes)
        blocks = [replace(b, bn_eps=BN_EPS, bn_momentum=BN_MOMENTUM) if b.has_gamma else b for b in g.blocks]
        return check(blocks)
    except (KeyError, ValueError) as error:
        raise InputError(f"{source}: is no DarknetYOLOv5 backbone: its tensors of {error} are missing or have another form") from None


def _swapped(state: State) -> State:
    """With the input halves of every cv3 in YOLOv5's order: bottlenecks, then cv2."""
    changed = dict(state)
    for key, weight in state.items():
        if key.endswith(".cv3.conv.weight"):
            first = len(state[key.replace(".cv3.", ".cv2.")])
            changed[key] = torch.cat((weight[:, first:], weight[:, :first]), 1)
    return changed


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a `.pth` file, itself or under `state_dict` or `model`. Nothing but tensors and plain values is unpickled."""
    path = existing(path, "weights")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise InputError(f"{path}: no file of tensors alone ({reason}); save the module's state_dict()") from None
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise InputError(f"{path}: holds no state dict; save the module's state_dict()")
    return dict(content)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", help="a .pth file with the state dict of a DarknetYOLOv5 backbone")
    parser.add_argument("--out", required=True, type=Path, help="the .pt to write")
    parser.add_argument("--classes", type=int, default=1000, help="outputs of the (random) linear layer")
    args = parser.parse_args(argv)
    if args.out.suffix != ".pt" or args.classes < 1:
        raise InputError(f"--out {args.out} must end in .pt, and --classes {args.classes} be at least 1")
    model = import_backbone(read_tensors(args.source), args.classes, args.source)
    LOGGER.info(summary(model.blocks, 224, 224))
    make_folder(args.out.parent)
    save_model(args.out, model)
    LOGGER.info(
        f"wrote {args.out}: the backbone is imported (ReLU, batch norm epsilon {BN_EPS:g}), its linear layer is random; train it, or map"
    )
    LOGGER.info(f"it into a detector: python backbone_prune.py --weights {args.out} --cfg models/yolov5s.yaml --data DATA.yaml")


if __name__ == "__main__":
    run_script(main)
