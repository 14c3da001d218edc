"""YOLOv5's composite modules as functions that append primitive blocks.

Adding a module is adding one function and one row of `MODULES`; training, the cfg format and pruning need nothing else. Each
function takes the graph, the module's YOLOv5 path, its input indices and its (already width-scaled) arguments, and returns the
index of its output. Structures: the published YOLOv5 architecture; C2f: Ultralytics YOLOv8's published architecture; GhostConv
and GhostBottleneck: Han et al., GhostNet (2020).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import gcd

from models.blocks import Block, make
from utils.errors import InputError


@dataclass
class Graph:
    """A block list under construction. `activation` and `csp_activation` are the model's defaults."""

    blocks: list[Block] = field(default_factory=list)
    activation: str = "silu"
    csp_activation: str = "silu"

    def add(self, kind: str, inputs: tuple[int, ...], name: str = "", **fields) -> int:
        """Append a block and return its index."""
        self.blocks.append(make(Block(kind, name, inputs, **fields), self.blocks))
        return len(self.blocks) - 1

    def channels(self, index: int) -> int:
        """Output channels of block `index`."""
        return self.blocks[index].channels


def conv(g: Graph, path: str, x: int, c2: int, k: int = 1, s: int = 1, p: int | None = None, groups: int = 1, act: bool = True) -> int:
    """Convolution without bias, batch norm, activation; padding `k // 2` unless given."""
    if act not in (True, False):  # True is 1: the place holds the activation in old yamls and the dilation in newer ones
        raise InputError(f"{path}: {act!r} after the groups; only 1 (no dilation), True (the model's activation) or False can be held")
    k, s, p = (_square(path, v) for v in (k, s, p))
    return g.add(
        "convolutional", (x,), path, channels=c2, size=k, stride=s, padding=k // 2 if p is None else p, groups=groups,
        activation=g.activation if act else "linear", batch_norm=True,
    )  # fmt: skip


def _square(path: str, value: int | list[int] | None) -> int | None:
    """A kernel, stride or padding that a yaml may write for each axis."""
    if not isinstance(value, list):
        return value
    if len(set(value)) != 1:
        raise InputError(f"{path}: kernel, stride and padding must be equal along both axes, got {value}")
    return value[0]


def depthwise_conv(g: Graph, path: str, x: int, c2: int, k: int = 1, s: int = 1, act: bool = True) -> int:
    """`conv` with as many groups as input and output channels have in common."""
    return conv(g, path, x, c2, k, s, groups=gcd(g.channels(x), c2), act=act)


def bottleneck(g: Graph, path: str, x: int, c2: int, shortcut: bool = True, groups: int = 1, e: float = 0.5, k1: int = 1) -> int:
    """1x1 to `c2 * e` channels, 3x3 to `c2`, plus the input where it fits and `shortcut` is set. (C2f has a 3x3 in front too.)"""
    y = conv(g, f"{path}.cv1", x, int(c2 * e), k1)
    y = conv(g, f"{path}.cv2", y, c2, 3, groups=groups)
    return g.add("shortcut", (y, x)) if shortcut and g.channels(x) == c2 else y


def c3(g: Graph, path: str, x: int, c2: int, n: int = 1, shortcut: bool = True, groups: int = 1, e: float = 0.5) -> int:
    """cv3 over [n bottlenecks over cv1, cv2]."""
    hidden = int(c2 * e)
    return _c3(g, path, x, c2, hidden, n, lambda inner, y: bottleneck(g, inner, y, hidden, shortcut, groups, e=1.0))


def c3_ghost(g: Graph, path: str, x: int, c2: int, n: int = 1, shortcut: bool = True, groups: int = 1, e: float = 0.5) -> int:
    """`c3` with ghost bottlenecks, which always add their input: `shortcut` and `groups` say nothing here."""
    hidden = int(c2 * e)
    return _c3(g, path, x, c2, hidden, n, lambda inner, y: ghost_bottleneck(g, inner, y, hidden))


def _c3(g: Graph, path: str, x: int, c2: int, hidden: int, n: int, step: Callable[[str, int], int]) -> int:
    y = conv(g, f"{path}.cv1", x, hidden)
    for i in range(n):
        y = step(f"{path}.m.{i}", y)
    return conv(g, f"{path}.cv3", g.add("route", (y, conv(g, f"{path}.cv2", x, hidden))), c2)


