"""Quantisation to 8 bits, simulated: where a network is rounded (`QuantPlan`), and the rounding itself (`Quantization`), part of a `Network`.

Weights: int8, symmetric, per output channel, -127..127, the scale being the channel's largest |w| / 127 at any moment. Such a grid is scaled by whatever the
channel is scaled by, so rounding a convolution's weights before its batch norm is the same as rounding the folded ones, in training as in inference.

Activations: 8 bits per tensor. A value is rounded once, at the block that computes it; blocks that only move values (concat, slice, pool, upsample) keep
the grid, so that all inputs of a concat share one: integers pass through. Beside the values that convolutions read, the inputs of residual adds are
rounded, and inside a block what stands before its activation and the gate of SiLU, so that a runtime that computes layer by layer stays in integers
(`Form`). What the head's last convolutions give, and its decoding, stays in float.

Ranges are moving averages of each value's smallest and largest (Jacob et al. 2018), observed in training mode alone, or set by calibration.
Straight-through gradients are those of `torch.fake_quantize_*`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from models.blocks import OUTPUTS, Block, Blocks, consumers
from models.network import ConvUnit, Network
from utils.errors import InputError, did_you_mean

WEIGHT_LEVELS = 127
AVERAGING = 0.01  # share of a batch in the moving averages
IMAGE = 0.0, 1.0  # the range of an image: its 256 levels are the bytes
TINY = 1e-8
_MOVES = frozenset(
    {"route", "upsample", "maxpool", "zeropad", "focus"}
)  # kinds whose output holds values of their inputs, and nothing else
_FUSED = frozenset({"linear", "relu"})  # activations that every runtime computes in the convolution's own kernel
# Below it an activation is flat: a range that reaches further down would spend levels on what comes out as the same.
_FLAT_BELOW = {"silu": -8.0, "mish": -8.0, "hardswish": -3.0, "logistic": -8.0}


@dataclass(frozen=True)
class QuantScheme:
    """What is quantised. `modules`: paths whose convolutions are (empty: all); `ignore`: paths that are not. `symmetric`: activations have
    the zero point 0 (TensorRT). `reduce_range`: weights of 7 bits, for CPUs without VNNI, whose 8-bit products saturate."""

    symmetric: bool = False
    reduce_range: bool = False
    modules: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()

    @property
    def weight_levels(self) -> int:
        """The largest integer of a weight."""
        return 63 if self.reduce_range else WEIGHT_LEVELS


@dataclass(frozen=True)
class Form:
    """Which of the plan's roundings a runtime is given; which is fastest is measured, see docs/quantization.md.

    inner: around activation functions.  branches: where a convolution's output goes into a residual add and nowhere else.  moved: once more behind blocks
    that move values.  bias: int32, at the scale of the products.  signed: symmetric activations are written as -128..127, not as 0..255 around 128;
    OpenVINO takes int8 without a zero point for another scale.
    """

    inner: bool = True
    branches: bool = True
    moved: bool = True
    bias: bool = True
    signed: bool = True


FORMS = {
    "onnxruntime": Form(),
    "openvino": Form(inner=False, branches=False, moved=False, bias=False, signed=False),
    "tensorrt": Form(inner=False, branches=False, bias=False),
}


@dataclass(frozen=True)
class QuantPlan:
    """Where `blocks` are rounded. All by block index; a point is an index into `points`.

    convolutions: those with int8 weights.  output[i], inner[i]: the point of a block's output and of what stands before its activation, or None.
    points[k]: the members whose ranges make the point's.  members: their names, one range each.  branches: blocks that only feed residual adds.
    """

    convolutions: frozenset[int]
    output: tuple[int | None, ...]
    inner: tuple[int | None, ...]
    points: tuple[tuple[int, ...], ...]
    members: tuple[str, ...]
    sources: Mapping[int, int]  # block -> the member that its output is
    floors: tuple[float, ...]  # per member: where its range may begin at the lowest
    branches: frozenset[int]

    @property
    def image(self) -> int | None:
        """The member that the image is, if it is rounded. Its range is known: `IMAGE`."""
        return self.sources.get(0)


def path_of(block: Block, index: int) -> str:
    """The name of a block's values, the same before and after its batch norm is folded."""
    return _unit(block.name or f"{block.kind}.{index}")


def _unit(path: str) -> str:
    """The module whose convolution `path` is, or itself: Focus, too, holds its own in a `.conv`."""
    return re.sub(r"(\.conv)+$", "", path)


