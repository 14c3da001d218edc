"""`Network`: blocks as a torch module whose state dict has the keys of a YOLOv5 checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from models.blocks import OUTPUTS, Block, Blocks, check, consumers, flops, heads, image_multiple, parameters, strides
from utils.decode import Level

QUANTIZATION = "quantization."  # what the keys of a quantisation begin with

_ACTIVATIONS: dict[str, Callable[[bool], nn.Module]] = {
    "linear": lambda inplace: nn.Identity(),
    "silu": nn.SiLU,
    "leaky": lambda inplace: nn.LeakyReLU(0.1, inplace),
    "hardswish": nn.Hardswish,
    "relu": nn.ReLU,
    "mish": nn.Mish,
    "logistic": lambda inplace: nn.Sigmoid(),
}


def activation(name: str) -> nn.Module:
    """The torch module of an activation of `blocks.ACTIVATIONS`."""
    return _ACTIVATIONS[name](False)


class ConvUnit(nn.Module):
    """Convolution, batch norm, activation: YOLOv5's `Conv`, with its attribute names."""

    def __init__(self, conv: nn.Conv2d, bn: nn.BatchNorm2d, act: nn.Module) -> None:
        super().__init__()
        self.conv, self.bn, self.act = conv, bn, act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class Network(nn.Module):
    """A detector or classifier built from `blocks`.

    `forward((B, channels, H, W) float in 0..1) -> [(B, na*(5+nc), H/s, W/s) raw logits per level]` in Detect's order; H and W must be
    multiples of `max_stride`. Of a classifier the list holds one map, (B, nc, 1, 1) raw logits. An intermediate is freed at its last use.
    """

    def __init__(self, blocks: Blocks) -> None:
        super().__init__()
        self.blocks = blocks
        self.quantization: nn.Module | None = None  # see models/quantization.py
        self._norms_frozen = False
        self.strides = strides(blocks)
        self.max_stride = image_multiple(blocks)  # a layer may be coarser than every head, as in yolov5-p34
        self.heads = heads(blocks)
        self._ops: list[Callable[..., Tensor]] = []
        for block in blocks:
            op = operation(block, blocks)
            if isinstance(op, nn.Module) and block.name and block.kind in ("convolutional", "batchnorm"):
                _register(self, block.name, op)
            self._ops.append(op)
        self._register_anchors()
        readers = consumers(blocks)
        self._last_use = [max(r, default=i) for i, r in enumerate(readers)]

    def _register_anchors(self) -> None:
        levels = [self.blocks[i] for i in self.heads if self.blocks[i].kind == "yolo"]
        if not levels:
            return
        cells = [torch.tensor(b.anchors, dtype=torch.float32) / s for b, s in zip(levels, self.strides)]
        holder = _descend(self, levels[0].name)
        holder.register_buffer("anchors", torch.stack(cells))

    @property
    def channels(self) -> int:
        """Channels of the images it reads: 3 (RGB) or 1 (grey)."""
        return self.blocks[0].channels

    @property
    def classes(self) -> int:
        """Number of classes of the first head."""
        return self.blocks[self.heads[0]].classes

    @property
    def anchors(self) -> Tensor:
        """Anchors (levels, na, 2) in pixels; empty of a classifier."""
        return torch.tensor([self.blocks[i].anchors for i in self.heads], dtype=torch.float32)

    @property
    def levels(self) -> tuple[Level, ...]:
        """How each level of the head decodes, in Detect's order."""
        heads = [self.blocks[i] for i in self.heads]
        return tuple(Level(torch.tensor(b.anchors), s, b.scale_x_y, b.exp) for b, s in zip(heads, self.strides))

    def forward(self, x: Tensor) -> list[Tensor]:
        if self.quantization is None:
            return self._run(x)
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 has fewer digits than the grid has levels
            return self._run(self.quantization.image(x.float()))

    def _run(self, x: Tensor) -> list[Tensor]:
        live: dict[int, Tensor] = {0: x}
        maps: dict[int, Tensor] = {}
        for index, (block, op) in enumerate(zip(self.blocks, self._ops)):
            if block.kind == "input":
                continue
            y = op(*(live[i] for i in block.inputs))
            for i in block.inputs:
                if self._last_use[i] == index:
                    live.pop(i, None)
            if block.kind in OUTPUTS:
                maps[index] = y
            elif self._last_use[index] > index:
                live[index] = y
        return [maps[i] for i in self.heads]

    def weights(self) -> dict[str, Tensor]:
        """The state dict without what a quantisation adds to it."""
        return {k: v for k, v in self.state_dict().items() if not k.startswith(QUANTIZATION)}

    def freeze_norms(self) -> None:
        """From now on batch norms use their running statistics, in training mode too, and leave them as they are; gamma and beta still learn."""
        self._norms_frozen = True
        self.train(self.training)

    def train(self, mode: bool = True) -> Network:
        super().train(mode)
        if self._norms_frozen:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def __deepcopy__(self, memo: dict) -> Network:
        copy = type(self)(self.blocks).to(next(self.parameters()).device, memory_format=torch.channels_last)
        copy.load_state_dict(self.weights())
        copy._norms_frozen = self._norms_frozen
        if self.quantization is not None:
            self.quantization.attach(copy)
        copy.train(self.training)
        return copy


