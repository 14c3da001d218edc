"""YOLOv5 model yaml -> blocks, by YOLOv5's published building rules. Nothing in the yaml is evaluated: strings are a fixed vocabulary."""

from __future__ import annotations

from dataclasses import replace
from math import ceil
from pathlib import Path

import yaml

from models.blocks import Blocks, check, image_block, reductions
from models.modules import ATTENTION, MODULES, Graph
from utils.errors import InputError, did_you_mean

_WORDS = {"None": None, "True": True, "False": False}
_ACTIVATIONS = {"nn.SiLU": "silu", "nn.LeakyReLU": "leaky", "nn.Hardswish": "hardswish", "nn.ReLU": "relu", "nn.Mish": "mish"}
_KEYS = {
    "nc", "depth_multiple", "width_multiple", "channel_multiple", "anchors", "backbone", "head", "ch", "inplace", "activation", "yaml_file",
    "csp_activation",  # ours: the activation over BottleneckCSP's concat where it is not the model's, as in YOLOv5 v3.1
}  # fmt: skip


def read_yaml(path: Path, nc: int | None = None) -> Blocks:
    """Read a model yaml; `nc` overrides its number of classes. Raise `InputError` naming the file and the row."""
    try:
        spec = yaml.safe_load(path.read_text(encoding="utf-8", errors="replace"))
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not a readable yaml: {' '.join(str(error).split())}") from None
    if not isinstance(spec, dict) or not {"backbone", "head"} <= spec.keys():
        raise InputError(f"{path}: not a model yaml: it needs the keys nc, backbone and head, and a detector anchors")
    return from_spec(spec, str(path), nc)


def from_spec(spec: dict, source: str, nc: int | None = None) -> Blocks:
    """Build blocks from a parsed yaml `spec` (also found inside official checkpoints)."""
    for key in spec.keys() - _KEYS:
        raise InputError(f"{source}: unknown key {key!r}{did_you_mean(key, _KEYS)}")
    nc = nc if nc is not None else spec.get("nc")
    if not isinstance(nc, int) or nc < 1:
        raise InputError(f"{source}: nc must be a positive whole number, got {nc!r}")
    for key in ("backbone", "head"):
        if not isinstance(spec[key], list):
            raise InputError(f"{source}: {key} must be a list of [from, repeats, module, args] rows")
    rows = spec["backbone"] + spec["head"]
    anchors = _anchors(spec.get("anchors"), rows, source)
    depth, width = (_multiple(spec.get(key, 1.0), f"{source}: {key}") for key in ("depth_multiple", "width_multiple"))
    multiple = spec.get("channel_multiple") or 8
    if not isinstance(multiple, int) or multiple < 1:
        raise InputError(f"{source}: channel_multiple must be a positive whole number, got {multiple!r}")
    na = len(anchors[0]) // 2 if anchors else 0
    act = _activation(spec, "activation", "silu", source)
    graph = Graph(activation=act, csp_activation=_activation(spec, "csp_activation", act, source))
    image = image_block(3 if spec.get("ch") is None else spec["ch"], f"{source}: ch")
    outputs = [graph.add("input", (), channels=image.channels)]  # outputs[i + 1] is what layer i gives
    for i, row in enumerate(rows):
        where = f"{source}: layer {i}"
        sources, repeats, module, args = _row(row, i, where)
        args = [_word(arg, nc, anchors) for arg in args]
        if MODULES[module].scaled:
            args[:1] = [_scale_width(args[0] if args else None, width, na * (nc + 5), multiple, where)]
        n = max(round(repeats * depth), 1) if repeats > 1 else repeats
        outputs.append(_build(graph, module, f"model.{i}", tuple(outputs[s + 1] for s in sources), n, args, where))
    try:
        return check(ordered_anchors(graph.blocks))
    except InputError as error:
        raise InputError(f"{source}: {error}") from None


