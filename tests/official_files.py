"""Writes checkpoints as YOLOv5's releases pickled them: whole modules, under the qualified names of the official classes.

The stand-in classes below carry the published attribute names and structures and compute what those modules compute, so a
file's own `model(images)` is what a loaded network has to give. They share no code with `models/`. While a file is written, and
only then, `models.yolo` and `models.common` in `sys.modules` are modules that hold these classes.
"""

from __future__ import annotations

import math
import sys
import types
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models.official import OfficialCheckpoint, read_official
from utils.errors import InputError

# --- the modules ----------------------------------------------------------------------------------------------------------------


class Conv(nn.Module):
    def __init__(self, c1: int, c2: int, k: int = 1, s: int = 1, p: int | None = None, g: int = 1, act: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c1, c2, k, s, k // 2 if p is None else p, groups=g, bias=False)
        self.bn = nn.BatchNorm2d(c2)
        self.act = nn.SiLU() if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))

    def forward_fuse(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x))


class DWConv(Conv):
    def __init__(self, c1: int, c2: int, k: int = 1, s: int = 1, act: bool = True) -> None:
        super().__init__(c1, c2, k, s, g=math.gcd(c1, c2), act=act)


class Bottleneck(nn.Module):
    def __init__(self, c1: int, c2: int, shortcut: bool = True, e: float = 0.5) -> None:
        super().__init__()
        self.cv1, self.cv2 = Conv(c1, int(c2 * e)), Conv(int(c2 * e), c2, 3)
        self.add = shortcut and c1 == c2

    def forward(self, x: Tensor) -> Tensor:
        y = self.cv2(self.cv1(x))
        return x + y if self.add else y


class C3(nn.Module):
    def __init__(self, c1: int, c2: int, n: int = 1, shortcut: bool = True) -> None:
        super().__init__()
        h = c2 // 2
        self.cv1, self.cv2, self.cv3 = Conv(c1, h), Conv(c1, h), Conv(2 * h, c2)
        self.m = nn.Sequential(*(Bottleneck(h, h, shortcut, 1.0) for _ in range(n)))

    def forward(self, x: Tensor) -> Tensor:
        return self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), 1))


class BottleneckCSP(nn.Module):
    def __init__(self, c1: int, c2: int, n: int = 1, shortcut: bool = True) -> None:
        super().__init__()
        h = c2 // 2
        self.cv1, self.cv4 = Conv(c1, h), Conv(2 * h, c2)
        self.cv2, self.cv3 = nn.Conv2d(c1, h, 1, bias=False), nn.Conv2d(h, h, 1, bias=False)
        self.bn, self.act = nn.BatchNorm2d(2 * h), nn.LeakyReLU(0.1, inplace=True)
        self.m = nn.Sequential(*(Bottleneck(h, h, shortcut, 1.0) for _ in range(n)))

    def forward(self, x: Tensor) -> Tensor:
        return self.cv4(self.act(self.bn(torch.cat((self.cv3(self.m(self.cv1(x))), self.cv2(x)), 1))))


