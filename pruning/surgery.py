"""Surgery: (blocks, state dict, mask) -> smaller blocks and state dict; and the folding of what removed channels still carry.

A channel whose gamma (without a batch norm: whose filter) is taken as zero still puts out the constant act(beta). `fold_constants` moves
it into the batch norm mean or bias of whatever reads it, through routes, shortcuts, pools and upsamples; `prune` then only slices. The
step is exact for 1x1 consumers and for the interior pixels of larger ones; at a zero-padded border (a convolution's own, or that of a
`zeropad`) it over-counts the taps that fall outside.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from models.blocks import Block, Blocks, check
from models.network import activation
from pruning.spaces import Spaces

State = dict[str, Tensor]


def fold_constants(blocks: Blocks, state: State, spaces: Spaces, mask: np.ndarray) -> State:
    """Return a state dict in which the constants of the channels that `mask` removes are folded into their consumers.

    The tensors keep their full width. `mask`: (classes,) bool, True = kept.
    """
    state = dict(state)
    carried: list[Tensor] = []  # per block: what each output channel lacks once removed channels are zero
    for block, ids in zip(blocks, spaces.channels):
        inputs = [carried[i] for i in block.inputs]
        if block.kind == "input":
            carried.append(torch.zeros(block.channels, dtype=torch.float64))
        elif block.kind in ("convolutional", "batchnorm"):
            carried.append(_fold_into(block, state, inputs[0], torch.from_numpy(mask[ids])))
        else:
            carried.append(_CARRY[block.kind](block, inputs))
    return state


def _carry_route(block: Block, inputs: list[Tensor]) -> Tensor:
    joined = torch.cat(inputs)
    return joined if block.slice is None else joined[slice(*block.slice)]


# How the constants of the inputs pass through a block without parameters.
_CARRY: dict[str, Callable[[Block, list[Tensor]], Tensor]] = {
    "shortcut": lambda block, inputs: sum(inputs[1:], inputs[0]),
    "route": _carry_route,
    "focus": lambda block, inputs: inputs[0].repeat(4),
    "upsample": lambda block, inputs: inputs[0],
    "maxpool": lambda block, inputs: inputs[0],
    "zeropad": lambda block, inputs: inputs[0],  # the border holds zeros instead; no bias can tell it from the interior
    "avgpool": lambda block, inputs: inputs[0],
    "yolo": lambda block, inputs: inputs[0],
    "softmax": lambda block, inputs: inputs[0],
}


def _fold_into(block: Block, state: State, carried: Tensor, keep: Tensor) -> Tensor:
    """Absorb the input's constants into `block`'s parameters; return the constants that its own output carries."""
    shift = carried
    if block.kind == "convolutional":
        weight = state[f"{block.conv_path}.weight"].double().sum((2, 3))
        shift = _grouped(weight, carried, block.groups)
    if block.has_gamma:
        key, sign = f"{block.bn_path}.running_mean", -1.0
    elif block.bias:
        key, sign = f"{block.conv_path}.bias", 1.0
    else:
        return shift  # a bare convolution absorbs nothing; the batch norm behind it will
    constant = activation(block.activation)(state[f"{block.bn_path}.bias" if block.has_gamma else key].double())
    state[key] = (state[key].double() + sign * shift).to(state[key].dtype)
    return torch.where(keep, torch.zeros_like(constant), constant)


def _grouped(weight: Tensor, carried: Tensor, groups: int) -> Tensor:
    """(C_out, C_in/groups) x (C_in,) -> (C_out,) for a convolution with `groups`."""
    out, per_group = weight.shape
    return torch.einsum("goi,gi->go", weight.view(groups, out // groups, per_group), carried.view(groups, per_group)).reshape(-1)


def prune(blocks: Blocks, state: State, spaces: Spaces, mask: np.ndarray) -> tuple[Blocks, State]:
    """Remove the channels that `mask` (classes,) drops. Pure slicing: values are those of `state`.

    Raises `ValueError` where a convolution would be left without a channel.
    """
    keeps, sliced = [mask[ids] for ids in spaces.channels], dict(state)
    for index, block in enumerate(blocks):
        if not keeps[index].any():
            raise ValueError(f"block {block.name or index}: every channel would be removed")
        if block.kind == "convolutional":
            _slice_conv(block, sliced, keeps[block.inputs[0]], keeps[index])
        if block.has_gamma:
            _slice_norm(block, sliced, keeps[index])
    return check(narrowed(blocks, spaces, mask)), sliced


def narrowed(blocks: Blocks, spaces: Spaces, mask: np.ndarray) -> Blocks:
    """The structure alone that `prune` leaves: what budgets count with."""
    keeps = [mask[ids] for ids in spaces.channels]
    return tuple(_narrowed(b, int(keeps[i].sum()), keeps[b.inputs[0]] if b.inputs else None) for i, b in enumerate(blocks))


def _narrowed(block: Block, width: int, source: np.ndarray | None) -> Block:
    groups = int(source.sum()) if block.groups > 1 and block.groups == block.channels == len(source) else block.groups
    bounds = block.slice
    if bounds is not None:
        bounds = (int(source[: bounds[0]].sum()), int(source[: bounds[1]].sum()))
    return replace(block, channels=width, groups=groups, slice=bounds)


def _slice_conv(block: Block, state: State, keep_in: np.ndarray, keep_out: np.ndarray) -> None:
    key = f"{block.conv_path}.weight"
    rows = torch.from_numpy(np.flatnonzero(keep_out))
    weight = state[key].index_select(0, rows)
    if block.groups == 1:
        weight = weight.index_select(1, torch.from_numpy(np.flatnonzero(keep_in)))
    state[key] = weight.contiguous()
    if block.bias:
        state[f"{block.conv_path}.bias"] = state[f"{block.conv_path}.bias"].index_select(0, rows)


def _slice_norm(block: Block, state: State, keep: np.ndarray) -> None:
    rows = torch.from_numpy(np.flatnonzero(keep))
    for name in ("weight", "bias", "running_mean", "running_var"):
        key = f"{block.bn_path}.{name}"
        state[key] = state[key].index_select(0, rows)
