"""Blocks <-> cfg text in our own dialect, lossless in both directions. (Other programs' cfg files: `models/foreign.py`.)

Sections and keys are Darknet's; what Darknet cannot say is added as keys of ours: `name=` (the YOLOv5 path under which the
tensors stand), `bn_eps`/`bn_momentum` (in `[net]` for the whole model, in a section where it differs), a `slice=` on a route, and
the sections `[batchnorm]`, `[focus]` and `[zeropad]`. A convolution that does not read the section above it is preceded by a `[route]` with one
layer, which the reader takes out again. `mask` of `[yolo]` counts in Detect's level order, whatever the order of the sections.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from models.blocks import ACTIVATIONS, Block, Blocks, check, image_block, make
from models.cfg_text import Section, check_known, parse, with_classes
from utils.errors import InputError, did_you_mean

_ALIASES = {"swish": "silu", "SiLU": "silu", "Hardswish": "hardswish"}
_NET_KEYS = {"channels", "width", "height", "bn_eps", "bn_momentum"}
_BN_KEYS = {"bn_eps", "bn_momentum"}
_KEYS: dict[str, set[str]] = {
    "convolutional": {"name", "batch_normalize", "filters", "size", "stride", "pad", "padding", "groups", "bias", "activation"} | _BN_KEYS,
    "batchnorm": {"name", "activation"} | _BN_KEYS,
    "route": {"name", "layers", "slice"},
    "shortcut": {"name", "from", "activation"},
    "upsample": {"name", "stride"},
    "maxpool": {"name", "size", "stride", "padding", "pads"},
    "zeropad": {"name", "padding"},
    "focus": {"name"},
    "avgpool": {"name"},
    "softmax": {"name", "classes"},
    "yolo": {"name", "mask", "anchors", "classes", "num", "new_coords", "scale_x_y"},
}


# ---- writing -------------------------------------------------------------------------------------------------------------------


@dataclass
class _Writer:
    """Sections written so far, and which section holds the output of each block."""

    blocks: Blocks
    defaults: tuple[float, float]
    sections: list[str] = field(default_factory=list)
    place: dict[int, int] = field(default_factory=dict)

    def emit(self, kind: str, keys: dict[str, object]) -> int:
        self.sections.append("\n".join([f"[{kind}]", *(f"{k}={v}" for k, v in keys.items())]))
        return len(self.sections) - 1

    def offset(self, block: int) -> int:
        return self.place[block] - len(self.sections)

    def bring(self, block: int) -> None:
        """Make the section above the next one hold `block`'s output."""
        if block == 0 and not self.sections:
            return  # the first section reads the image
        if block == 0:
            raise InputError("a cfg can read the image in its first section only")
        if self.place[block] != len(self.sections) - 1:
            self.emit("route", {"layers": self.offset(block)})


def write_cfg(blocks: Blocks) -> str:
    """Return the cfg text of `blocks`; `read_cfg_text` of it gives equal blocks."""
    norms = Counter((block.bn_eps, block.bn_momentum) for block in blocks if block.has_gamma)
    defaults = norms.most_common(1)[0][0] if norms else (Block("input").bn_eps, Block("input").bn_momentum)
    writer = _Writer(blocks, defaults)
    for index, block in enumerate(blocks[1:], start=1):
        if block.kind == "route":
            keys = {"layers": ",".join(str(writer.offset(i)) for i in block.inputs)}
        else:
            writer.bring(block.inputs[0])
            keys = _FIELDS[block.kind](block, writer)
        if block.name:
            keys = {"name": block.name, **keys}
        if block.slice:
            keys["slice"] = f"{block.slice[0]},{block.slice[1]}"
        if block.has_gamma and (block.bn_eps, block.bn_momentum) != defaults:
            keys |= {"bn_eps": block.bn_eps, "bn_momentum": block.bn_momentum}
        writer.place[index] = writer.emit(block.kind, keys)
    net = f"[net]\nchannels={blocks[0].channels}\nbn_eps={defaults[0]}\nbn_momentum={defaults[1]}"
    return "\n\n".join([net, *writer.sections]) + "\n"


