"""The block list: a detector, or a classifier, as a flat tuple of primitive blocks.

A YOLOv5 yaml and a Darknet cfg are two spellings of the same `tuple[Block, ...]`; training, evaluation, pruning and export see
nothing else. Block 0 is always the image (`kind="input"`); `inputs` are absolute indices of earlier blocks. "The previous
layer" and relative offsets exist only in the readers and writers. A detector ends in one `yolo` block per level, a classifier in
one `softmax` block.

Worked example, the stem of YOLOv5n followed by a stride-2 convolution::

    (Block("input", channels=3),
     Block("convolutional", "model.0", (0,), channels=16, size=6, stride=2, padding=2, activation="silu", batch_norm=True),
     Block("convolutional", "model.1", (1,), channels=32, size=3, stride=2, padding=1, activation="silu", batch_norm=True))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import lcm

from utils.errors import InputError

ACTIVATIONS = ("linear", "silu", "leaky", "hardswish", "relu", "mish", "logistic")
YOLO_BN_EPS, YOLO_BN_MOMENTUM = 1e-3, 0.03

Blocks = tuple["Block", ...]


@dataclass(frozen=True)
class Block:
    """One primitive operation.

    `name` is the module's YOLOv5 path, under which its tensors stand in a state dict: a convolution with `batch_norm` owns
    `{name}.conv.weight` and `{name}.bn.*`, a bare one `{name}.weight` (and `.bias`), a `yolo` block its level of `{name}.anchors`.
    Blocks without tensors may carry a name too (for reports). `channels` is the number of output channels.
    """

    kind: str
    name: str = ""
    inputs: tuple[int, ...] = ()
    channels: int = 0
    size: int = 1
    stride: int = 1
    padding: int = 0
    groups: int = 1
    activation: str = "linear"
    batch_norm: bool = False
    bias: bool = False
    bn_eps: float = YOLO_BN_EPS
    bn_momentum: float = YOLO_BN_MOMENTUM
    slice: tuple[int, int] | None = None  # route with one input: the channels [start, stop)
    pads: tuple[int, int, int, int] = (
        0,
        0,
        0,
        0,
    )  # left, right, above, below: zeros of a zeropad; of a maxpool what never wins, beside `padding`
    level: int = 0  # yolo: index into Detect's level order
    anchors: tuple[tuple[float, float], ...] = ()  # yolo: this level's anchors (width, height) in pixels
    classes: int = 0  # yolo, softmax
    scale_x_y: float = 2.0  # yolo: in its cell, a centre is at scale * sigmoid - (scale - 1) / 2
    exp: bool = False  # yolo: a side is e^t x its anchor; otherwise (2 sigmoid)^2 x its anchor, as in YOLOv5

    @property
    def has_gamma(self) -> bool:
        """Whether a batch norm with learnable scale belongs to this block."""
        return self.kind == "batchnorm" or (self.kind == "convolutional" and self.batch_norm)

    @property
    def bn_path(self) -> str:
        """Module path of this block's batch norm."""
        return self.name if self.kind == "batchnorm" else f"{self.name}.bn"

    @property
    def conv_path(self) -> str:
        """Module path of this block's convolution."""
        return f"{self.name}.conv" if self.batch_norm else self.name


def _same(block: Block, channels: list[int]) -> int:
    return channels[0]


def _route(block: Block, channels: list[int]) -> int:
    if block.slice is None:
        return sum(channels)
    start, stop = block.slice
    if len(channels) != 1 or not 0 <= start < stop <= channels[0]:
        raise InputError(f"block {block.name or 'route'}: slice {start}:{stop} does not fit its input of {channels} channels")
    return stop - start


def _shortcut(block: Block, channels: list[int]) -> int:
    if len(set(channels)) != 1:
        raise InputError(f"block {block.name or 'shortcut'}: adds inputs of {channels} channels; they must be equal")
    return channels[0]


def _convolutional(block: Block, channels: list[int]) -> int:
    if channels[0] % block.groups or block.channels % block.groups:
        raise InputError(f"block {block.name}: groups={block.groups} divides neither {channels[0]} nor {block.channels} channels")
    return block.channels


def _yolo(block: Block, channels: list[int]) -> int:
    wanted = len(block.anchors) * (block.classes + 5)
    if channels[0] != wanted:
        raise InputError(
            f"block {block.name} level {block.level}: its input has {channels[0]} channels, but {len(block.anchors)} anchors x "
            f"({block.classes} classes + 5) need filters={wanted} in the convolution before it"
        )
    return channels[0]


def _softmax(block: Block, channels: list[int]) -> int:
    if channels[0] != block.classes:
        raise InputError(
            f"block {block.name or 'softmax'}: its input has {channels[0]} channels, but {block.classes} classes need "
            f"filters={block.classes} in the convolution before it"
        )
    return channels[0]


def _downscaled(block: Block, scale: Fraction) -> Fraction:
    return scale * block.stride


POINT = Fraction(0)  # the reduction of a map that is one cell whatever the image: what a global pool gives