def bottleneck_csp(g: Graph, path: str, x: int, c2: int, n: int = 1, shortcut: bool = True, groups: int = 1, e: float = 0.5) -> int:
    """cv4 over one batch norm of [bare cv3 over n bottlenecks over cv1, bare cv2]."""
    hidden = int(c2 * e)
    y = conv(g, f"{path}.cv1", x, hidden)
    for i in range(n):
        y = bottleneck(g, f"{path}.m.{i}", y, hidden, shortcut, groups, e=1.0)
    left = g.add("convolutional", (y,), f"{path}.cv3", channels=hidden)
    right = g.add("convolutional", (x,), f"{path}.cv2", channels=hidden)
    y = g.add("batchnorm", (g.add("route", (left, right)),), f"{path}.bn", activation=g.csp_activation)
    return conv(g, f"{path}.cv4", y, c2)


def c2f(g: Graph, path: str, x: int, c2: int, n: int = 1, shortcut: bool = False, groups: int = 1, e: float = 0.5) -> int:
    """cv2 over [both halves of cv1, each of n bottlenecks over the second half]."""
    hidden = int(c2 * e)
    y = conv(g, f"{path}.cv1", x, 2 * hidden)
    parts = [g.add("route", (y,), slice=(0, hidden)), g.add("route", (y,), slice=(hidden, 2 * hidden))]
    for i in range(n):
        parts.append(bottleneck(g, f"{path}.m.{i}", parts[-1], hidden, shortcut, groups, e=1.0, k1=3))
    return conv(g, f"{path}.cv2", g.add("route", tuple(parts)), c2)


