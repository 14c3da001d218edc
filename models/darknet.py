"""Plain Darknet: which models have an exact form as a cfg that Darknet itself and OpenCV read, and writing that cfg and its `.weights`.

Most of what Darknet does not have is rewritten without changing a value:

- `silu` is Darknet's `swish`, a convolution without bias has the bias 0, an epsilon of any size goes into the numbers (see
  `models/darknet_weights.py`), any `padding` can be written, the sigmoid of YOLOv5's decoding is `activation=logistic` in the convolution before
  `[yolo]`, the rest of it `new_coords=1` and `scale_x_y=2.0`.
- A `focus` goes into each convolution that reads it: size, stride and padding twice as large, on the focus's own input.
- A `batchnorm` over a concat of bare convolutions is shared out among them; any other is a depthwise 1x1 convolution with weight one.
- A `zeropad` is a depthwise convolution with a single one in its kernel: P = the largest of its pads, size 2P + 1 - (left + right),
  padding P, the one at row P - above and column P - left. (Darknet's own pools are padded by what never wins, so they cannot hold it.)
- An `avgpool` over the whole map and a `softmax` are Darknet's own; there the softmax is taken, here the logits are the output.
- A `shortcut` of several inputs is a chain; a slice of a `route` is one of `groups` equal parts.

What OpenCV 4.14 makes of `[yolo]`, found by experiment (tests/test_darknet.py holds it): one output per section, of the rows (y, x, anchor), y
slowest, each of the anchors of `mask` in turn; columns: centre and size as fractions of the image, objectness, then objectness x probability of each
class. Sizes are measured against the image that was set, whatever `width` and `height` say. A class score of at most `thresh` becomes 0, and
`thresh` is 0.2 if it is not written; objectness is never cut. `nms_threshold`, 0 if not written, sets the scores of suppressed boxes to 0. Without
`new_coords` x, y, objectness and classes get a sigmoid and the sides e^t; with it nothing gets one, and a side is (2v)^2. Both are computed with
`scale_x_y`, 1 if not written. Keys it does not know are passed over.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from models.blocks import Block, Blocks, consumers, heads
from models.checkpoint import Model
from models.darknet_weights import Convolution, Norm, weights_bytes
from utils.errors import InputError
from utils.files import make_folder, write_files

MARK = "# An export for other programs, in plain Darknet"  # the first line, which readers pass over
Readers = list[list[int]]


# ---- what has a form -----------------------------------------------------------------------------------------------------------


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
    if len(through_focus) > 1:
        return f"{len(through_focus)} blocks read the image; only the first section of a cfg can"
    if any(blocks[i].kind in ("route", "shortcut") for i in readers[index]):
        return "a route or shortcut reads the image, which has no section that it could name"
    return None


def _focus(blocks: Blocks, readers: Readers, index: int) -> str | None:
    if all(blocks[r].kind == "convolutional" and blocks[r].groups == 1 for r in readers[index]):
        return None
    return "a focus read by anything but ungrouped convolutions cannot go into them"


def _zeropad(blocks: Blocks, readers: Readers, index: int) -> str | None:
    left, right, above, below = blocks[index].pads
    if left + right == above + below:
        return None
    return f"zeros widen the map by {left + right} and heighten it by {above + below}; Darknet's square kernels widen both alike"


def _maxpool(blocks: Blocks, readers: Readers, index: int) -> str | None:
    left, right, above, below = blocks[index].pads
    if (left, right) == (above, below) and left == (left + right) // 2:
        return None
    return f"pads {blocks[index].pads}; Darknet pads both axes alike, and the odd one on the right and below"


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
    "maxpool": _maxpool,
    "route": _route,
    "yolo": _yolo,
}


# ---- writing -------------------------------------------------------------------------------------------------------------------


def write_pair(model: Model, cfg: Path, height: int, width: int) -> Path:
    """Write the Darknet cfg `cfg`, and beside it the `.weights` and the `.names`, for images of `height` x `width`; return the weights' path.

    Each file is written whole before any takes its place. Raise `InputError` naming each block that has no exact Darknet form.
    """
    cfg = Path(cfg)
    files = pair_files(model, height, width, str(cfg))
    make_folder(cfg.parent)
    write_files({cfg.with_suffix(suffix): content for suffix, content in files.items()})
    return cfg.with_suffix(".weights")


def pair_files(model: Model, height: int, width: int, what: str) -> dict[str, bytes]:
    """What `write_pair` writes: the files' content by their suffix. `what` begins the `InputError` about blocks without a form."""
    obstacles = darknet_obstacles(model.blocks)
    if obstacles:
        more = f"; and {len(obstacles) - 4} more blocks" if len(obstacles) > 4 else ""
        raise InputError(f"{what}: no exact Darknet cfg can be written: {'; '.join(obstacles[:4])}{more}")
    text, convolutions = darknet_form(model.blocks, model.state, height, width)
    names = "".join(f"{name}\n" for name in model.names)
    return {".cfg": f"{MARK}\n{text}".encode(), ".names": names.encode(), ".weights": weights_bytes(convolutions)}


