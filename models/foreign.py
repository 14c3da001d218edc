"""cfg files of other programs -> blocks: plain Darknet's, and the dialect of the pruning repositories before us (`yolov5_prune`).

| | `darknet` | `yolov5_prune` |
|---|---|---|
| padding of a convolution | `pad=1`: size // 2, otherwise `padding` | `pad`, whatever its number: (size - 1) // 2 |
| `groups` of a route | `groups` equal parts, of which `group_id` | the second half |
| batch norm | epsilon 1e-6 | YOLOv5's 1e-3, which is what the repositories' trained weights were made with |
| `[maxpool]` | `padding`, in all, of what never wins, size - 1 if not written | (size - 1) // 2; size=2 stride=1: a zero on the right and below |
| boxes | e^t and `scale_x_y`, with `new_coords=1` (2s)^2 | YOLOv5's, whatever is written |
| only there | `new_coords`, `scale_x_y`, `group_id`, `[dropout]` | `SiLU`, `Hardswish`, `[focus]`, `[convolutional_nobias]`, `[convolutional_noconv]` |

A section's tensors are named by its place (`model.12`), and those of a head by its level, as in YOLOv5; `models/align.py` finds YOLOv5's own
names. Keys that only training reads are passed over. What a block cannot hold is refused with file, line and key. The order of the
`[yolo]` sections says nothing: levels are ordered by their stride.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from models.blocks import YOLO_BN_EPS, YOLO_BN_MOMENTUM, Block, Blocks, check, image_block, make, reductions
from models.cfg_text import Section, check_known, parse, with_classes
from utils.errors import InputError, did_you_mean

OURS, DARKNET, YOLOV5_PRUNE = "ours", "darknet", "yolov5_prune"
DIALECTS = (OURS, DARKNET, YOLOV5_PRUNE)
DARKNET_BN_EPS = 1e-6

_ACTIVATIONS = {
    DARKNET: {a: a for a in ("linear", "leaky", "mish", "logistic", "relu")} | {"swish": "silu"},
    YOLOV5_PRUNE: {"linear": "linear", "leaky": "leaky", "mish": "mish", "SiLU": "silu", "Hardswish": "hardswish"},
}
_ONLY_YOLOV5_PRUNE = {"focus", "convolutional_nobias", "convolutional_noconv"}

# What only training, drawing or the suppression of boxes reads.
_INERT_YOLO = set(
    "num jitter ignore_thresh truth_thresh random resize iou_thresh iou_normalizer cls_normalizer obj_normalizer delta_normalizer iou_loss "
    "iou_thresh_kind nms_kind beta_nms max_delta max focal_loss label_smooth_eps objectness_smooth uc_normalizer thresh nms_threshold show_details "
    "counters_per_class ignore_thresh_obj absolute bias_match map".split()
)
_INERT_CONV = {"stopbackward", "train_only_bn", "dontload", "dontloadscales", "learning_rate", "lr_mult", "burnin_update"}
# What changes the network unless it has this value.
_NEUTRAL: dict[str, dict[str, float]] = {
    "convolutional": {"dilation": 1, "flipped": 0, "binary": 0, "xnor": 0, "bin_output": 0, "antialiasing": 0, "deform": 0, "sway": 0, "rotate": 0,
                      "stretch": 0, "stretch_sway": 0, "assisted_excitation": 0, "grad_centr": 0},
    "upsample": {"scale": 1},
    "maxpool": {"maxpool_depth": 0, "antialiasing": 0},
    "softmax": {"groups": 1, "temperature": 1},
}  # fmt: skip
_KEYS: dict[str, dict[str, set[str]]] = {
    DARKNET: {
        "convolutional": {"batch_normalize", "filters", "size", "stride", "pad", "padding", "groups", "activation", *_INERT_CONV},
        "route": {"layers", "groups", "group_id", "stopbackward"},
        "shortcut": {"from", "activation"},
        "upsample": {"stride"},
        "maxpool": {"size", "stride", "padding"},
        "dropout": {"probability"},
        "avgpool": set(),
        "softmax": {"noloss"},
        "yolo": {"mask", "anchors", "classes", "new_coords", "scale_x_y", *_INERT_YOLO},
    },
    YOLOV5_PRUNE: {
        "convolutional": {"batch_normalize", "filters", "size", "stride", "pad", "activation"},
        "convolutional_nobias": {"batch_normalize", "filters", "size", "stride", "pad", "activation"},
        "convolutional_noconv": {"batch_normalize", "filters", "activation", "size", "stride", "pad"},
        "focus": {"filters"},
        "route": {"layers", "groups"},
        "shortcut": {"from", "activation"},
        "upsample": {"stride"},
        "maxpool": {"size", "stride"},
        "yolo": {"mask", "anchors", "classes", "new_coords", "scale_x_y", *_INERT_YOLO},
    },
}


@dataclass(frozen=True)
class ForeignCfg:
    """Blocks of another program's cfg. `sections`: which section (0: the first behind [net]) each block stands for, -1 the image;
    `lines`: where each block's section stands, for messages."""

    blocks: Blocks
    sections: tuple[int, ...]
    lines: tuple[str, ...]
    dialect: str
    imgsz: int  # the longer of [net]'s width and height