def _conv_keys(block: Block, writer: _Writer) -> dict[str, object]:
    keys: dict[str, object] = {
        "batch_normalize": int(block.batch_norm),
        "filters": block.channels,
        "size": block.size,
        "stride": block.stride,
    }
    keys |= {"pad": 1} if block.padding == block.size // 2 else {"padding": block.padding}
    if block.groups != 1:
        keys["groups"] = block.groups
    if block.bias == block.batch_norm:  # the rule is: a bias where there is no batch norm
        keys["bias"] = int(block.bias)
    return keys | {"activation": block.activation}


def _pool_keys(block: Block, writer: _Writer) -> dict[str, object]:
    # Darknet's `padding` of a pool is the total of both sides, size - 1 where it is not written.
    extra: dict[str, object] = {} if 2 * block.padding == block.size - 1 else {"padding": 2 * block.padding}
    extra |= {"pads": ",".join(map(str, block.pads))} if any(block.pads) else {}
    return {"size": block.size, "stride": block.stride} | extra


def _yolo_keys(block: Block, writer: _Writer) -> dict[str, object]:
    levels = sorted((b for b in writer.blocks if b.kind == "yolo"), key=lambda b: b.level)
    first = sum(len(b.anchors) for b in levels[: block.level])
    anchors = ",  ".join(
        f"{w:g},{h:g}" if (float(f"{w:g}"), float(f"{h:g}")) == (w, h) else f"{w!r},{h!r}" for b in levels for w, h in b.anchors
    )
    mask = ",".join(str(first + k) for k in range(len(block.anchors)))
    return {
        "mask": mask,
        "anchors": anchors,
        "classes": block.classes,
        "num": sum(len(b.anchors) for b in levels),
        "new_coords": int(not block.exp),
        "scale_x_y": block.scale_x_y,
    }


_FIELDS = {
    "convolutional": _conv_keys,
    "batchnorm": lambda block, writer: {"activation": block.activation},
    "shortcut": lambda block, writer: {"from": ",".join(str(writer.offset(i)) for i in block.inputs[1:]), "activation": "linear"},
    "upsample": lambda block, writer: {"stride": block.stride},
    "maxpool": _pool_keys,
    "zeropad": lambda block, writer: {"padding": ",".join(map(str, block.pads))},
    "focus": lambda block, writer: {},
    "avgpool": lambda block, writer: {},
    "softmax": lambda block, writer: {"classes": block.classes},
    "yolo": _yolo_keys,
}


# ---- reading -------------------------------------------------------------------------------------------------------------------


def read_cfg_text(text: str, source: str = "cfg", classes: int | None = None) -> Blocks:
    """Read cfg text into blocks. `classes` replaces the number of classes (and the widths of the convolutions before `[yolo]` or `[softmax]`).

    Raise `InputError` naming `source`, the line and the key for whatever is unknown or does not fit.
    """
    net, sections = parse(text, source)
    net.check_keys(_NET_KEYS)
    check_known(sections, _KEYS)
    if classes is not None:
        sections = with_classes(sections, classes)
    norm = (net.number("bn_eps", Block("").bn_eps), net.number("bn_momentum", Block("").bn_momentum))
    blocks = [image_block(net.integer("channels", 3), f"{source} [net]: channels")]
    place: list[int] = []  # block index of every section
    for section in sections:
        place.append(_append(section, blocks, place, norm))
    try:
        return check(blocks)
    except InputError as error:
        raise InputError(f"{source}: {error}") from None