def pair_path(weights: Path) -> Path:
    """Which cfg an export of the checkpoint X.pt may write: X.cfg, or X_darknet.cfg where X.cfg, X.names or X.weights are not an earlier
    export's: such as the cfg of a pruned pair X.cfg + X.pt."""
    cfg = weights.with_suffix(".cfg")
    taken = any(cfg.with_suffix(suffix).exists() for suffix in (".cfg", ".names", ".weights")) and not _is_export(cfg)
    if not taken and weights.suffix != ".weights":
        return cfg
    apart = cfg.with_name(f"{weights.stem}_darknet.cfg")
    if apart.exists() and not _is_export(apart):
        raise InputError(f"{apart}: is there and was not written by an export; move it away")
    return apart


def _is_export(cfg: Path) -> bool:
    with suppress(OSError), open(cfg, "rb") as file:
        return file.read(len(MARK)) == MARK.encode()
    return False


def darknet_form(blocks: Blocks, state: dict[str, Tensor], height: int, width: int) -> tuple[str, list[Convolution]]:
    """The text of the cfg and its convolutions in the order of their sections. `blocks` have no `darknet_obstacles`."""
    writer = _Writer(blocks, state, consumers(blocks))
    for index in range(1, len(blocks)):
        _WRITERS[blocks[index].kind](writer, index)
    norms = [(b.bn_eps, b.bn_momentum) for b in blocks if b.has_gamma]
    # The least epsilon: what `read_weights` takes off each variance must not exceed what was added.
    keys = {"batch": 1, "subdivisions": 1, "width": width, "height": height, "channels": blocks[0].channels}
    keys |= dict(zip(("bn_eps", "bn_momentum"), min(norms))) if norms else {}
    return "\n\n".join([_section("net", keys), *writer.sections]) + "\n", writer.convolutions


def _section(kind: str, keys: dict[str, object]) -> str:
    return "\n".join([f"[{kind}]", *(f"{k}={v}" for k, v in keys.items())])


@dataclass
class _Writer:
    """Sections and convolutions written so far, and which section holds the output of each block (-1: the image)."""

    blocks: Blocks
    state: dict[str, Tensor]
    readers: Readers
    sections: list[str] = field(default_factory=list)
    convolutions: list[Convolution] = field(default_factory=list)
    place: dict[int, int] = field(default_factory=lambda: {0: -1})

    def emit(self, kind: str, keys: dict[str, object]) -> int:
        self.sections.append(_section(kind, keys))
        return len(self.sections) - 1

    def offset(self, block: int) -> int:
        return self.place[block] - len(self.sections)

    def bring(self, block: int) -> None:
        """Make the section above the next one hold `block`'s output."""
        if self.place[block] != len(self.sections) - 1:
            self.emit("route", {"layers": self.offset(block)})

    def convolution(self, block: Block, conv: Convolution, source: int) -> int:
        """A [convolutional] section that reads the block `source`."""
        self.bring(source)
        self.convolutions.append(conv)
        keys: dict[str, object] = {"batch_normalize": 1} if conv.norm else {}
        keys |= {"filters": block.channels, "size": block.size, "stride": block.stride, "pad": 0, "padding": block.padding}
        if block.groups != 1:
            keys["groups"] = block.groups
        return self.emit("convolutional", keys | {"activation": "swish" if block.activation == "silu" else block.activation})