def dialect_of(text: str, source: str) -> str:
    """Tell the dialect by its keys: ours names its sections, the pruning repositories have activations and sections of their own."""
    _, sections = parse(text, source, "#;")
    if any("name" in s.values for s in sections):
        return OURS
    own = any(s.kind in _ONLY_YOLOV5_PRUNE or s.values.get("activation") in ("SiLU", "Hardswish") for s in sections)
    return YOLOV5_PRUNE if own else DARKNET


def read_foreign(text: str, source: str, dialect: str, classes: int | None = None) -> ForeignCfg:
    """Read a cfg of `dialect` (`darknet` or `yolov5_prune`). `classes` replaces the number of classes, and the heads' widths.

    Raise `InputError` naming `source`, the line and the key for what is unknown, does not fit or cannot be held.
    """
    net, sections = parse(text, source, "#;")
    known = {kind: keys | _NEUTRAL.get(kind, {}).keys() for kind, keys in _KEYS[dialect].items()}
    check_known(sections, known)
    for section in sections:
        _check_neutral(section)
    if classes is not None:
        sections = with_classes(sections, classes)
    reader = _Reader(dialect, net, sections, [image_block(net.integer("channels", 3), f"{source} [net]: channels")])
    for section in sections:
        reader.read(section)
    lines = tuple(sections[i].where if i >= 0 else source for i in reader.owner)
    imgsz = max(net.integer(side, 0) for side in ("width", "height")) or 640
    try:
        blocks = check(_levelled(reader.blocks, f"model.{len(sections)}"))
        return ForeignCfg(blocks, tuple(reader.owner), lines, dialect, imgsz)
    except InputError as error:
        raise InputError(f"{source}: {error}") from None


def _check_neutral(section: Section) -> None:
    for key, neutral in _NEUTRAL.get(section.kind, {}).items():
        if section.number(key, neutral) != neutral:
            raise InputError(
                f"{section.lines[key]}: {key}={section.values[key]} in [{section.kind}] cannot be held; only {key}={neutral} can"
            )