def _op_conv(block: Block, blocks: Blocks) -> nn.Module:
    cin = blocks[block.inputs[0]].channels
    conv = nn.Conv2d(cin, block.channels, block.size, block.stride, block.padding, groups=block.groups, bias=block.bias)
    if block.batch_norm:
        return ConvUnit(conv, nn.BatchNorm2d(block.channels, block.bn_eps, block.bn_momentum), activation(block.activation))
    return _activated(conv, block)  # fused


def _op_batchnorm(block: Block, blocks: Blocks) -> nn.Module:
    return _activated(nn.BatchNorm2d(block.channels, block.bn_eps, block.bn_momentum), block)


def _activated(module: nn.Module, block: Block) -> nn.Module:
    """One module under one name, with the block's activation, which has no tensors, behind it."""
    if block.activation != "linear":
        module.act = activation(block.activation)
        module.register_forward_hook(lambda module, inputs, output: module.act(output))
    return module


def _op_route(block: Block, blocks: Blocks) -> Callable[..., Tensor]:
    if block.slice is not None:
        start, stop = block.slice
        return lambda x: x[:, start:stop]
    return lambda *xs: torch.cat(xs, 1) if len(xs) > 1 else xs[0]


def _op_maxpool(block: Block, blocks: Blocks) -> Callable[..., Tensor]:
    if any(block.pads):  # the edge repeated wins nowhere: every window that reaches it holds the edge itself
        return lambda x: F.max_pool2d(F.pad(x, block.pads, mode="replicate"), block.size, block.stride, block.padding)
    return lambda x: F.max_pool2d(x, block.size, block.stride, block.padding)


def _focus(x: Tensor) -> Tensor:
    return torch.cat((x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]), 1)


_OPS: dict[str, Callable[[Block, Blocks], Callable[..., Tensor]]] = {
    "input": lambda block, blocks: lambda x: x,
    "convolutional": _op_conv,
    "batchnorm": _op_batchnorm,
    "route": _op_route,
    "shortcut": lambda block, blocks: lambda x, *others: sum(others, x),
    "upsample": lambda block, blocks: lambda x: F.interpolate(x, scale_factor=float(block.stride), mode="nearest"),
    "maxpool": _op_maxpool,
    "zeropad": lambda block, blocks: lambda x: F.pad(x, block.pads),
    "focus": lambda block, blocks: _focus,
    "avgpool": lambda block, blocks: lambda x: x.mean((2, 3), keepdim=True),
    "yolo": lambda block, blocks: lambda x: x,
    "softmax": lambda block, blocks: lambda x: x,  # raw logits, like a yolo block: the loss and `decode` take it from there
}


def operation(block: Block, blocks: Blocks) -> Callable[..., Tensor]:
    """What computes `block` from its inputs alone: a module where it owns tensors, otherwise a function; `blocks` say its input's width."""
    return _OPS[block.kind](block, blocks)


def _descend(root: nn.Module, path: str) -> nn.Module:
    for part in path.split(".") if path else ():
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root._modules[part]
    return root