def _write_conv(writer: _Writer, index: int) -> None:
    block, source = writer.blocks[index], writer.blocks[index].inputs[0]
    weight = writer.state[f"{block.conv_path}.weight"]
    bias = writer.state[f"{block.conv_path}.bias"] if block.bias else torch.zeros(block.channels)
    norm = None
    if block.batch_norm:
        norm, beta = _norm(writer.state, block)
        norm, bias = replace(norm, mean=norm.mean - bias), beta
    elif (found := _norm_behind(writer, index)) is not None:
        behind, start = found
        whole, beta = _norm(writer.state, behind)
        part = slice(start, start + block.channels)
        norm, bias = Norm(whole.gamma[part], whole.mean[part] - bias, whole.var[part], whole.eps), beta[part]
        block = replace(block, activation=behind.activation)
    readers = [writer.blocks[r] for r in writer.readers[index]]
    if any(r.kind == "yolo" and not r.exp for r in readers):
        block = replace(block, activation="logistic")
    if writer.blocks[source].kind == "focus":
        weight, source = _without_focus(weight), writer.blocks[source].inputs[0]
        block = replace(block, size=2 * block.size, stride=2 * block.stride, padding=2 * block.padding)
    writer.place[index] = writer.convolution(block, Convolution(weight, bias, norm), source)


def _norm(state: dict[str, Tensor], block: Block) -> tuple[Norm, Tensor]:
    gamma, beta, mean, var = (state[f"{block.bn_path}.{name}"] for name in ("weight", "bias", "running_mean", "running_var"))
    return Norm(gamma, mean, var, block.bn_eps), beta


