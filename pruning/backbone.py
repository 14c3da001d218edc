"""The backbone of a detector: which blocks it is, the plan that prunes it alone, and the graft that puts another one in its place.

A backbone is the layers before the first spatial pyramid (SPP, SPPF), or, of a classifier, before the pooling: layers 0-8 of YOLOv5 v6 P5, as in
the NNI-based repository before us. Its tensors have the same names in a classifier and in a detector.
"""

from __future__ import annotations

from models.blocks import Block, Blocks, check, make
from models.network import Network
from pruning.plan import LayerPlan, Quota
from utils.errors import InputError, did_you_mean

METHODS = {"L1": "l1", "L2": "l2", "FPGM": "fpgm"}  # NNI's names -> criteria


def backbone_end(blocks: Blocks, layers: int | None = None, source: str = "the model") -> int:
    """Index of the first block behind the backbone. `layers`: how many layers it has; None: those before the pyramid or the pooling.

    Raises `InputError` where there is no such place.
    """
    last = _own_layers(blocks) if layers is None else layers
    numbers = [_layer(block) for block in blocks]
    end = next((i for i, number in enumerate(numbers) if number is not None and number >= last), None)
    if not last or end is None or not any(b.has_gamma for b in blocks[:end]):
        raise InputError(
            f"{source}: no backbone of {last} layers is in it; say with --backbone-layers how many of its first layers are the backbone"
        )
    return end


def _layer(block: Block) -> int | None:
    parts = block.name.split(".")
    return int(parts[1]) if len(parts) > 1 and parts[0] == "model" and parts[1].isdigit() else None


def _own_layers(blocks: Blocks) -> int:
    """Layers before the first pyramid (a pool of stride 1) or global pooling; 0 where there is neither."""
    for index, block in enumerate(blocks):
        if block.kind == "avgpool" or (block.kind == "maxpool" and block.stride == 1):
            named = [n for b in blocks[: index + 1] if (n := _layer(b)) is not None]
            return named[-1] if block.name or block.kind == "maxpool" else named[-1] + 1
    return 0


def neck_entries(blocks: Blocks, end: int) -> list[str]:
    """Names of the convolutions behind block `end` that read the backbone's channels, directly or in a concat."""
    reads = [index < end for index in range(len(blocks))]  # whether a block's output holds channels of the backbone
    found = []
    for index, block in enumerate(blocks[end:], start=end):
        if any(reads[i] for i in block.inputs):
            if block.kind == "convolutional":
                found.append(block.name)
            else:
                reads[index] = True
    return found


def backbone_plan(blocks: Blocks, end: int, sparsity: float) -> LayerPlan:
    """A share of the channels of each convolution before block `end`; all others stay whole."""
    layers = [i for i, b in enumerate(blocks[:end]) if b.has_gamma]
    return LayerPlan((Quota(sparsity, entry=1),), dict.fromkeys(layers, 0))


def graft(detector: Blocks, end: int, backbone: Blocks, backbone_stop: int, what: str) -> Blocks:
    """`detector` with its blocks before `end` replaced by those of `backbone` before `backbone_stop`; widths behind them follow.

    The two must be wired alike; widths, activations and batch norm constants are the backbone's. `what` begins the error that names
    the first block that differs.
    """
    old, new = detector[:end], backbone[:backbone_stop]
    for a, b in zip(old, new):
        if (a.kind, a.name, a.inputs, a.size, a.stride, a.padding, a.pads) != (
            b.kind,
            b.name,
            b.inputs,
            b.size,
            b.stride,
            b.padding,
            b.pads,
        ):
            raise InputError(f"{what}: they are built differently: {_shown(b)} in the backbone, {_shown(a)} in the detector")
    if len(old) != len(new):
        at = _shown((*old, *new)[-1] if len(old) > len(new) else new[len(old)])
        raise InputError(f"{what}: the backbone has {len(new)} blocks, that of the detector {len(old)} (the difference begins at {at})")
    if new[0].channels != old[0].channels:
        raise InputError(f"{what}: the backbone reads images of {new[0].channels} channels, the detector of {old[0].channels}")
    grafted: list[Block] = list(new)
    for block in detector[end:]:
        grafted.append(make(block, grafted))
    try:
        return check(grafted)
    except InputError as error:
        raise InputError(f"{what}: {error}") from None


def _shown(block: Block) -> str:
    return f"{block.name or block.kind} ({block.kind} {block.size}x{block.size}/{block.stride})"


def wider_or_narrower(detector: Blocks, grafted: Blocks, end: int) -> str:
    """The first block before `end` whose width the graft changed, with both widths; empty: none."""
    changed = [(a, b) for a, b in zip(detector[:end], grafted[:end]) if a.channels != b.channels]
    return f"{changed[0][0].name} has {changed[0][1].channels} channels there and {changed[0][0].channels} here" if changed else ""


def method_criterion(method: str) -> str:
    """The criterion of one of NNI's names, in any case."""
    if method.upper() not in METHODS:
        raise InputError(f"--method {method}: choose one of {', '.join(METHODS)}{did_you_mean(method, METHODS)}")
    return METHODS[method.upper()]


def grafted_state(network: Network, detector: dict, backbone: dict, end: int) -> dict:
    """Tensors of the grafted `network`: the backbone's before block `end`, the detector's behind it."""
    inside = {b.name for b in network.blocks[:end] if b.name}
    return {k: backbone[k] if any(k.startswith(name + ".") for name in inside) else detector[k] for k in network.state_dict()}