def quant_plan(blocks: Blocks, scheme: QuantScheme) -> QuantPlan:
    """Where `blocks` are rounded under `scheme`. Raises `InputError` for a path that names nothing."""
    convolutions = _convolutions(blocks, scheme)
    groups = _groups(blocks)
    wanted = {groups[i] for c in convolutions for i in blocks[c].inputs}
    for i in range(len(blocks) - 1, -1, -1):  # an add is computed in integers where all that it adds is
        if blocks[i].kind == "shortcut" and groups[i] in wanted:
            wanted |= {groups[j] for j in blocks[i].inputs}
    names: list[str] = []
    floors: list[float] = []

    def member(name: str, floor: float = -math.inf) -> int:
        names.append(name)
        floors.append(floor)
        return len(names) - 1

    sources = {i: member(path_of(b, i)) for i, b in enumerate(blocks) if groups[i] in wanted and b.kind not in _MOVES}
    rounded = sorted({groups[i] for i in sources})
    points = [tuple(m for i, m in sources.items() if groups[i] == g) for g in rounded]
    output = tuple(rounded.index(g) if g in wanted and g in rounded else None for g in groups)
    inner: list[int | None] = [None] * len(blocks)
    for i in sorted(convolutions):
        if output[i] is not None and blocks[i].activation not in _FUSED:
            points.append((member(f"{path_of(blocks[i], i)}.pre", _FLAT_BELOW.get(blocks[i].activation, -math.inf)),))
            inner[i] = len(points) - 1
    readers = consumers(blocks)
    branches = {i for i in convolutions if readers[i] and all(blocks[r].kind == "shortcut" for r in readers[i])}
    return QuantPlan(convolutions, output, tuple(inner), tuple(points), tuple(names), sources, tuple(floors), frozenset(branches))


def _convolutions(blocks: Blocks, scheme: QuantScheme) -> frozenset[int]:
    paths = {i: path_of(b, i) for i, b in enumerate(blocks) if b.kind == "convolutional"}
    known = {".".join(parts[:n]) for path in paths.values() for parts in [path.split(".")] for n in range(1, len(parts) + 1)}
    layers = max((int(path.split(".")[1]) for path in paths.values() if re.match(r"model\.\d+(\.|$)", path)), default=-1)
    modules, ignore = ([path if path in known else _unit(path) for path in entries] for entries in (scheme.modules, scheme.ignore))
    for entry in (*modules, *ignore):  # a layer without convolutions, an upsample say, is often listed with the others
        if entry not in known and entry not in {f"model.{i}" for i in range(layers)}:
            raise InputError(f"quantisation of {entry}: the model has no convolution under that path{did_you_mean(entry, known)}")
    inside = {i for i, path in paths.items() if not modules or any(_under(path, m) for m in modules)}
    found = frozenset(i for i in inside if not any(_under(paths[i], m) for m in ignore))
    if not found:
        raise InputError("quantisation: no convolution is left to quantise; name fewer under ignore, or more under submodules")
    return found


def _under(path: str, prefix: str) -> bool:
    return path == prefix or path.startswith(f"{prefix}.")