class SPP(nn.Module):
    def __init__(self, c1: int, c2: int, k: tuple[int, ...] = (5, 9, 13)) -> None:
        super().__init__()
        self.cv1, self.cv2 = Conv(c1, c1 // 2), Conv(c1 // 2 * (len(k) + 1), c2)
        self.m = nn.ModuleList(nn.MaxPool2d(x, 1, x // 2) for x in k)

    def forward(self, x: Tensor) -> Tensor:
        x = self.cv1(x)
        return self.cv2(torch.cat([x, *(m(x) for m in self.m)], 1))


class SPPF(nn.Module):
    def __init__(self, c1: int, c2: int, k: int = 5) -> None:
        super().__init__()
        self.cv1, self.cv2, self.m = Conv(c1, c1 // 2), Conv(c1 // 2 * 4, c2), nn.MaxPool2d(k, 1, k // 2)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.cv1(x)]
        parts += [self.m(parts[0])]
        parts += [self.m(parts[1])]
        return self.cv2(torch.cat([*parts, self.m(parts[2])], 1))


class Focus(nn.Module):
    def __init__(self, c1: int, c2: int, k: int = 1) -> None:
        super().__init__()
        self.conv = Conv(4 * c1, c2, k)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(torch.cat([x[..., row::2, column::2] for row, column in ((0, 0), (1, 0), (0, 1), (1, 1))], 1))


class GhostConv(nn.Module):
    def __init__(self, c1: int, c2: int, k: int = 1, s: int = 1, act: bool = True) -> None:
        super().__init__()
        self.cv1, self.cv2 = Conv(c1, c2 // 2, k, s, act=act), Conv(c2 // 2, c2 // 2, 5, g=c2 // 2, act=act)

    def forward(self, x: Tensor) -> Tensor:
        y = self.cv1(x)
        return torch.cat((y, self.cv2(y)), 1)


class GhostBottleneck(nn.Module):
    def __init__(self, c1: int, c2: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(GhostConv(c1, c2 // 2), nn.Identity(), GhostConv(c2 // 2, c2, act=False))
        self.shortcut = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.shortcut(x)


class C3Ghost(C3):
    def __init__(self, c1: int, c2: int, n: int = 1, shortcut: bool = True) -> None:
        super().__init__(c1, c2, n, shortcut)
        self.m = nn.Sequential(*(GhostBottleneck(c2 // 2, c2 // 2) for _ in range(n)))


class C3TR(C3):
    """Only what is told apart by its name: attention inside a C3."""

    def __init__(self, c1: int, c2: int, n: int = 1, shortcut: bool = True) -> None:
        super().__init__(c1, c2, n, shortcut)
        self.m = nn.Sequential(nn.MultiheadAttention(c2 // 2, 4))


class Concat(nn.Module):
    def __init__(self, dimension: int = 1) -> None:
        super().__init__()
        self.d = dimension

    def forward(self, x: list[Tensor]) -> Tensor:
        return torch.cat(x, self.d)


class Detect(nn.Module):
    """`stride` and the buffer `anchors` are set by `Model`."""

    def __init__(self, nc: int, anchors: Tensor, ch: list[int]) -> None:
        super().__init__()
        self.nc, self.no, self.nl, self.na = nc, nc + 5, len(anchors), anchors.shape[1]
        self.grid = [torch.zeros(1, 1, 1, 1, 2).expand(1, self.na, 4, 4, 2), *(torch.empty(0) for _ in ch[1:])]  # a cache
        self.register_buffer("anchors", anchors.clone())
        self.m = nn.ModuleList(nn.Conv2d(c, self.no * self.na, 1) for c in ch)


SCALED = {"Conv": Conv, "DWConv": DWConv, "Bottleneck": Bottleneck, "C3": C3, "BottleneckCSP": BottleneckCSP, "SPP": SPP, "SPPF": SPPF,
          "Focus": Focus, "GhostConv": GhostConv, "C3Ghost": C3Ghost, "C3TR": C3TR}  # fmt: skip
INNER = ("C3", "BottleneckCSP", "C3Ghost", "C3TR")


class Model(nn.Module):
    """A detector of `spec`, a model yaml, by the published building rules; `forward` gives the raw maps (B, na*(nc+5), h, w)."""

    def __init__(self, spec: dict[str, Any], anchors: Tensor, stride: Tensor) -> None:
        super().__init__()
        self.yaml, self.stride, self.save = deepcopy(spec), stride, []
        layers: list[nn.Module] = []
        channels = [3]
        for i, (f, n, kind, args) in enumerate(spec["backbone"] + spec["head"]):
            sources = [channels[x + 1 if x >= 0 else x] for x in (f if isinstance(f, list) else [f])]
            n = max(round(n * spec["depth_multiple"]), 1) if n > 1 else n
            c2 = sources[0]
            if kind in SCALED:
                c2 = math.ceil(args[0] * spec["width_multiple"] / 8) * 8
                inner = [n] if kind in INNER else []
                times = 1 if inner else n
                made = [SCALED[kind](sources[0] if k == 0 else c2, c2, *inner, *args[1:]) for k in range(times)]
                layer = made[0] if times == 1 else nn.Sequential(*made)
            elif kind == "nn.Upsample":
                layer = nn.Upsample(None, args[1], args[2])
            elif kind in ("nn.MaxPool2d", "nn.ZeroPad2d"):
                layer = getattr(nn, kind[3:])(*args)
            elif kind == "Concat":
                layer, c2 = Concat(*args), sum(sources)
            else:
                layer = Detect(spec["nc"], anchors / stride.view(-1, 1, 1), sources)
                layer.stride = stride
            layer.i, layer.f, layer.type, layer.np = i, f, f"models.common.{kind}", sum(p.numel() for p in layer.parameters())
            layers.append(layer)
            channels.append(c2)
        self.model = nn.Sequential(*layers)

    @property
    def head(self) -> Detect:
        return self.model[-1]

    def forward(self, x: Tensor) -> list[Tensor]:
        outputs = [x]
        for layer in self.model[:-1]:
            inputs = [outputs[k + 1 if k >= 0 else k] for k in (layer.f if isinstance(layer.f, list) else [layer.f])]
            outputs.append(layer(inputs if isinstance(layer, Concat) else inputs[0]))
        return [m(outputs[f + 1]) for m, f in zip(self.head.m, self.head.f)]


class DetectionModel(Model):
    pass


class SegmentationModel(Model):
    pass


HOMES = {
    "models.yolo": (Detect, Model, DetectionModel, SegmentationModel),
    "models.common": (Conv, DWConv, Bottleneck, C3, BottleneckCSP, SPP, SPPF, Focus, GhostConv, GhostBottleneck, C3Ghost, C3TR, Concat),
}


@contextmanager
def official_names() -> Iterator[None]:
    """Let pickle find the classes above under the names they have in official files; then put everything back."""
    modules = {name: sys.modules.get(name) for name in HOMES}
    classes = {kind: kind.__module__ for kinds in HOMES.values() for kind in kinds}
    try:
        for name, kinds in HOMES.items():
            sys.modules[name] = types.ModuleType(name)
            for kind in kinds:
                kind.__module__ = name
                setattr(sys.modules[name], kind.__name__, kind)
        yield
    finally:
        for kind, module in classes.items():
            kind.__module__ = module
        for name, module in modules.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module


def save(top: object, path: Path, **options: Any) -> Path:
    """`torch.save` of `top`, official modules under their own names."""
    with official_names():
        torch.save(top, path, **options)
    return path


# --- the releases ---------------------------------------------------------------------------------------------------------------

P5 = [[10, 13, 16, 30, 33, 23], [30, 61, 62, 45, 59, 119], [116, 90, 156, 198, 373, 326]]
# What autoanchor may have found: no multiples of anything, so half precision rounds them.
FOUND = torch.tensor(
    [[[5.37, 7.11], [9.83, 6.7], [13.9, 17.3]], [[21.7, 16.1], [18.9, 33.3], [40.1, 28.7]], [[37.7, 61.9], [58.3, 47.1], [63.7, 71.9]]]
)


def yaml_v6(csp: str = "C3", conv: str = "Conv") -> dict[str, Any]:
    """YOLOv5's P5 model of v6.0 and later, an eighth as wide. `conv` takes the place of every Conv but the first."""
    c = conv
    return {
        "nc": 80, "depth_multiple": 0.33, "width_multiple": 0.125, "anchors": P5, "ch": 3,
        "backbone": [
            [-1, 1, "Conv", [64, 6, 2, 2]], [-1, 1, c, [128, 3, 2]], [-1, 3, csp, [128]], [-1, 1, c, [256, 3, 2]], [-1, 6, "C3", [256]],
            [-1, 1, c, [512, 3, 2]], [-1, 9, "C3", [512]], [-1, 1, c, [1024, 3, 2]], [-1, 3, csp, [1024]], [-1, 1, "SPPF", [1024, 5]],
        ],
        "head": _head("C3", c),
    }  # fmt: skip


def yaml_v5(csp: str = "C3") -> dict[str, Any]:
    """The P5 model of v5.0 and, with BottleneckCSP, of v3, an eighth as wide."""
    return {
        "nc": 80, "depth_multiple": 0.33, "width_multiple": 0.125, "anchors": P5, "ch": 3,
        "backbone": [
            [-1, 1, "Focus", [64, 3]], [-1, 1, "Conv", [128, 3, 2]], [-1, 3, csp, [128]], [-1, 1, "Conv", [256, 3, 2]], [-1, 9, csp, [256]],
            [-1, 1, "Conv", [512, 3, 2]], [-1, 9, csp, [512]], [-1, 1, "Conv", [1024, 3, 2]], [-1, 1, "SPP", [1024, [5, 9, 13]]],
            [-1, 3, csp, [1024, False]],
        ],
        "head": _head(csp, "Conv"),
    }  # fmt: skip


def yaml_v3_tiny() -> dict[str, Any]:
    """YOLOv3-tiny, an eighth as wide: two levels, pools, and a padding that only one of them needs."""
    pool = [-1, 1, "nn.MaxPool2d", [2, 2, 0]]
    backbone = [row for c in (16, 32, 64, 128, 256) for row in ([-1, 1, "Conv", [c, 3, 1]], pool)]
    return {
        "nc": 80, "depth_multiple": 1.0, "width_multiple": 0.125, "anchors": P5[:2], "ch": 3,
        "backbone": [*backbone, [-1, 1, "Conv", [512, 3, 1]], [-1, 1, "nn.ZeroPad2d", [[0, 1, 0, 1]]], [-1, 1, "nn.MaxPool2d", [2, 1, 0]]],
        "head": [
            [-1, 1, "Conv", [1024, 3, 1]], [-1, 1, "Conv", [256, 1, 1]], [-1, 1, "Conv", [512, 3, 1]], [-2, 1, "Conv", [128, 1, 1]],
            [-1, 1, "nn.Upsample", ["None", 2, "nearest"]], [[-1, 8], 1, "Concat", [1]], [-1, 1, "Conv", [256, 3, 1]],
            [[19, 15], 1, "Detect", ["nc", "anchors"]],
        ],
    }  # fmt: skip


def _head(csp: str, conv: str) -> list[list[Any]]:
    up = [-1, 1, "nn.Upsample", ["None", 2, "nearest"]]
    return [
        [-1, 1, conv, [512, 1, 1]], up, [[-1, 6], 1, "Concat", [1]], [-1, 3, csp, [512, False]],
        [-1, 1, conv, [256, 1, 1]], up, [[-1, 4], 1, "Concat", [1]], [-1, 3, csp, [256, False]],
        [-1, 1, conv, [256, 3, 2]], [[-1, 14], 1, "Concat", [1]], [-1, 3, csp, [512, False]],
        [-1, 1, conv, [512, 3, 2]], [[-1, 10], 1, "Concat", [1]], [-1, 3, csp, [1024, False]], [[17, 20, 23], 1, "Detect", ["nc", "anchors"]],
    ]  # fmt: skip


@dataclass(frozen=True)
class Era:
    """How one release pickles. `keys`: top-level keys besides epoch, best_fitness, model and optimizer, and what they hold while training."""

    spec: dict[str, Any]
    kind: type[Model] = Model
    act: Callable[[], nn.Module] = nn.SiLU
    csp_act: Callable[[], nn.Module] = lambda: nn.LeakyReLU(0.1, inplace=True)
    half: bool = True
    grid_buffer: bool = False  # anchor_grid as a buffer; as a list of cached tensors otherwise
    names_dict: bool = False
    inplace: bool = True
    found: bool = False  # autoanchor replaced the yaml's anchors
    stride: tuple[float, ...] = (8.0, 16.0, 32.0)
    fitness: Callable[[], object] = lambda: np.array([0.25])
    keeps_fitness: bool = True
    keys: dict[str, object] = field(default_factory=dict)

    @property
    def act_name(self) -> str:
        return type(self.act()).__name__


OPT = {"weights": PurePosixPath("yolov5n.pt"), "cfg": "", "hyp": {"lr0": 0.01}, "epochs": 3, "imgsz": 640, "freeze": [0], "evolve": None,
       "save_dir": "runs/train/exp", "project": PurePosixPath("runs/train")}  # fmt: skip
AVERAGED = {"ema": "ema", "updates": 12}

ERAS = {
    "v3.1": Era(yaml_v5("BottleneckCSP"), act=nn.Hardswish, half=False, grid_buffer=True, inplace=False,
                keys={"training_results": "0/2 1.2G 0.1\n", "wandb_id": None}),
    "v5.0": Era(yaml_v5(), grid_buffer=True, inplace=False, keys={"training_results": "0/2 1.2G 0.1\n", "wandb_id": "1x", **AVERAGED}),
    "v6.0 as released": Era(yaml_v6(), grid_buffer=True, keys={"training_results": None, "wandb_id": None, **AVERAGED}),
    "v6.0": Era(yaml_v6("BottleneckCSP"), fitness=lambda: np.float64(0.25), keys={"wandb_id": "1x", **AVERAGED}),
    "v6.1": Era(yaml_v6() | {"anchors": 3}, found=True, keeps_fitness=False, keys={"wandb_id": None, "date": "2022-02-22T10:00:00", **AVERAGED}),
    "v6.2": Era(yaml_v6(conv="GhostConv"), DetectionModel, csp_act=nn.SiLU, keeps_fitness=False,
                keys={"wandb_id": None, "date": "2022-08-17T10:00:00", "opt": OPT, **AVERAGED}),
    "v7.0": Era(yaml_v6() | {"inplace": True}, DetectionModel, names_dict=True, found=True, keeps_fitness=False,
                keys={"opt": OPT, "git": {"remote": None, "branch": None, "commit": None}, "date": "2022-11-22T10:00:00", **AVERAGED}),
    "v7.0 LeakyReLU": Era(yaml_v6("BottleneckCSP", "DWConv") | {"activation": "nn.LeakyReLU(0.1)"}, DetectionModel, names_dict=True,
                          act=lambda: nn.LeakyReLU(0.1), keeps_fitness=False, keys=AVERAGED),
}  # fmt: skip
# Other architectures, as v7.0 pickles them.
HUB = {
    "s-ghost": Era(yaml_v6("C3Ghost", "GhostConv"), DetectionModel, names_dict=True, keys=AVERAGED),
    "v3-tiny": Era(yaml_v3_tiny(), DetectionModel, names_dict=True, stride=(16.0, 32.0), keys=AVERAGED),
}


def make_model(era: Era, nc: int = 3, seed: int = 0) -> Model:
    """A model whose logits depend on all of its channels and which finds something in any picture; in the era's precision."""
    torch.manual_seed(seed)
    spec = era.spec | {"nc": nc}
    anchors = FOUND if era.found else torch.tensor(P5[: len(era.stride)], dtype=torch.float32).unflatten(1, (3, 2))
    model = era.kind(spec, anchors, torch.tensor(era.stride))
    for module in model.modules():
        if isinstance(module, (Conv, BottleneckCSP)) and not isinstance(module.act, nn.Identity):
            module.act = era.act() if isinstance(module, Conv) else era.csp_act()
        elif isinstance(module, nn.BatchNorm2d):
            module.eps, module.momentum = 1e-3, None  # a cumulative mean
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0.0, 0.3)
    model.train()
    with torch.no_grad():
        for _ in range(2):
            model(torch.rand(4, 3, 64, 64))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.03
    for m in model.head.m:
        m.bias.data.view(3, -1)[:, 4:] += 1.0
    _attributes(model, era, anchors, nc)
    return model.half() if era.half else model


def _attributes(model: Model, era: Era, anchors: Tensor, nc: int) -> None:
    """What hangs on the pickled modules besides tensors."""
    names = [f"shape{i}" for i in range(nc)]
    model.names = dict(enumerate(names)) if era.names_dict else names
    model.nc, model.hyp, model.class_weights = nc, {"lr0": 0.01, "anchor_t": 4.0}, torch.ones(nc, dtype=torch.float64)
    if era.inplace:
        model.inplace = model.head.inplace = True
    if era.grid_buffer:
        model.head.register_buffer("anchor_grid", anchors.view(len(anchors), 1, 3, 1, 1, 2).clone())
    else:
        model.head.anchor_grid = [torch.empty(0) for _ in anchors]


def stripped(model: nn.Module, era: Era | None = None) -> dict[str, object]:
    """The dict of a finished training."""
    if era is None:
        return {"epoch": -1, "best_fitness": None, "model": model, "ema": None, "updates": None, "optimizer": None}
    kept = {key: value if key in ("opt", "git", "date") else None for key, value in era.keys.items()}
    return {"epoch": -1, "best_fitness": era.fitness() if era.keeps_fitness else None, "model": model, "optimizer": None, **kept}


def unstripped(model: nn.Module, era: Era, epoch: int = 1) -> dict[str, object]:
    """The dict while training: a raw `model` beside the `ema`, which is `model`, and an SGD that has made a step."""
    raw = deepcopy(model)
    for parameter in raw.parameters():
        parameter.data.add_(0.5)
    groups = [{"lr": 0.01, "initial_lr": 0.01, "momentum": np.float64(0.8), "nesterov": True, "weight_decay": 5e-4, "params": [0, 1]}]
    buffers = {i: {"momentum_buffer": torch.ones_like(p, dtype=torch.float32)} for i, p in enumerate(list(model.parameters())[:2])}
    kept = {key: model if value == "ema" else value for key, value in era.keys.items()}
    return {
        "epoch": epoch, "best_fitness": era.fitness(), "model": raw if "ema" in era.keys else model,
        "optimizer": {"state": buffers, "param_groups": groups}, **kept,
    }  # fmt: skip


def fuse(model: Model) -> Model:
    """YOLOv5's fusing: every Conv loses its batch norm to a biased convolution and forwards another way. (BottleneckCSP's norm stays.)"""
    model = deepcopy(model).float()
    for module in model.modules():
        if isinstance(module, Conv):
            conv, bn = module.conv, module.bn
            scale = bn.weight / (bn.running_var + bn.eps).sqrt()
            module.conv = nn.Conv2d(
                conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, groups=conv.groups
            ).requires_grad_(False)
            module.conv.weight.copy_(conv.weight * scale.view(-1, 1, 1, 1))
            module.conv.bias.copy_(bn.bias - bn.running_mean * scale)
            del module.bn
            module.forward = module.forward_fuse  # pickled as a call of getattr
    return model


# --- small files to damage ---------------------------------------------------------------------------------------------------------


NC = 2
STRIDES = (8.0, 16.0)
ANCHORS = (((10.0, 13.0), (16.0, 30.0)), ((30.0, 61.0), (62.0, 45.0)))
TINY = {
    "nc": NC, "depth_multiple": 1.0, "width_multiple": 1.0, "anchors": [[10, 13, 16, 30], [30, 61, 62, 45]], "ch": 3,
    "backbone": [[-1, 1, "Conv", [8, 3, 8]], [-1, 1, "Conv", [8, 3]], [-1, 1, "Conv", [8, 3]], [-1, 1, "Conv", [8, 3, 2]]],
    "head": [[[2, 3], 1, "Detect", ["nc", "anchors"]]],
}  # fmt: skip


def tiny(kind: type[Model] = DetectionModel, grid_buffer: bool = False) -> Model:
    """Four Convs, each with another activation, and a Detect on two levels; half precision."""
    torch.manual_seed(0)
    model = kind(TINY, torch.tensor(ANCHORS), torch.tensor(STRIDES))
    for layer, act in zip(model.model, (nn.SiLU(), nn.LeakyReLU(0.1, inplace=True), nn.Hardswish(), nn.Identity())):
        layer.act, layer.bn.eps, layer.bn.momentum = act, 1e-3, 0.03
    if grid_buffer:
        model.head.register_buffer("anchor_grid", torch.tensor(ANCHORS).view(2, 1, 2, 1, 1, 2))
    model.names, model.hyp, model.class_weights = ["cat", "dog"], {"lr0": 0.01}, torch.ones(NC)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point() and tensor.ndim < 3:
            tensor.uniform_(0.5, 1.5)
    return model.half()


def refusal(path: Path) -> str:
    """Return the one line with which `path` is refused, without its name."""
    with pytest.raises(InputError) as caught:
        read_official(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


def data_pkl(path: Path) -> bytes:
    with zipfile.ZipFile(path) as file:
        return next(file.read(name) for name in file.namelist() if name.endswith("/data.pkl"))


def with_pickle(source: Path, pickled: bytes, target: Path, **entries: bytes) -> Path:
    """Copy the checkpoint `source` with another `data.pkl` and other or further entries."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            short = name.partition("/")[2]
            if short not in entries:
                new.writestr(f"archive/{short}", pickled if short == "data.pkl" else old.read(name))
        for short, content in entries.items():
            new.writestr(f"archive/{short}", content)
    return target


def bare_pickle(pickled: bytes, path: Path) -> Path:
    """Write a zip whose only entry is `data.pkl`."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", pickled)
    return path


def assert_same_state(checkpoint: OfficialCheckpoint, model: nn.Module) -> None:
    expected = {key: value for key, value in model.state_dict().items() if not key.endswith("anchor_grid")}
    assert list(checkpoint.state) == list(expected)
    for key, value in expected.items():
        wanted = value.float() if value.is_floating_point() else value
        assert checkpoint.state[key].dtype == wanted.dtype
        assert torch.equal(checkpoint.state[key], wanted), key