@dataclass(frozen=True)
class Kind:
    """The rules of one kind of block.

    `channels(block, input channels) -> output channels` checks as it computes; `scale(block, input reduction)` gives the
    reduction of resolution against the image; `inputs` is the number of inputs (`None`: one or more).
    """

    channels: Callable[[Block, list[int]], int]
    scale: Callable[[Block, Fraction], Fraction] = lambda block, scale: scale
    inputs: int | None = 1


KINDS: dict[str, Kind] = {
    "input": Kind(lambda block, channels: block.channels, inputs=0),
    "convolutional": Kind(_convolutional, _downscaled),
    "batchnorm": Kind(_same),
    "route": Kind(_route, inputs=None),
    "shortcut": Kind(_shortcut, inputs=None),
    "upsample": Kind(_same, lambda block, scale: scale / block.stride),
    "maxpool": Kind(_same, _downscaled),
    "zeropad": Kind(_same),
    "focus": Kind(lambda block, channels: 4 * channels[0], lambda block, scale: scale * 2),
    "avgpool": Kind(_same, lambda block, scale: POINT),
    "yolo": Kind(_yolo),
    "softmax": Kind(_softmax),
}
OUTPUTS = frozenset({"yolo", "softmax"})


def image_block(channels: object, where: str) -> Block:
    """The input block for images of `channels` channels: 3 (colour) or 1 (grey); `where` names the file and the key in the error."""
    if isinstance(channels, bool) or channels not in (1, 3):
        raise InputError(f"{where}={channels}: the images that are read have 3 channels (colour) or 1 (grey)")
    return Block("input", channels=int(channels))


def check(blocks: Sequence[Block]) -> Blocks:
    """Return `blocks` as a tuple after checking every rule that makes it a model; raise `InputError` naming the block.

    Checked: kinds, activations, that inputs point backwards, channel counts (each block's `channels` is what its kind's rule
    gives), that the inputs of a concat or shortcut have one resolution, unique names of blocks that own tensors.
    """
    if not blocks or blocks[0].kind != "input":
        raise InputError("a model must begin with its input block")
    owners: set[str] = set()
    scales: list[Fraction] = []
    for index, block in enumerate(blocks):
        _check_one(blocks, index, block)
        scales.append(_scale_of(block, scales))
        if block.kind in ("convolutional", "batchnorm"):
            if not block.name or block.name in owners:
                raise InputError(
                    f"block {index} ({block.kind}): name={block.name or '(none)'} is {'used twice' if block.name else 'missing'}"
                )
            owners.add(block.name)
    _check_outputs(blocks)
    _check_sizes(tuple(blocks))
    return tuple(blocks)


def _check_outputs(blocks: Sequence[Block]) -> None:
    levels = [block.level for block in blocks if block.kind == "yolo"]
    classifiers = [i for i, block in enumerate(blocks) if block.kind == "softmax"]
    if classifiers and (levels or len(classifiers) > 1):
        raise InputError("a model either detects (yolo blocks) or classifies (one softmax block)")
    if classifiers and reductions(tuple(blocks))[classifiers[0]] != POINT:
        raise InputError(f"block {blocks[classifiers[0]].name or 'softmax'}: classes are scored once per image; pool before it (avgpool)")
    if classifiers:
        return
    if not levels:
        raise InputError(
            "the model has no detection level and is no classifier: a yaml ends with Detect or Classify, a cfg has [yolo] sections or one [softmax]"
        )
    if len({len(block.anchors) for block in blocks if block.kind == "yolo"}) > 1:
        raise InputError("the detection levels have different numbers of anchors; give each level as many")
    if sorted(levels) != list(range(len(levels))):
        raise InputError(f"yolo blocks carry the levels {levels}; each of 0..{len(levels) - 1} is needed once")


def _check_one(blocks: Sequence[Block], index: int, block: Block) -> None:
    where = f"block {index} ({block.name or block.kind})"
    kind = KINDS.get(block.kind)
    if kind is None:
        raise InputError(f"{where}: unknown kind {block.kind!r}; known: {', '.join(KINDS)}")
    if block.activation not in ACTIVATIONS:
        raise InputError(f"{where}: unknown activation {block.activation!r}; known: {', '.join(ACTIVATIONS)}")
    if (kind.inputs is None and not block.inputs) or (kind.inputs is not None and len(block.inputs) != kind.inputs):
        raise InputError(f"{where}: a {block.kind} takes {kind.inputs or 'one or more'} inputs, got {len(block.inputs)}")
    if any(not 0 <= i < index for i in block.inputs):
        raise InputError(f"{where}: inputs {block.inputs} must be earlier blocks")
    if block.size < 1 or block.stride < 1 or block.padding < 0 or block.groups < 1:
        raise InputError(f"{where}: size, stride and groups must be at least 1 and padding at least 0")
    if min(block.pads) < 0 or (any(block.pads) and block.kind not in ("zeropad", "maxpool")):
        raise InputError(f"{where}: pads {block.pads} belong to a zeropad or maxpool and must be at least 0")
    if block.kind == "maxpool" and any(block.pads) and block.padding + max(block.pads) >= block.size:
        raise InputError(f"{where}: a pool of size {block.size} cannot be padded by {block.padding} and {block.pads}")
    if not 0 < block.scale_x_y < 100:
        raise InputError(f"{where}: scale_x_y={block.scale_x_y} must be positive")
    got = kind.channels(block, [blocks[i].channels for i in block.inputs])
    if got != block.channels or got < 1:
        raise InputError(f"{where}: has channels={block.channels}, its inputs give {got}")


