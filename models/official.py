"""Official YOLOv5 `.pt` files (v5.0 to v7.0): the facts of the pickled model, as tensors and plain values.

Owns: what the attributes of YOLOv5's pickled modules mean. Not: reading the file safely (`models/inert.py`), building a
network from it (`models/checkpoint.py`), nor our own checkpoints.
"""

from __future__ import annotations

import math
import pickletools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.inert import MAX_NAME, Archive, NumpyArray, Refused, Stub, TensorRef, check_opcodes, open_archive, require, unpickle
from utils.errors import InputError

MAX_MODULES = 10_000
MAX_TABLE = 256  # modules, parameters or buffers of one module
MAX_DEPTH = 32
MAX_PLAIN_VALUES = 100_000
MAX_NUMBER = 1 << 20  # of a yaml: channels, repeats, anchors in pixels

DETECTION_MODELS = frozenset({"models.yolo.Model", "models.yolo.DetectionModel"})


@dataclass(frozen=True)
class OfficialCheckpoint:
    """What an official checkpoint says, as tensors and plain values.

    `state` has the keys of the pickled model's `state_dict` (`model.0.conv.weight`) without `anchor_grid`, floating
    tensors as float32, integers as they are. Module paths, the keys of `bn_eps`, `bn_momentum` and `activations`, are
    spelled likewise (`model.0.bn`, `model.0`). `anchors`, (levels, anchors per level, 2), are (w, h) in grid cells.
    """

    yaml: dict[str, Any]
    names: tuple[str, ...]
    nc: int
    stride: tuple[float, ...] | None  # pixels per cell and level; some old files do not say
    anchors: torch.Tensor
    state: dict[str, torch.Tensor]
    bn_eps: dict[str, float]  # attributes of the pickled BatchNorm2d, which no state_dict holds
    bn_momentum: dict[str, float]
    activations: dict[str, str]  # module with an `act` -> "SiLU", "LeakyReLU(0.1)", "Hardswish", "Identity"
    epoch: int  # -1 once training has finished and the file was stripped
    best_fitness: float | None
    fused: bool  # batch norms are folded into biased convolutions


def read_official(path: Path) -> OfficialCheckpoint:
    """Read the official YOLOv5 checkpoint at `path`, its `ema` if it has one, else its `model`.

    Raises `InputError` if the file is no such checkpoint, is damaged, or asks for anything outside the allow-list.
    """
    try:
        with open_archive(path) as archive:
            return _checkpoint(unpickle(archive), archive)
    except Refused as reason:
        raise InputError(f"{path}: {reason}") from reason


def is_plain_zip(path: Path) -> bool:
    """Tell whether `path` is a zip written by `torch.save`, official or ours, that costs no more to read than it is long."""
    try:
        with open_archive(path) as archive:
            check_opcodes(archive.read_pickle())
        return True
    except (Refused, ValueError, LookupError):
        return False


def looks_official(path: Path) -> bool:
    """Tell whether the pickle at `path` names a class of `models.yolo`, by reading its opcodes without running them.

    Our own checkpoints, dicts of tensors and plain values, name none. Never raises: False for whatever is unreadable.
    """
    try:
        with open_archive(path) as archive:
            pickled = archive.read_pickle()
        return b"models.yolo" in pickled and "models.yolo" in _named_modules(pickled)
    except (Refused, ValueError):
        return False


def _named_modules(pickled: bytes) -> Iterator[str]:
    """Yield the module of every GLOBAL and, where it is spelled out just before, of every STACK_GLOBAL."""
    texts = ("", "")
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name == "GLOBAL":
            yield argument.split(" ")[0]
        elif opcode.name == "STACK_GLOBAL":
            yield texts[0]
        elif isinstance(argument, str):
            texts = (texts[1], argument)


def _checkpoint(top: object, archive: Archive) -> OfficialCheckpoint:
    model = _pick_model(top)
    modules = _modules(model)
    head_path, head = _detect_head(modules)
    state = _state(modules, archive)
    nc = _class_count(head, head_path, state)
    anchors = state[f"{head_path}.anchors"]
    epoch = top.get("epoch")
    return OfficialCheckpoint(
        yaml=_architecture(model, len(modules)),
        names=_names(model.state.get("names"), nc),
        nc=nc,
        stride=_stride(model, head, len(anchors), archive),
        anchors=anchors,
        state=state,
        bn_eps=_batch_norm_attribute(modules, "eps"),
        bn_momentum=_batch_norm_attribute(modules, "momentum"),
        activations=_activations(modules),
        epoch=epoch if type(epoch) is int and _is_number(epoch) else -1,
        best_fitness=_number(top.get("best_fitness")),
        fused=any(_is_fused(module) for module in modules.values()),
    )