def _groups(blocks: Blocks) -> list[int]:
    """For each block the first block whose grid its output shares."""
    parent = list(range(len(blocks)))

    def find(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    for i, block in enumerate(blocks):
        if block.kind in _MOVES:
            for j in block.inputs:
                low, high = sorted((find(i), find(j)))
                parent[high] = low
    return [find(i) for i in range(len(blocks))]


def weight_scales(weight: Tensor, levels: int = WEIGHT_LEVELS) -> Tensor:
    """Scale of each output channel of (n, c, k, k) weights: (n,)."""
    return (weight.detach().abs().amax((1, 2, 3)) / levels).clamp(min=TINY)


def grid(low: Tensor, high: Tensor, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scale and int32 zero point of activations between `low` and `high`: 0..255 (affine), or -128..127 around 0. Zero is on the grid."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    if symmetric:
        scale = torch.maximum(-low, high).div_(127).clamp_(min=TINY)
        return scale, torch.zeros_like(scale, dtype=torch.int32)
    scale = (high - low).div_(255).clamp_(min=TINY)
    return scale, (low / scale).round_().to(torch.int32).neg_()


def gate_grid(symmetric: bool) -> tuple[float, int]:
    """Scale and zero point of a sigmoid, between 0 and 1 whatever the data."""
    return 1 / (127 if symmetric else 255), 0


@dataclass(frozen=True)
class Ranges:
    """What a checkpoint keeps of a quantisation: the scheme, and (low, high) of each member by name; empty where nothing was observed."""

    scheme: QuantScheme
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def to_plain(self) -> dict[str, Any]:
        return {"scheme": asdict(self.scheme), "ranges": {k: list(v) for k, v in self.ranges.items()}}

    @classmethod
    def from_plain(cls, saved: Mapping[str, Any]) -> Ranges:
        scheme = {k: tuple(v) if isinstance(v, list) else v for k, v in saved["scheme"].items()}
        return cls(QuantScheme(**scheme), {k: (float(v[0]), float(v[1])) for k, v in saved["ranges"].items()})


class Quantization(nn.Module):
    """The roundings of one network, and its ranges (buffers `low` and `high`, one per member of the plan).

    observing: ranges follow what passes, in training mode.  form: which roundings act.  observed: whether there are ranges at all; until then nothing is
    rounded outside training.
    """

    def __init__(self, blocks: Blocks, scheme: QuantScheme) -> None:
        super().__init__()
        self.scheme, self.plan = scheme, quant_plan(blocks, scheme)
        self._reads = {i: blocks[i].inputs[0] for i in self.plan.convolutions}
        self.form, self.observing, self.observed = FORMS["onnxruntime"], True, False
        self.watch: Callable[[int, Tensor], None] | None = None  # calibration looks at each member's values here, and nothing is rounded
        self.register_buffer("low", torch.full((len(self.plan.members),), math.inf))
        self.register_buffer("high", torch.full((len(self.plan.members),), -math.inf))
        self._seen: set[int] = set()  # members with a range; asking the buffers would wait for the device
        if self.plan.image is not None:
            self.low[self.plan.image], self.high[self.plan.image] = IMAGE

    def _load_from_state_dict(self, state_dict: Mapping[str, Tensor], prefix: str, *args: Any) -> None:
        """Ranges that come with a state dict, as when a training is resumed, count as observed."""
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._seen = set(self.low.isfinite().nonzero().flatten().tolist())
        self.observed = len(self._seen) == len(self.plan.members)

    def saved(self) -> Ranges:
        """What a checkpoint keeps."""
        pairs = zip(self.plan.members, self.low.tolist(), self.high.tolist())
        return Ranges(self.scheme, {name: (low, high) for name, low, high in pairs} if self.observed else {})

    def set_ranges(self, ranges: Mapping[str, tuple[float, float]]) -> None:
        """Take ranges by the members' names. Raises `InputError` where one is missing."""
        missing = [name for name in self.plan.members if name not in ranges]
        if missing:
            raise InputError(f"quantisation: no range of {', '.join(missing[:4])} is known; the checkpoint belongs to another structure")
        values = torch.tensor([ranges[name] for name in self.plan.members], dtype=self.low.dtype)
        self.low.copy_(values[:, 0])
        self.high.copy_(values[:, 1])
        self._seen, self.observed = set(range(len(values))), True

    def attach(self, network: Network) -> None:
        """Quantise `network`, of the same blocks but for folded batch norms, in the same way, with ranges of its own that equal these."""
        copy = Quantization(network.blocks, self.scheme).to(self.low.device)
        copy.low.copy_(self.low)
        copy.high.copy_(self.high)
        copy.form, copy.observing, copy.observed, copy._seen = self.form, self.observing, self.observed, set(self._seen)
        copy.install(network)

    def install(self, network: Network) -> None:
        """Put the roundings between the operations of `network`, whose parameters and names stay."""
        network.quantization = self.to(next(network.parameters()).device)
        for i, (block, op) in enumerate(zip(network.blocks, network._ops)):
            if i in self.plan.convolutions:
                network._ops[i] = self._convolution(i, op)
            elif block.kind not in OUTPUTS and self.plan.output[i] is not None:
                network._ops[i] = self._rounded(i, op)

    def _convolution(self, index: int, op: nn.Module) -> Callable[[Tensor], Tensor]:
        conv, act = (op.conv, op.act) if isinstance(op, ConvUnit) else (op, getattr(op, "act", None))

        def run(x: Tensor) -> Tensor:
            y = conv._conv_forward(x, self.rounded_weight(conv.weight), self._bias(index, conv))
            y = op.bn(y) if isinstance(op, ConvUnit) else y
            return self.output(index, y if act is None else self._activated(index, y, act))

        return run

    def _bias(self, index: int, conv: nn.Conv2d) -> Tensor | None:
        """A folded bias as the int32 that it becomes beside integer products."""
        if conv.bias is None or self.training or not self._acts or not self.has_integer_bias(index):
            return conv.bias
        return (self.bias_steps(index, conv.weight, conv.bias) * self.product_scales(index, conv.weight, conv.bias)).float()

    def has_integer_bias(self, index: int) -> bool:
        """Whether a convolution takes integers and gives integers, so that its bias is one too."""
        return self.form.bias and self.plan.output[self._reads[index]] is not None and self.plan.output[index] is not None

    def product_scales(self, index: int, weight: Tensor, bias: Tensor) -> Tensor:
        """The scale of each output channel's products of integers. It is raised where a channel has next to no weight, so that its bias is an int32."""
        step = self.parameters_of(self.plan.output[self._reads[index]])[0]
        return (weight_scales(weight, self.scheme.weight_levels) * step).maximum(bias.detach().abs() / 2**30)

    def bias_steps(self, index: int, weight: Tensor, bias: Tensor) -> Tensor:
        """The bias in steps of `product_scales`: whole numbers, in float64."""
        return (bias.double() / self.product_scales(index, weight, bias).double()).round()

    def _activated(self, index: int, y: Tensor, act: nn.Module) -> Tensor:
        point = self.plan.inner[index]
        if point is None or not self.form.inner:
            return act(y)
        y = self.rounded(point, y, self.plan.points[point][0])
        if not isinstance(act, nn.SiLU) or not self._acts:
            return act(y)
        return y * self._fake(y.sigmoid(), *gate_grid(self.scheme.symmetric))

    def _rounded(self, index: int, op: Callable[..., Tensor]) -> Callable[..., Tensor]:
        if index not in self.plan.sources:  # it moves what is rounded already
            return op
        return lambda *inputs: self.output(index, op(*inputs))

    def image(self, x: Tensor) -> Tensor:
        """The network's input, rounded where the plan says so: in 0..1, that is the 256 levels of an image's bytes."""
        return x if self.plan.output[0] is None else self.output(0, x)

    def output(self, index: int, y: Tensor) -> Tensor:
        """A block's output on its grid."""
        point = self.plan.output[index]
        if point is None or (index in self.plan.branches and not self.form.branches):
            return y
        return self.rounded(point, y, self.plan.sources[index])

    def rounded(self, point: int, x: Tensor, member: int) -> Tensor:
        """`x`, the values of one member of a point, on the point's grid."""
        if self.watch:
            self.watch(member, x)
            return x
        if self.training and self.observing and member != self.plan.image:
            self._observe(member, x.detach())
        return self._fake(x, *self.parameters_of(point)) if self._acts else x

    @property
    def _acts(self) -> bool:
        return self.watch is None and (self.observed or (self.training and self.observing))

    def parameters_of(self, point: int) -> tuple[Tensor, Tensor]:
        """Scale and zero point of a point, 0-d tensors."""
        members = self.plan.points[point]
        lows, highs = self.low[members[0]], self.high[members[0]]
        for m in members[1:]:
            lows, highs = torch.minimum(lows, self.low[m]), torch.maximum(highs, self.high[m])
        return grid(lows, highs, self.scheme.symmetric)

    def rounded_weight(self, weight: Tensor) -> Tensor:
        """Weights on their grid."""
        if not self._acts:
            return weight
        levels = self.scheme.weight_levels
        scale = weight_scales(weight, levels)
        zeros = torch.zeros_like(scale, dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(weight, scale, zeros, 0, -levels, levels)

    def _fake(self, x: Tensor, scale: Tensor | float, zero: Tensor | int) -> Tensor:
        least, most = (-128, 127) if self.scheme.symmetric else (0, 255)
        return torch.fake_quantize_per_tensor_affine(x, scale, zero, least, most)

    @torch.no_grad()
    def _observe(self, member: int, x: Tensor) -> None:
        low, high = torch.aminmax(x.movedim(1, -1))  # of channels last a view without gaps, which is read as it lies
        if self.plan.floors[member] > -math.inf:
            low.clamp_(min=self.plan.floors[member])
        if member in self._seen:
            self.low[member].lerp_(low, AVERAGING)
            self.high[member].lerp_(high, AVERAGING)
        else:
            self.low[member], self.high[member] = low, high
            self._seen.add(member)
        self.observed = True


def quantize(network: Network, scheme: QuantScheme, ranges: Mapping[str, tuple[float, float]] | None = None) -> None:
    """Quantise `network` in place: its parameters, and their names, stay. Without `ranges` they are observed in training.

    Raises `InputError` where it is quantised already, or a path of the scheme names nothing.
    """
    if network.quantization is not None:
        raise InputError("the network is quantised already, and cannot be quantised twice; start from the checkpoint before quantisation")
    quantization = Quantization(network.blocks, scheme)
    if ranges:
        quantization.set_ranges(ranges)
    quantization.install(network)
    quantization.train(network.training)