def ghost_conv(g: Graph, path: str, x: int, c2: int, k: int = 1, s: int = 1, groups: int = 1, act: bool = True) -> int:
    """Half of the channels by a convolution, the other half from them by a depthwise 5x5."""
    y = conv(g, f"{path}.cv1", x, c2 // 2, k, s, groups=groups, act=act)
    return g.add("route", (y, conv(g, f"{path}.cv2", y, c2 // 2, 5, groups=c2 // 2, act=act)))


def ghost_bottleneck(g: Graph, path: str, x: int, c2: int, k: int = 3, s: int = 1) -> int:
    """Ghost convolutions to `c2 // 2` and, without activation, to `c2`, plus the input; with stride 2 both ways shrink depthwise."""
    hidden = c2 // 2
    y = ghost_conv(g, f"{path}.conv.0", x, hidden)
    if s == 2:
        y = depthwise_conv(g, f"{path}.conv.1", y, hidden, k, s, act=False)
    y = ghost_conv(g, f"{path}.conv.2", y, c2, act=False)
    if s == 2:
        x = depthwise_conv(g, f"{path}.shortcut.0", x, g.channels(x), k, s, act=False)
        x = conv(g, f"{path}.shortcut.1", x, c2, act=False)
    return g.add("shortcut", (y, x))


def spp(g: Graph, path: str, x: int, c2: int, kernels: tuple[int, ...] = (5, 9, 13)) -> int:
    """cv2 over [cv1, its max pools of each kernel]."""
    y = conv(g, f"{path}.cv1", x, g.channels(x) // 2)
    pools = [g.add("maxpool", (y,), size=k, padding=k // 2) for k in kernels]
    return conv(g, f"{path}.cv2", g.add("route", (y, *pools)), c2)


def sppf(g: Graph, path: str, x: int, c2: int, k: int = 5) -> int:
    """cv2 over [cv1, three max pools of kernel k one after another]."""
    parts = [conv(g, f"{path}.cv1", x, g.channels(x) // 2)]
    for _ in range(3):
        parts.append(g.add("maxpool", (parts[-1],), size=k, padding=k // 2))
    return conv(g, f"{path}.cv2", g.add("route", tuple(parts)), c2)


def focus(g: Graph, path: str, x: int, c2: int, k: int = 1, s: int = 1) -> int:
    """Space to depth by two, then a convolution."""
    return conv(g, f"{path}.conv", g.add("focus", (x,)), c2, k, s)


def concat(g: Graph, path: str, inputs: tuple[int, ...], axis: int = 1) -> int:
    """Concatenate along the channels."""
    if axis != 1:
        raise InputError(f"{path}: Concat along axis {axis}; only the channel axis (1) is possible")
    return g.add("route", inputs, path)


def upsample(g: Graph, path: str, x: int, size: None = None, scale: int = 2, mode: str = "nearest") -> int:
    """Nearest-neighbour upsampling by an integer."""
    if size is not None or mode != "nearest" or int(scale) != scale:
        raise InputError(f"{path}: Upsample takes [None, integer scale, 'nearest'], got [{size}, {scale}, {mode!r}]")
    return g.add("upsample", (x,), path, stride=int(scale))


def max_pool(g: Graph, path: str, x: int, k: int, s: int | None = None, p: int = 0) -> int:
    """Max pooling."""
    return g.add("maxpool", (x,), path, size=k, stride=k if s is None else s, padding=p)


def zero_pad(g: Graph, path: str, x: int, pads: int | list[int]) -> int:
    """Zeros around the map: `pads` on every side, or [left, right, above, below]."""
    sides = (pads,) * 4 if isinstance(pads, int) else tuple(pads)
    if len(sides) != 4 or any(not isinstance(v, int) or v < 0 for v in sides):
        raise InputError(f"{path}: ZeroPad2d takes a whole number or [left, right, above, below], got {pads!r}")
    return g.add("zeropad", (x,), path, pads=sides)


def batch_norm(g: Graph, path: str, x: int, features: int | None = None) -> int:
    """A batch norm of its own. It has its input's channels, whatever `features` says."""
    return g.add("batchnorm", (x,), path)


def detect(g: Graph, path: str, inputs: tuple[int, ...], nc: int, anchors: list[list[float]]) -> int:
    """One 1x1 convolution with bias and one `yolo` block per level. `anchors`: per level [w, h, w, h, ...] in pixels."""
    if len(anchors) != len(inputs):
        raise InputError(f"{path}: Detect has {len(inputs)} inputs but anchors for {len(anchors)} levels")
    for level, (x, flat) in enumerate(zip(inputs, anchors)):
        pairs = tuple((float(w), float(h)) for w, h in zip(flat[::2], flat[1::2]))
        y = g.add("convolutional", (x,), f"{path}.m.{level}", channels=len(pairs) * (nc + 5), bias=True)
        g.add("yolo", (y,), path, level=level, anchors=pairs, classes=nc)
    return len(g.blocks) - 1


def global_pool(g: Graph, path: str, x: int, size: int = 1) -> int:
    """The mean of each channel over the whole map."""
    if size != 1:
        raise InputError(f"{path}: AdaptiveAvgPool2d to {size}; only to 1, the mean of the whole map, is possible")
    return g.add("avgpool", (x,), path)


def classify(g: Graph, path: str, x: int, nc: int) -> int:
    """A linear layer to `nc` logits over a pooled map, (B, c, 1, 1): a 1x1 convolution with bias, which is the same thing."""
    y = g.add("convolutional", (x,), f"{path}.linear", channels=nc, bias=True)
    return g.add("softmax", (y,), path, classes=nc)


@dataclass(frozen=True)
class Module:
    """How a yaml row uses a builder: `scaled` output channels come first in its arguments; `inner` repeats are its second
    argument; `several` modules take a list of inputs."""

    build: Callable[..., int]
    scaled: bool = True
    inner: bool = False
    several: bool = False


MODULES: dict[str, Module] = {
    "Conv": Module(conv),
    "DWConv": Module(depthwise_conv),
    "GhostConv": Module(ghost_conv),
    "GhostBottleneck": Module(ghost_bottleneck),
    "Bottleneck": Module(bottleneck),
    "C3": Module(c3, inner=True),
    "C3Ghost": Module(c3_ghost, inner=True),
    "C2f": Module(c2f, inner=True),
    "BottleneckCSP": Module(bottleneck_csp, inner=True),
    "SPP": Module(spp),
    "SPPF": Module(sppf),
    "Focus": Module(focus),
    "Concat": Module(concat, scaled=False, several=True),
    "Upsample": Module(upsample, scaled=False),
    "MaxPool2d": Module(max_pool, scaled=False),
    "ZeroPad2d": Module(zero_pad, scaled=False),
    "BatchNorm2d": Module(batch_norm, scaled=False),
    "AdaptiveAvgPool2d": Module(global_pool, scaled=False),
    "Classify": Module(classify, scaled=False),
    "Detect": Module(detect, scaled=False, several=True),
}

# What a block cannot hold: the weights of attention depend on the image.
ATTENTION = frozenset({"C3TR", "TransformerBlock", "TransformerLayer", "MultiheadAttention"})