def _pick_model(top: object) -> Stub:
    """Return `ema` if the checkpoint has one, else `model`."""
    require(isinstance(top, dict), "it holds no dict; an official checkpoint is a dict with the key 'model'")
    require("format" not in top, "it is a checkpoint of this project, not an official one")
    tensors_only = bool(top) and all(type(value) is TensorRef for value in top.values())
    require(not tensors_only, "it is a plain state_dict; an official checkpoint holds the whole pickled model")
    key = "model" if top.get("ema") is None else "ema"
    model = top.get(key)
    require(isinstance(model, Stub), f"its '{key}' is missing or no pickled module, as in official checkpoints")
    require(model.path in DETECTION_MODELS, f"its '{key}' is a {model.path}; a detection model of YOLOv5 is needed")
    return model


def _modules(model: Stub) -> dict[str, Stub]:
    """Return all modules by path, each before its children, the model itself under ''."""
    modules = dict(islice(_walk(model, "", 0), MAX_MODULES + 1))
    require(len(modules) <= MAX_MODULES, f"its model has more than {MAX_MODULES} modules")
    attention = next((path for path, module in modules.items() if module.path.endswith((".C3TR", ".MultiheadAttention"))), None)
    transformer = (
        f"its {attention} is a transformer block (C3TR), whose attention this project cannot build or prune; train with C3 instead"
    )
    require(attention is None, transformer)
    return modules


def _walk(module: Stub, path: str, depth: int) -> Iterator[tuple[str, Stub]]:
    require(depth <= MAX_DEPTH, f"its model nests modules more than {MAX_DEPTH} deep")
    yield path, module
    for name, child in _table(module, "_modules", Stub).items():
        yield from _walk(child, f"{path}.{name}" if path else name, depth + 1)


def _table(module: Stub, key: str, kind: type) -> dict[str, Any]:
    """Return a module's `_modules`, `_parameters` or `_buffers` without the entries that are None."""
    table = module.state.get(key, {})
    require(isinstance(table, dict) and len(table) <= MAX_TABLE, f"its {module.path} has a malformed {key}")
    table = {name: value for name, value in table.items() if value is not None}
    named = all(type(name) is str and 0 < len(name) <= MAX_NAME for name in table)
    well_formed = named and all(isinstance(value, kind) for value in table.values())
    require(well_formed, f"its {module.path} has a malformed {key}")
    return table


def _tensors(module: Stub) -> dict[str, TensorRef]:
    """Return a module's own parameters and buffers, as its state_dict would list them, without `anchor_grid`."""
    hidden = module.state.get("_non_persistent_buffers_set")
    dropped = {"anchor_grid"} | (hidden if isinstance(hidden, set) else set())
    both = _table(module, "_parameters", TensorRef) | _table(module, "_buffers", TensorRef)
    return {name: ref for name, ref in both.items() if name not in dropped}


def _state(modules: dict[str, Stub], archive: Archive) -> dict[str, torch.Tensor]:
    refs = {f"{path}.{name}": ref for path, module in modules.items() for name, ref in _tensors(module).items()}
    # Many names may share one storage; without this bound a small file could fill the memory.
    claimed = sum(ref.nbytes for ref in refs.values())
    require(claimed <= 2 * archive.size, f"its tensors claim {claimed} bytes, but the file has {archive.size}")
    tensors = {name: archive.tensor(ref) for name, ref in refs.items()}
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def _detect_head(modules: dict[str, Stub]) -> tuple[str, Stub]:
    heads = [(path, module) for path, module in modules.items() if module.path == "models.yolo.Detect"]
    require(len(heads) == 1, f"its model has {len(heads)} Detect layers instead of one")
    return heads[0]


def _stride(model: Stub, head: Stub, levels: int, archive: Archive) -> tuple[float, ...] | None:
    """Return the stride of each level in pixels, None where the file does not say."""
    for module in (model, head):
        ref = module.state.get("stride")
        if type(ref) is TensorRef and ref.size == (levels,):
            stride = tuple(archive.tensor(ref).double().tolist())
            require(all(0 < value < math.inf for value in stride), "its strides are not positive numbers")
            return stride
    return None


def _class_count(head: Stub, head_path: str, state: dict[str, torch.Tensor]) -> int:
    """Return the number of classes, once anchors and output layers are known to agree with it."""
    nc, anchors = head.state.get("nc"), state.get(f"{head_path}.anchors")
    require(type(nc) is int and nc >= 1, "its Detect layer has no number of classes 'nc'")
    shaped = anchors is not None and anchors.ndim == 3 and anchors.shape[2] == 2
    require(shaped, "its Detect layer should have a buffer 'anchors' of shape (levels, anchors per level, 2)")
    require(bool(anchors.isfinite().all()), "its anchors are not finite numbers")
    for level in range(len(anchors)):
        weight = state.get(f"{head_path}.m.{level}.weight")
        wide = weight is not None and weight.shape[:1] == (anchors.shape[1] * (nc + 5),)
        require(wide, f"its Detect layer {level} should have {anchors.shape[1]} x (5 + {nc} classes) outputs")
    return nc