def _scale_of(block: Block, scales: list[Fraction]) -> Fraction:
    if block.kind == "input":
        return Fraction(1)
    inputs = {scales[i] for i in block.inputs}
    if len(inputs) != 1:
        raise InputError(f"block {block.name or block.kind}: its inputs have different resolutions (strides {sorted(map(str, inputs))})")
    return KINDS[block.kind].scale(block, inputs.pop())


def _check_sizes(blocks: Blocks) -> None:
    """Inputs of equal stride may still differ by a border that a pool or convolution without padding took away."""
    multiple = image_multiple(blocks)
    side = multiple * max(4, 256 // multiple)
    sizes = resolutions(blocks, side, side)
    for block in blocks:
        got = sorted({sizes[i] for i in block.inputs})
        if len(got) > 1:
            shown = " and ".join(f"{h}x{w}" for h, w in got)
            raise InputError(
                f"block {block.name or block.kind}: its inputs have different resolutions ({shown} for an image of {side}x{side})"
            )


def make(block: Block, blocks: Sequence[Block]) -> Block:
    """Return `block` with `channels` filled in from its inputs, for kinds whose channels follow from them."""
    if block.kind in ("input", "convolutional"):
        return block
    return replace(block, channels=KINDS[block.kind].channels(block, [blocks[i].channels for i in block.inputs]))


def reductions(blocks: Blocks) -> list[Fraction]:
    """Each block's reduction of resolution against the image (8 means one cell per 8 x 8 pixels)."""
    scales: list[Fraction] = []
    for block in blocks:
        scales.append(_scale_of(block, scales))
    return scales


def heads(blocks: Blocks) -> list[int]:
    """Indices of the output blocks: the `yolo` blocks in Detect's level order, or the one `softmax` block."""
    return sorted((i for i, block in enumerate(blocks) if block.kind in OUTPUTS), key=lambda i: blocks[i].level)


def is_classifier(blocks: Sequence[Block]) -> bool:
    """Whether the model scores whole images (`softmax`), rather than detecting (`yolo`)."""
    return any(block.kind == "softmax" for block in blocks)


def strides(blocks: Blocks) -> tuple[int, ...]:
    """Stride in pixels of each detection level, in Detect's order; of a classifier none."""
    scales = reductions(blocks)
    return tuple(int(scales[i]) for i in heads(blocks) if blocks[i].kind == "yolo")


def image_multiple(blocks: Blocks) -> int:
    """What the sides of an image must be multiples of, so that every map has whole cells: the deepest reduction, be it a head's or not."""
    return lcm(*(scale.numerator for scale in reductions(blocks) if scale != POINT))


def consumers(blocks: Blocks) -> list[list[int]]:
    """For each block, the indices of the blocks that read it."""
    readers: list[list[int]] = [[] for _ in blocks]
    for index, block in enumerate(blocks):
        for i in block.inputs:
            readers[i].append(index)
    return readers


def resolutions(blocks: Blocks, height: int, width: int) -> list[tuple[int, int]]:
    """Output (height, width) of every block for an image of that size."""
    sizes: list[tuple[int, int]] = []
    for block in blocks:
        if block.kind == "input":
            sizes.append((height, width))
            continue
        h, w = sizes[block.inputs[0]]
        left, right, above, below = block.pads
        h, w = h + above + below, w + left + right
        if block.kind in ("convolutional", "maxpool"):
            h, w = ((side + 2 * block.padding - block.size) // block.stride + 1 for side in (h, w))
        elif block.kind == "upsample":
            h, w = h * block.stride, w * block.stride
        elif block.kind == "focus":
            h, w = h // 2, w // 2
        elif block.kind == "avgpool":
            h, w = 1, 1
        sizes.append((h, w))
    return sizes


def flops(blocks: Blocks, height: int = 640, width: int = 640) -> list[int]:
    """FLOPs of each block for one image: 2 x multiply-accumulates of the convolutions (the figure that budgets use), 0 elsewhere."""
    sizes = resolutions(blocks, height, width)
    counts = []
    for block, (h, w) in zip(blocks, sizes):
        if block.kind != "convolutional":
            counts.append(0)
            continue
        cin = blocks[block.inputs[0]].channels // block.groups
        counts.append(2 * h * w * block.channels * cin * block.size**2)
    return counts


def parameters(blocks: Blocks) -> list[int]:
    """Learnable parameters of each block (convolution weights and biases, gamma and beta)."""
    counts = []
    for block in blocks:
        n = 0
        if block.kind == "convolutional":
            n += block.channels * (blocks[block.inputs[0]].channels // block.groups) * block.size**2 + block.channels * block.bias
        if block.has_gamma:
            n += 2 * block.channels
        counts.append(n)
    return counts