@dataclass
class _Reader:
    """Blocks read so far, the section that each stands for, and the block that each section gives."""

    dialect: str
    net: Section
    sections: list[Section]
    blocks: list[Block]
    owner: list[int] = field(default_factory=lambda: [-1])
    place: list[int] = field(default_factory=list)

    @property
    def norm(self) -> dict[str, float]:
        """The constants of the batch norms. (`bn_eps` in [net] is this project's, in the pairs that it writes for Darknet.)"""
        eps = DARKNET_BN_EPS if self.dialect == DARKNET else YOLO_BN_EPS
        return {"bn_eps": self.net.number("bn_eps", eps), "bn_momentum": self.net.number("bn_momentum", YOLO_BN_MOMENTUM)}

    @property
    def name(self) -> str:
        return f"model.{len(self.place)}"

    def add(self, section: Section, kind: str, inputs: tuple[int, ...], **fields: object) -> int:
        try:
            self.blocks.append(make(Block(kind, inputs=inputs, **fields), self.blocks))
        except InputError as error:
            raise InputError(f"{section.where}: {error}") from None
        self.owner.append(len(self.place))
        return len(self.blocks) - 1

    def read(self, section: Section) -> None:
        given = _READERS[section.kind](self, section, section.inputs(self.place))
        self.place.append(given)

    def activation(self, section: Section) -> str:
        text, known = section.values.get("activation", "linear"), _ACTIVATIONS[self.dialect]
        if text not in known:
            raise InputError(
                f"{section.lines['activation']}: activation={text} is not one that can be held{did_you_mean(text, known)}; known: {', '.join(known)}"
            )
        return known[text]


def _read_conv(reader: _Reader, section: Section, inputs: tuple[int, ...]) -> int:
    size, norm = section.integer("size", 1), bool(section.integer("batch_normalize", 0))
    pad = section.integer("pad", 0)
    padding = section.integer("padding", 0)
    if pad:
        padding = size // 2 if reader.dialect == DARKNET else (size - 1) // 2
    bare = section.kind == "convolutional_nobias"
    if bare:
        norm, padding = False, 0
    return reader.add(
        section, "convolutional", inputs, name=reader.name, channels=section.integer("filters"), size=size, stride=section.integer("stride", 1),
        padding=padding, groups=section.integer("groups", 1), activation="linear" if bare else reader.activation(section), batch_norm=norm,
        bias=not norm and not bare, **(reader.norm if norm else {}),
    )  # fmt: skip


def _read_noconv(reader: _Reader, section: Section, inputs: tuple[int, ...]) -> int:
    index = reader.add(section, "batchnorm", inputs, name=reader.name, activation="leaky", **reader.norm)
    if section.integer("filters", reader.blocks[index].channels) != reader.blocks[index].channels:
        raise InputError(
            f"{section.lines['filters']}: filters={section.values['filters']}, but {reader.blocks[index].channels} channels come in"
        )
    return index


def _read_route(reader: _Reader, section: Section, inputs: tuple[int, ...]) -> int:
    groups, part = section.integer("groups", 1), section.integer("group_id", 0)
    if reader.dialect == YOLOV5_PRUNE and "groups" in section.values:
        groups, part = 2, 1
        if len(inputs) > 1:
            raise InputError(f"{section.lines['groups']}: groups halves one layer, but layers={section.values['layers']}")
    if groups == 1:
        return inputs[0] if len(inputs) == 1 else reader.add(section, "route", inputs)
    parts = []
    for i in inputs:
        width = reader.blocks[i].channels
        if groups < 1 or width % groups or not 0 <= part < groups:
            raise InputError(f"{section.lines['groups']}: part {part} of {groups} is no equal part of {width} channels")
        step = width // groups
        parts.append(reader.add(section, "route", (i,), slice=(part * step, (part + 1) * step)))
    return parts[0] if len(parts) == 1 else reader.add(section, "route", tuple(parts))


def _read_shortcut(reader: _Reader, section: Section, inputs: tuple[int, ...]) -> int:
    if reader.dialect == DARKNET and section.values.get("activation", "linear") != "linear":
        raise InputError(
            f"{section.lines['activation']}: activation={section.values['activation']}: only linear is possible after a shortcut"
        )
    return reader.add(section, "shortcut", inputs)