def _without_focus(weight: Tensor) -> Tensor:
    """The weight (out, 4 c, k, k) over a focus as one (out, c, 2k, 2k) over the focus's own input."""
    out, wide, size, _ = weight.shape
    spread = weight.new_zeros(out, wide // 4, 2 * size, 2 * size)
    for part, (row, column) in zip(weight.chunk(4, 1), ((0, 0), (1, 0), (0, 1), (1, 1))):
        spread[:, :, row::2, column::2] = part
    return spread


def _norm_behind(writer: _Writer, index: int) -> tuple[Block, int] | None:
    """The batch norm over the concat that `index` goes into, if it is shared out, and where `index` begins in it."""
    readers = writer.readers[index]
    if len(readers) != 1 or writer.blocks[readers[0]].kind != "route":
        return None
    norm = _shared_norm(writer, readers[0])
    inputs = writer.blocks[readers[0]].inputs
    return None if norm is None else (writer.blocks[norm], sum(writer.blocks[i].channels for i in inputs[: inputs.index(index)]))


def _shared_norm(writer: _Writer, route: int) -> int | None:
    """The batch norm that alone reads `route`, a concat of bare convolutions that nothing else reads, each once."""
    blocks, readers = writer.blocks, writer.readers
    inputs = blocks[route].inputs
    alone = len(readers[route]) == 1 and blocks[readers[route][0]].kind == "batchnorm" and blocks[route].slice is None
    bare = all(blocks[i].kind == "convolutional" and not blocks[i].batch_norm and blocks[i].activation == "linear" for i in inputs)
    return readers[route][0] if alone and bare and all(len(readers[i]) == 1 for i in inputs) else None


def _write_batchnorm(writer: _Writer, index: int) -> None:
    block, source = writer.blocks[index], writer.blocks[index].inputs[0]
    if writer.blocks[source].kind == "route" and _shared_norm(writer, source) == index:
        writer.place[index] = writer.place[source]
        return
    norm, beta = _norm(writer.state, block)
    depthwise = replace(block, kind="convolutional", size=1, stride=1, padding=0, groups=block.channels)
    writer.place[index] = writer.convolution(depthwise, Convolution(torch.ones(block.channels, 1, 1, 1), beta, norm), source)


def _write_zeropad(writer: _Writer, index: int) -> None:
    block, (left, right, above, _) = writer.blocks[index], writer.blocks[index].pads
    padding = max(block.pads)
    size = 2 * padding + 1 - left - right
    weight = torch.zeros(block.channels, 1, size, size)
    weight[:, :, padding - above, padding - left] = 1
    depthwise = replace(block, size=size, padding=padding, groups=block.channels)
    writer.place[index] = writer.convolution(depthwise, Convolution(weight, torch.zeros(block.channels)), block.inputs[0])


def _write_route(writer: _Writer, index: int) -> None:
    block = writer.blocks[index]
    keys: dict[str, object] = {"layers": ",".join(str(writer.offset(i)) for i in block.inputs)}
    if block.slice:
        (start, stop), whole = block.slice, writer.blocks[block.inputs[0]].channels
        keys |= {"groups": whole // (stop - start), "group_id": start // (stop - start)}
    writer.place[index] = writer.emit("route", keys)


def _write_shortcut(writer: _Writer, index: int) -> None:
    first, *others = writer.blocks[index].inputs
    writer.bring(first)
    for other in others:
        writer.place[index] = writer.emit("shortcut", {"from": writer.offset(other), "activation": "linear"})
    writer.place.setdefault(index, writer.place[first])


def _write_maxpool(writer: _Writer, index: int) -> None:
    block = writer.blocks[index]
    writer.bring(block.inputs[0])
    keys = {"size": block.size, "stride": block.stride, "padding": 2 * block.padding + block.pads[0] + block.pads[1]}
    writer.place[index] = writer.emit("maxpool", keys)


def _write_upsample(writer: _Writer, index: int) -> None:
    writer.bring(writer.blocks[index].inputs[0])
    writer.place[index] = writer.emit("upsample", {"stride": writer.blocks[index].stride})


def _write_yolo(writer: _Writer, index: int) -> None:
    block = writer.blocks[index]
    writer.bring(block.inputs[0])
    levels = [writer.blocks[i] for i in heads(writer.blocks)]
    first = sum(len(b.anchors) for b in levels[: block.level])
    keys: dict[str, object] = {
        "mask": ",".join(str(first + k) for k in range(len(block.anchors))),
        "anchors": ",  ".join(f"{w!r},{h!r}" for b in levels for w, h in b.anchors),
        "classes": block.classes,
        "num": sum(len(b.anchors) for b in levels),
    }
    keys |= {} if block.exp else {"new_coords": 1}
    writer.place[index] = writer.emit("yolo", keys | {"scale_x_y": block.scale_x_y, "thresh": 0})


def _write_avgpool(writer: _Writer, index: int) -> None:
    writer.bring(writer.blocks[index].inputs[0])
    writer.place[index] = writer.emit("avgpool", {})


def _write_softmax(writer: _Writer, index: int) -> None:
    writer.bring(writer.blocks[index].inputs[0])
    writer.place[index] = writer.emit("softmax", {"groups": 1})


def _alias(writer: _Writer, index: int) -> None:
    """A focus: written with the convolutions that read it."""


_WRITERS: dict[str, Callable[[_Writer, int], None]] = {
    "convolutional": _write_conv,
    "batchnorm": _write_batchnorm,
    "focus": _alias,
    "zeropad": _write_zeropad,
    "route": _write_route,
    "shortcut": _write_shortcut,
    "maxpool": _write_maxpool,
    "upsample": _write_upsample,
    "avgpool": _write_avgpool,
    "softmax": _write_softmax,
    "yolo": _write_yolo,
}