def _architecture(model: Stub, modules: int) -> dict[str, Any]:
    """Return the yaml of the model; its rows may not ask for more modules than the model has."""
    yaml = model.state.get("yaml")
    require(isinstance(yaml, dict), "its model has no architecture dict 'yaml'")
    yaml = _plain(yaml, iter(range(MAX_PLAIN_VALUES)), 0)
    rows = [row for key in ("backbone", "head") for row in _list(yaml.get(key), f"'{key}' of its yaml")]
    repeats = [row[1] for row in rows if type(row) in (list, tuple) and len(row) == 4]
    depth = yaml.get("depth_multiple", 1.0)
    counted = len(repeats) == len(rows) and all(_is_number(number) for number in (*repeats, depth))
    require(counted, "its architecture dict 'yaml' has malformed rows; a row is [from, repeats, module, args]")
    asked = sum(max(number * depth - 1, 1) for number in repeats)
    require(asked <= modules, f"its yaml asks for {asked:.0f} modules or more, its model has {modules}")
    return yaml


def _list(value: object, what: str) -> list:
    require(type(value) is list, f"{what} is no list")
    return value


def _plain(value: object, budget: Iterator[int], depth: int) -> Any:
    """Copy nested dicts, lists and tuples of plain values; `budget` bounds how many, since parts may be shared."""
    require(next(budget, None) is not None and depth <= MAX_DEPTH, "its architecture dict 'yaml' is too large")
    if isinstance(value, dict):
        require(all(type(key) in (str, int) for key in value), "its architecture dict 'yaml' has malformed keys")
        return {key: _plain(item, budget, depth + 1) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_plain(item, budget, depth + 1) for item in value)
    plain = value is None or type(value) in (str, bool) or (_is_number(value) and abs(value) <= MAX_NUMBER)
    require(plain, "its architecture dict 'yaml' holds more than texts, small numbers, lists and dicts")
    return value


def _names(names: object, nc: int) -> tuple[str, ...]:
    """Return the class names in the order of their index."""
    if names is None:
        return tuple(f"class{index}" for index in range(nc))
    if isinstance(names, dict):
        indexed = all(type(key) is int or (type(key) is str and re.fullmatch("[0-9]{1,9}", key)) for key in names)
        require(indexed, "its class names are a dict whose keys are no numbers")
        numbered = {int(key): name for key, name in names.items()}
        beyond = sorted(numbered.keys() - range(nc))
        require(not beyond, f"it names the class {beyond[:1]}, but it has {nc} classes")
        names = [numbered.get(index, f"class{index}") for index in range(nc)]
    listed = type(names) in (list, tuple) and all(type(name) in (str, bool) or _is_number(name) for name in names)
    require(listed, "its class names are neither a list of texts nor a dict from number to text")
    require(len(names) == nc, f"it has {len(names)} class names for {nc} classes")
    names = tuple(str(name) for name in names)
    printable = all(name.isprintable() and len(name) <= MAX_NAME for name in names)
    require(printable, "its class names are not plain texts of one line")
    return names


def _batch_norm_attribute(modules: dict[str, Stub], attribute: str) -> dict[str, float]:
    norms = {path: module for path, module in modules.items() if module.path.endswith(".BatchNorm2d")}
    values = {path: module.state.get(attribute) for path, module in norms.items()}
    bad = next((path for path, value in values.items() if not (_is_number(value) and 0 < value < math.inf)), None)
    require(bad is None, f"its {bad} has no positive number '{attribute}'")
    return {path: float(value) for path, value in values.items()}


def _activations(modules: dict[str, Stub]) -> dict[str, str]:
    return {path.removesuffix(".act"): _activation(act) for path, act in modules.items() if path.endswith(".act")}


def _activation(act: Stub) -> str:
    name = act.path.rpartition(".")[2]
    slope = act.state.get("negative_slope")
    return f"{name}({slope:g})" if name == "LeakyReLU" and _is_number(slope) else name


def _is_fused(module: Stub) -> bool:
    """Tell whether `module` is a Conv whose batch norm is gone and whose convolution has a bias instead."""
    children = _table(module, "_modules", Stub)
    conv = children.get("conv")
    if conv is None or "bn" in children or not conv.path.endswith(".Conv2d"):
        return False
    return "bias" in _table(conv, "_parameters", TensorRef)


def _number(value: object) -> float | None:
    """Return the fitness, which is a float or a numpy array with one element, according to the release."""
    if value is None:
        return None
    if _is_number(value):
        return float(value)
    raw = bytes(value.raw) if type(value) is NumpyArray else b""
    require(bool(raw) and len(raw) == np.dtype(value.code).itemsize, "its 'best_fitness' is no number")
    return float(np.frombuffer(raw, dtype=f"<{value.code}")[0])


def _is_number(value: object) -> bool:
    """Tell whether `value` is a float or a 64-bit int; Python's own ints need not fit a float."""
    return type(value) is float or (type(value) is int and abs(value) < 1 << 63)