def _read_maxpool(reader: _Reader, section: Section, inputs: tuple[int, ...]) -> int:
    size, stride = section.integer("size", section.integer("stride", 1)), section.integer("stride", 1)
    if reader.dialect == YOLOV5_PRUNE:
        if (size, stride) == (2, 1):
            inputs = (reader.add(section, "zeropad", inputs, pads=(0, 1, 0, 1)),)
        return reader.add(section, "maxpool", inputs, size=size, stride=stride, padding=(size - 1) // 2)
    total = section.integer("padding", size - 1)
    padding, odd = divmod(total, 2)
    # With a stride the odd one is beyond the last window: maps have sides that are multiples of it.
    pads = (0, 1, 0, 1) if odd and (stride == 1 or total != size - 1) else (0, 0, 0, 0)
    return reader.add(section, "maxpool", inputs, size=size, stride=stride, padding=padding, pads=pads)


def _read_yolo(reader: _Reader, section: Section, inputs: tuple[int, ...]) -> int:
    flat = section.numbers("anchors", float)
    pairs = list(zip(flat[::2], flat[1::2]))
    mask = section.numbers("mask") if "mask" in section.values else list(range(len(pairs)))
    if not mask or len(flat) % 2 or not all(0 <= m < len(pairs) for m in mask):
        raise InputError(f"{section.where}: mask={section.values.get('mask')} does not pick out of {len(pairs)} anchors")
    square = reader.dialect == YOLOV5_PRUNE or section.integer("new_coords", 0) == 1
    if reader.dialect == DARKNET:
        _take_sigmoid_out(reader, section, inputs[0], square)
    scale = 2.0 if reader.dialect == YOLOV5_PRUNE else section.number("scale_x_y", 1.0)
    return reader.add(
        section, "yolo", inputs, anchors=tuple(pairs[m] for m in mask), classes=section.integer("classes"), scale_x_y=scale, exp=not square
    )


def _take_sigmoid_out(reader: _Reader, section: Section, source: int, square: bool) -> None:
    """With `new_coords` the sigmoid stands in the convolution above; in blocks every head is linear, and decoding begins with the sigmoid."""
    block = reader.blocks[source]
    wanted = "logistic" if square else "linear"
    if block.kind != "convolutional" or block.activation != wanted:
        raise InputError(
            f"{section.where}: with new_coords={int(square)} a convolution with activation={wanted} must stand above, not {block.kind} ({block.activation})"
        )
    reader.blocks[source] = replace(block, activation="linear")


_READERS: dict[str, Callable[[_Reader, Section, tuple[int, ...]], int]] = {
    "convolutional": _read_conv,
    "convolutional_nobias": _read_conv,
    "convolutional_noconv": _read_noconv,
    "focus": lambda reader, section, inputs: reader.add(section, "focus", inputs),
    "route": _read_route,
    "shortcut": _read_shortcut,
    "upsample": lambda reader, section, inputs: reader.add(section, "upsample", inputs, stride=section.integer("stride", 2)),
    "maxpool": _read_maxpool,
    "dropout": lambda reader, section, inputs: inputs[0],
    "avgpool": lambda reader, section, inputs: reader.add(section, "avgpool", inputs),
    "softmax": lambda reader, section, inputs: reader.add(section, "softmax", inputs, classes=reader.blocks[inputs[0]].channels),
    "yolo": _read_yolo,
}


def _levelled(blocks: list[Block], name: str) -> list[Block]:
    """Number the levels by stride, and name the heads as YOLOv5 does: the convolution `{name}.m.{level}`, Detect `{name}`."""
    scales = reductions(tuple(blocks))
    order = sorted((i for i, b in enumerate(blocks) if b.kind == "yolo"), key=lambda i: scales[i])
    changed = list(blocks)
    for level, i in enumerate(order):
        changed[i] = replace(blocks[i], name=name, level=level)
        source = blocks[i].inputs[0]
        if blocks[source].kind == "convolutional":
            changed[source] = replace(blocks[source], name=f"{name}.m.{level}")
    return changed
