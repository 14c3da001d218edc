"""Whether a model has an exact form as a plain Darknet cfg, the one that Darknet itself and OpenCV read. (Writing it is not done here.)

Most of what Darknet does not have can be rewritten without changing a value, and the rules below count on these rewrites:

- `silu` is Darknet's `swish`, a convolution without bias has the bias 0, an epsilon of any size goes into gamma, any `padding` can be
  written, the sigmoid of YOLOv5's decoding is `activation=logistic` in the convolution before `[yolo]`.
- A `focus` goes into each convolution that reads it: size, stride and padding twice as large, on the focus's own input.
- A `batchnorm` of its own is a depthwise 1x1 convolution with weight one and that batch norm; over a concat of bare convolutions it can be
  shared out among them.
- A `zeropad` is a depthwise convolution with a single one in its kernel: P = the largest of its pads, size 2P + 1 - (left + right),
  padding P, the one at row P - above and column P - left. (Darknet's own pools are padded by what never wins, so they cannot hold it.)
- A `shortcut` of several inputs is a chain; a slice of a `route` is one of `groups` equal parts.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from models.blocks import Block, Blocks, consumers
from models.checkpoint import Model

Readers = list[list[int]]


def darknet_obstacles(blocks: Blocks) -> list[str]:
    """What stands in the way of an exact Darknet cfg: a line per block, naming it and the reason. Empty: there is one."""
    readers = consumers(blocks)
    found = []
    for index, block in enumerate(blocks):
        reason = _activation(block) or _RULES.get(block.kind, _none)(blocks, readers, index)
        if reason:
            found.append(f"block {index} ({block.name or block.kind}): {reason}")
    return found


def _activation(block: Block) -> str | None:
    return "Darknet has no Hardswish" if block.activation == "hardswish" else None


def _none(blocks: Blocks, readers: Readers, index: int) -> None:
    return None


def _input(blocks: Blocks, readers: Readers, index: int) -> str | None:
    through_focus = [r for i in readers[index] for r in (readers[i] if blocks[i].kind == "focus" else [i])]
    return f"{len(through_focus)} blocks read the image; only the first section of a cfg can" if len(through_focus) > 1 else None


def _focus(blocks: Blocks, readers: Readers, index: int) -> str | None:
    if all(blocks[r].kind == "convolutional" and blocks[r].groups == 1 for r in readers[index]):
        return None
    return "a focus read by anything but ungrouped convolutions cannot go into them"


def _zeropad(blocks: Blocks, readers: Readers, index: int) -> str | None:
    left, right, above, below = blocks[index].pads
    if left + right == above + below:
        return None
    return f"zeros widen the map by {left + right} and heighten it by {above + below}; Darknet's square kernels widen both alike"


def _route(blocks: Blocks, readers: Readers, index: int) -> str | None:
    block = blocks[index]
    if block.slice is None:
        return None
    (start, stop), width = block.slice, blocks[block.inputs[0]].channels
    if width % (stop - start) or start % (stop - start):
        return f"channels {start}:{stop} of {width} are not one of several equal parts"
    return None


def _yolo(blocks: Blocks, readers: Readers, index: int) -> str | None:
    source = blocks[index].inputs[0]
    if blocks[source].kind != "convolutional" or blocks[source].activation != "linear" or len(readers[source]) > 1:
        return "its logits do not come from a linear convolution of its own, which could take the sigmoid in"
    return None


_RULES: dict[str, Callable[[Blocks, Readers, int], str | None]] = {
    "input": _input,
    "focus": _focus,
    "zeropad": _zeropad,
    "route": _route,
    "yolo": _yolo,
}


def write_pair(model: Model, cfg: Path, height: int, width: int) -> Path:
    """Write `cfg`, the `.weights` and the `.names` beside it for images of `height` x `width`; return the path of the weights.

    Raise `InputError` naming the block for what has no exact Darknet form.
    """
    raise NotImplementedError