def _multiple(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
        raise InputError(f"{where} must be a positive number, got {value!r}")
    return float(value)


def _row(row: list, i: int, where: str) -> tuple[list[int], int, str, list]:
    if not isinstance(row, list) or len(row) != 4 or not isinstance(row[3], list):
        raise InputError(f"{where}: a row is [from, repeats, module, args], got {row!r}")
    sources, repeats, module, args = row
    module = str(module).removeprefix("nn.")
    if module in ATTENTION:
        raise InputError(
            f"{where}: {module} is attention, which convolutional blocks cannot hold; a model with C3 in its place can be built"
        )
    if module not in MODULES:
        raise InputError(f"{where}: module {module!r} is not one this project can build{did_you_mean(module, MODULES)}")
    listed = sources if isinstance(sources, list) else [sources]
    if not listed or any(not isinstance(v, int) for v in (*listed, repeats)):
        raise InputError(f"{where}: from and repeats must be whole numbers, got {row[0]!r} and {row[1]!r}")
    sources = [s if s >= 0 else i + s for s in listed]
    if any(not -1 <= s < i for s in sources):
        raise InputError(f"{where}: from={row[0]} points at no earlier layer")
    return sources, repeats, module, list(args)


def _build(graph: Graph, module: str, path: str, inputs: tuple[int, ...], n: int, args: list, where: str) -> int:
    spec = MODULES[module]
    source = inputs if spec.several else inputs[0]
    try:
        if spec.inner:
            return spec.build(graph, path, source, args[0], n, *args[1:])
        if n == 1:
            return spec.build(graph, path, source, *args)
        for k in range(n):
            source = spec.build(graph, f"{path}.{k}", source, *args)
        return source
    except TypeError as error:
        raise InputError(f"{where}: {module} does not take the arguments {args}: {error}") from None
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _word(arg: object, nc: int, anchors: list[list[float]]) -> object:
    if arg == "nc":
        return nc
    if arg == "anchors":
        return anchors
    return _WORDS.get(arg, arg) if isinstance(arg, str) else arg


def _scale_width(channels: object, width: float, head: int, multiple: int, where: str) -> int:
    """Scale a width and round it up to `multiple`, except for what counts as an output layer (its width is that of a head)."""
    if not isinstance(channels, int):
        raise InputError(f"{where}: the first argument must be the output channels, got {channels!r}")
    return channels if channels == head else ceil(channels * width / multiple) * multiple


def _anchors(anchors: object, rows: list, source: str) -> list[list[float]]:
    """Per-level lists of pixels; an integer k stands for k placeholder anchors per level, which autoanchor replaces. A classifier has none."""
    if anchors is None and not any(isinstance(row, list) and "Detect" in row[2:3] for row in rows):
        return []
    if isinstance(anchors, int) and anchors > 0:
        last = rows[-1][0] if isinstance(rows[-1], list) and isinstance(rows[-1][0], list) else [0]
        return [[float(v) for v in range(2 * anchors)] for _ in last]
    if isinstance(anchors, list) and anchors and all(isinstance(level, list) and level and len(level) % 2 == 0 for level in anchors):
        return [[float(v) for v in level] for level in anchors]
    raise InputError(f"{source}: anchors must be a list of [w,h, w,h, ...] per level or a whole number, got {anchors!r}")


def _activation(spec: dict, key: str, default: str, source: str) -> str:
    """The activation that a constructor call such as `nn.LeakyReLU(0.1)` names. `inplace` changes no value."""
    text = spec.get(key)
    if text is None:
        return default
    name, _, rest = str(text).replace(" ", "").partition("(")
    arguments = [a for a in rest.removesuffix(")").split(",") if a and not a.startswith("inplace=")]
    wanted = (["0.1"], ["negative_slope=0.1"]) if name == "nn.LeakyReLU" else ([],)
    if name not in _ACTIVATIONS or arguments not in wanted:
        raise InputError(f"{source}: {key} {text!r} is not known; known: {', '.join(_ACTIVATIONS)} (LeakyReLU with 0.1)")
    return _ACTIVATIONS[name]


def ordered_anchors(blocks: list) -> list:
    """Flip the anchors over the levels where their area falls while the stride rises, as YOLOv5 does."""
    scales = reductions(tuple(blocks))
    heads = sorted((i for i, b in enumerate(blocks) if b.kind == "yolo"), key=lambda i: blocks[i].level)
    if len(heads) < 2:
        return blocks
    area = [sum(w * h for w, h in blocks[i].anchors) for i in heads]
    if (area[-1] - area[0]) * (scales[heads[-1]] - scales[heads[0]]) < 0:
        flipped = [blocks[i].anchors for i in heads][::-1]
        for i, anchors in zip(heads, flipped):
            blocks[i] = replace(blocks[i], anchors=anchors)
    return blocks
