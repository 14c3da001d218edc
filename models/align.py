"""Names for the blocks of another program's cfg: those of the YOLOv5 model that it was written from.

The pruning repositories before us wrote a YOLOv5 model as a cfg in an order of their own: in a C3 or BottleneckCSP cv2 stands before cv1, and a
head behind the layer that it reads. Shapes cannot tell cv1 from cv2, which are alike; the order can, and so can the wiring: after naming, what each
convolution reads must be, through routes, sums and pools, what its namesake reads. Then both are the same function of the same tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from models.blocks import Block, Blocks, check
from models.foreign import ForeignCfg
from utils.errors import InputError


def aligned(cfg: ForeignCfg, model: Blocks, what: str) -> Blocks:
    """The blocks of `cfg` with the names, and all else but the wiring, of `model`'s: the tensors of `model` fit them and give equal outputs.

    Raise `InputError`, which begins with `what`, naming each block whose depth, width or wiring differs.
    """
    owners, wanted = _owners(cfg.blocks), _prune_order(model)
    if len(owners) != len(wanted):
        raise InputError(
            f"{what}: the cfg has {len(owners)} convolutions and batch norms, the weights {len(wanted)} ({_first_difference(cfg, owners, model, wanted)}); "
            "the depth of the model differs"
        )
    differ = [
        f"{cfg.lines[i]} is {_shown(cfg.blocks, i)}, {model[j].name} is {_shown(model, j)}"
        for i, j in zip(owners, wanted)
        if _shown(cfg.blocks, i) != _shown(model, j)
    ]
    if differ:
        more = f"; and {len(differ) - 8} more blocks" if len(differ) > 8 else ""
        raise InputError(f"{what}: {'; '.join(differ[:8])}{more}. Use the cfg of this model, or leave --cfg out")
    blocks = _named(cfg.blocks, model, zip(owners, wanted), whole=True)
    ours, theirs = _wiring(blocks), _wiring(model)
    crossed = [name for name in theirs if ours.get(name) != theirs[name]]
    if crossed:
        raise InputError(
            f"{what}: {', '.join(crossed[:8])} read other blocks in the cfg than in the weights; use the cfg of this model, or leave --cfg out"
        )
    return check(blocks)


def named_like(cfg: ForeignCfg, templates: Iterable[Blocks]) -> Blocks | None:
    """The blocks of `cfg` under the names of the first of `templates` that is wired alike, whatever the widths; None if none is."""
    owners = _owners(cfg.blocks)
    for model in templates:
        wanted = _prune_order(model)
        if [_form(cfg.blocks[i]) for i in owners] != [_form(model[j]) for j in wanted]:
            continue
        blocks = _named(cfg.blocks, model, zip(owners, wanted), whole=False)
        if _wiring(blocks) == _wiring(model):
            return check(blocks)
    return None


def _owners(blocks: Blocks) -> list[int]:
    return [i for i, block in enumerate(blocks) if block.kind in ("convolutional", "batchnorm")]


def _prune_order(model: Blocks) -> list[int]:
    """The blocks of `model` that own tensors in the order of the repositories' cfg files."""
    order = _owners(model)
    at = {model[i].name: i for i in order}
    for name in at:
        module, _, last = name.rpartition(".")
        if last == "cv3" and {f"{module}.cv1", f"{module}.cv2"} <= at.keys():
            order.remove(at[f"{module}.cv2"])
            order.insert(order.index(at[f"{module}.cv1"]), at[f"{module}.cv2"])
    for block in model:
        if block.kind == "yolo":
            (head,) = block.inputs
            order.remove(head)
            before = max(i for i in order if i <= model[head].inputs[0])
            order.insert(order.index(before) + 1, head)
    return order


def _form(block: Block) -> tuple:
    """What two blocks of one name have in common, whatever their widths and activations."""
    return block.kind, block.size, block.stride, block.groups == 1, block.batch_norm, block.bias


def _shown(blocks: Blocks, i: int) -> str:
    b = blocks[i]
    if b.kind == "batchnorm":
        return f"a batch norm over {b.channels} channels"
    behind = "with a batch norm" if b.batch_norm else "with a bias" if b.bias else "bare"
    return f"{blocks[b.inputs[0]].channels} -> {b.channels} channels {b.size}x{b.size}/{b.stride} {behind}"


def _first_difference(cfg: ForeignCfg, owners: list[int], model: Blocks, wanted: list[int]) -> str:
    for i, j in zip(owners, wanted):
        if _form(cfg.blocks[i]) != _form(model[j]):
            return f"the first difference: {cfg.lines[i]} is {_shown(cfg.blocks, i)}, {model[j].name} is {_shown(model, j)}"
    for i, j in zip(owners, wanted):
        if _shown(cfg.blocks, i) != _shown(model, j):
            return f"the first difference: {cfg.lines[i]} is {_shown(cfg.blocks, i)}, {model[j].name} is {_shown(model, j)}"
    return "the longer one goes on where the other ends"


def _named(blocks: Blocks, model: Blocks, pairs: Iterable[tuple[int, int]], whole: bool) -> Blocks:
    """`blocks` with the names of their partners in `model`; with `whole`, also everything else that they are but the blocks they read."""
    changed = list(blocks)
    for i, j in pairs:
        changed[i] = replace(model[j], inputs=blocks[i].inputs) if whole else replace(blocks[i], name=model[j].name)
    heads = {model[b.inputs[0]].name: b for b in model if b.kind == "yolo"}
    for i, block in enumerate(blocks):
        partner = heads.get(changed[block.inputs[0]].name) if block.kind == "yolo" else None
        if partner is not None:
            changed[i] = replace(block, name=partner.name, level=partner.level)
    return tuple(changed)


def _wiring(blocks: Blocks) -> dict[str, object]:
    """For each block that owns tensors and each head, what it reads: nested tuples of kinds and names."""
    outputs: list[object] = []
    read: dict[str, object] = {}
    for block in blocks:
        inputs = tuple(outputs[i] for i in block.inputs)
        if block.kind in ("convolutional", "batchnorm"):
            read[block.name] = inputs
            outputs.append(block.name)
        elif block.kind == "yolo":
            read[f"{block.name} level {block.level}"] = inputs
            outputs.append(None)
        else:
            outputs.append(_passed(block, inputs))
    return read


def _passed(block: Block, inputs: Sequence[object]) -> object:
    if block.kind == "route" and len(inputs) == 1 and block.slice is None:
        return inputs[0]
    if block.kind == "shortcut":
        return "shortcut", tuple(sorted(map(repr, inputs)))
    return block.kind, block.size, block.stride, block.padding, block.pads, block.slice is not None, tuple(inputs)