def _append(section: Section, blocks: list[Block], place: list[int], norm: tuple[float, float]) -> int:
    """Append the section's block and return its index (that of its input, where it only repeats an earlier output)."""
    inputs = section.inputs(place)
    name = section.values.get("name", "")
    if section.kind == "route" and len(inputs) == 1 and not name and "slice" not in section.values:
        return inputs[0]
    fields = _READERS[section.kind](section)
    if section.kind in ("convolutional", "batchnorm"):
        fields |= {"bn_eps": section.number("bn_eps", norm[0]), "bn_momentum": section.number("bn_momentum", norm[1])}
        if not (section.kind == "batchnorm" or fields["batch_norm"]):
            fields = {k: v for k, v in fields.items() if k not in _BN_KEYS}
    block = Block(section.kind, name, inputs, **fields)
    try:
        blocks.append(make(block, blocks))
    except InputError as error:
        raise InputError(f"{section.where}: {error}") from None
    return len(blocks) - 1


def _activation(section: Section) -> str:
    text = section.values.get("activation", "linear")
    name = _ALIASES.get(text, text)
    if name not in ACTIVATIONS:
        raise InputError(f"{section.where}: unknown activation {text!r}{did_you_mean(text, ACTIVATIONS)}")
    return name


def _read_conv(section: Section) -> dict[str, object]:
    size, batch_norm = section.integer("size", 1), bool(section.integer("batch_normalize", 0))
    return {
        "channels": section.integer("filters"),
        "size": size,
        "stride": section.integer("stride", 1),
        "padding": size // 2 if section.integer("pad", 0) else section.integer("padding", 0),
        "groups": section.integer("groups", 1),
        "activation": _activation(section),
        "batch_norm": batch_norm,
        "bias": bool(section.integer("bias", int(not batch_norm))),
    }


def _read_pool(section: Section) -> dict[str, object]:
    size = section.integer("size")
    total = section.integer("padding", size - 1)
    if total % 2:
        raise InputError(f"{section.where}: padding={total} (the total of both sides) must be even")
    pads = _read_pads(section, "pads") if "pads" in section.values else {}
    return {"size": size, "stride": section.integer("stride", 1), "padding": total // 2} | pads


def _read_pads(section: Section, key: str) -> dict[str, object]:
    pads = section.numbers(key)
    if len(pads) != 4:
        raise InputError(f"{section.where}: {key}=left,right,above,below takes four numbers")
    return {"pads": tuple(pads)}


def _read_shortcut(section: Section) -> dict[str, object]:
    if _activation(section) != "linear":
        raise InputError(f"{section.where}: activation={section.values['activation']}: only linear is possible after a shortcut")
    return {}


def _read_route(section: Section) -> dict[str, object]:
    if "slice" not in section.values:
        return {}
    bounds = section.numbers("slice")
    if len(bounds) != 2:
        raise InputError(f"{section.where}: slice=start,stop takes two numbers")
    return {"slice": (bounds[0], bounds[1])}


def _read_yolo(section: Section) -> dict[str, object]:
    if not {"new_coords", "scale_x_y"} <= section.values.keys():
        raise InputError(f"{section.where}: say how boxes are decoded: new_coords=1 and scale_x_y=2.0 is YOLOv5's way")
    mask, flat = section.numbers("mask"), section.numbers("anchors", float)
    pairs = list(zip(flat[::2], flat[1::2]))
    if not mask or mask != list(range(mask[0], mask[0] + len(mask))) or mask[-1] >= len(pairs) or mask[0] % len(mask):
        raise InputError(f"{section.where}: mask={section.values['mask']} does not pick one level out of {len(pairs)} anchors")
    return {
        "level": mask[0] // len(mask),
        "anchors": tuple(pairs[m] for m in mask),
        "classes": section.integer("classes"),
        "scale_x_y": section.number("scale_x_y", 2.0),
        "exp": section.integer("new_coords") == 0,
    }


_READERS = {
    "convolutional": _read_conv,
    "batchnorm": lambda section: {"activation": _activation(section)},
    "route": _read_route,
    "shortcut": _read_shortcut,
    "upsample": lambda section: {"stride": section.integer("stride", 2)},
    "maxpool": _read_pool,
    "zeropad": lambda section: _read_pads(section, "padding"),
    "focus": lambda section: {},
    "avgpool": lambda section: {},
    "softmax": lambda section: {"classes": section.integer("classes")},
    "yolo": _read_yolo,
}