def _register(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, last = path.rpartition(".")
    _descend(root, parent).add_module(last, module)


def init_detect_biases(network: Network) -> None:
    """Set the head's starting biases (YOLOv5): objectness as if 8 objects stood in a 640 px image, classes at 0.6 / (nc - 0.99999)."""
    for i, stride in zip(network.heads, network.strides):
        block = network.blocks[i]
        conv = network.get_submodule(network.blocks[block.inputs[0]].conv_path)
        bias = conv.bias.detach().view(len(block.anchors), -1)
        bias[:, 4] += math.log(8 / (640 / stride) ** 2)
        bias[:, 5:] += math.log(0.6 / (block.classes - 0.99999))


def init_gammas(network: Network, value: float) -> None:
    """Start every gamma at `value`. Below 1 the L1 of sparsity training has less way to go; network slimming (Liu et al. 2017) uses 0.5."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.weight, value)


def synchronise_norms(network: Network) -> None:
    """Let every batch norm take its statistics over all processes of a distributed training (CUDA only), in place."""
    convert = nn.SyncBatchNorm.convert_sync_batchnorm
    for i, (block, op) in enumerate(zip(network.blocks, network._ops)):
        if isinstance(op, ConvUnit):
            op.bn = convert(op.bn)
        elif isinstance(op, nn.BatchNorm2d):
            network._ops[i] = _activated(convert(op), block)
            _register(network, block.name, network._ops[i])


def replace_anchors(blocks: Blocks, anchors: list[list[tuple[float, float]]]) -> Blocks:
    """Return `blocks` with the anchors of every level replaced; `anchors`: per level [(w, h), ...] in pixels."""
    return tuple(replace(b, anchors=tuple((float(w), float(h)) for w, h in anchors[b.level])) if b.kind == "yolo" else b for b in blocks)


def with_placeholder_anchors(blocks: Blocks, count: int) -> Blocks:
    """Return `blocks` with `count` placeholder anchors per level (YOLOv5's 0, 1, 2, ...), for autoanchor to replace, and heads as wide."""
    changed = list(blocks)
    placeholders = tuple((float(2 * k), float(2 * k + 1)) for k in range(count))
    for i in heads(blocks):
        width, (head,) = count * (blocks[i].classes + 5), blocks[i].inputs
        changed[head] = replace(blocks[head], channels=width)
        changed[i] = replace(blocks[i], channels=width, anchors=placeholders)
    return check(changed)


def fuse(network: Network) -> Network:
    """Return a copy for inference with every batch norm folded into its convolution (batch norms over a concat stay)."""
    blocks, state = [], {}
    source = network.state_dict()
    for block in network.blocks:
        if block.kind == "convolutional" and block.batch_norm:
            weight, bias = _folded(source, block)
            block = replace(block, name=f"{block.name}.conv", batch_norm=False, bias=True)
            state |= {f"{block.name}.weight": weight, f"{block.name}.bias": bias}
        blocks.append(block)
    fused = Network(tuple(blocks))
    wanted = fused.state_dict().keys()
    state |= {k: v for k, v in source.items() if k in wanted and k not in state}
    fused.load_state_dict(state)
    fused.to(next(network.parameters()).device)
    if network.quantization is not None:
        network.quantization.attach(fused)
    return fused.eval().requires_grad_(False)


def _folded(state: dict[str, Tensor], block: Block) -> tuple[Tensor, Tensor]:
    weight, bn = state[f"{block.name}.conv.weight"].double(), f"{block.name}.bn"
    scale = state[f"{bn}.weight"].double() / (state[f"{bn}.running_var"].double() + block.bn_eps).sqrt()
    bias = state[f"{bn}.bias"].double() - scale * state[f"{bn}.running_mean"].double()
    return (weight * scale[:, None, None, None]).float(), bias.float()


def summary(blocks: Blocks, height: int = 640, width: int = 640) -> str:
    """The network as a tree of paths with kind, channels, parameters and FLOPs (2 x MACs of convolutions at `height` x `width`)."""
    counts, costs = parameters(blocks), flops(blocks, height, width)
    lines = [f"{'path':<28}{'kind':<15}{'channels':>10}{'params':>12}{'MFLOPs':>12}"]
    shown: list[str] = []
    indent = ""
    for block, n, cost in zip(blocks, counts, costs):
        if block.kind == "input":
            continue
        parts = block.name.split(".") if block.name else []
        groups = parts[:-1] if len(parts) > 2 else []
        for depth in range(2, len(groups) + 1):
            path = ".".join(groups[:depth])
            if path not in shown:
                shown.append(path)
                inside = [i for i, b in enumerate(blocks) if b.name == path or b.name.startswith(path + ".")]
                total, flop = sum(counts[i] for i in inside), sum(costs[i] for i in inside)
                lines.append(f"{'  ' * (depth - 2) + path:<28}{'':<15}{'':>10}{total:>12,}{flop / 1e6:>12,.1f}")
        indent = "  " * max(len(groups) - 1, 0) if block.name else indent
        label = indent + (block.name or f"({block.kind})")
        lines.append(f"{label:<28}{block.kind:<15}{block.channels:>10}{n:>12,}{cost / 1e6:>12,.1f}")
    lines.append(f"{len(blocks) - 1} blocks, {sum(counts):,} parameters, {sum(costs) / 1e9:.3f} GFLOPs at {height}x{width}")
    return "\n".join(lines)
