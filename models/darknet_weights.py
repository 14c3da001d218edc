"""Darknet's binary `.weights`: the numbers of every convolution, in the order of the cfg's sections, without names or shapes.

The file: major, minor, revision (int32), images seen (int64 from version 0.2 on, int32 before), then float32 for each convolution: bias (or
the batch norm's beta), and with a batch norm its gamma, running mean and running variance, then the weight (out, in / groups, k, k).

Each reader has an epsilon of its own for the batch norm (Darknet 1e-6 or 1e-5, OpenCV 1e-6), and the file cannot say ours (1e-3). So what
is written is the same network on a larger scale: with S = 1024 the weight and the mean are S times, the variance S^2 (var + our epsilon), gamma
and beta as they are. A reader's epsilon e then changes a normalised value by less than e / (2 S^2 * our epsilon) of itself, 5e-9 for
e = 1e-5 and our 1e-3; a running variance of 1 - e with gamma rewritten would suit one e only and lose gamma, by which people prune. S is a power of
two, so weight and mean lose no bit, and it stands in the header's revision, which other readers pass over: `read_weights` takes it out again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models.blocks import Block, Blocks, heads, strides
from utils.errors import InputError

SCALE = 1024
_HEADER = np.dtype([("major", "<i4"), ("minor", "<i4"), ("revision", "<i4")])


@dataclass(frozen=True)
class Norm:
    """A batch norm's tensors, each (out,), and its epsilon. Beta stands in the convolution's bias."""

    gamma: Tensor
    mean: Tensor
    var: Tensor
    eps: float


@dataclass(frozen=True)
class Convolution:
    """What one [convolutional] section owns: weight (out, in / groups, k, k), bias (out,) or the batch norm's beta, the batch norm."""

    weight: Tensor
    bias: Tensor
    norm: Norm | None = None


def weights_bytes(convolutions: Sequence[Convolution]) -> bytes:
    """The file's content, for convolutions in the order of their sections."""
    header = np.array([(0, 2, SCALE)], dtype=_HEADER).tobytes() + np.zeros(1, "<i8").tobytes()
    return header + b"".join(_floats(t) for conv in convolutions for t in _ordered(conv))


def _ordered(conv: Convolution) -> list[Tensor]:
    if conv.norm is None:
        return [conv.bias, conv.weight]
    norm = conv.norm
    return [conv.bias, norm.gamma, norm.mean.double() * SCALE, (norm.var.double() + norm.eps) * SCALE**2, conv.weight.double() * SCALE]


def _floats(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().numpy().astype("<f4").tobytes()


def read_weights(path: Path, blocks: Blocks) -> dict[str, Tensor]:
    """The state dict of a network of `blocks`, whose convolutions stand in the order of their sections, from the `.weights` file `path`.

    Raise `InputError` with the counts where the file holds fewer or more numbers than `blocks` have, and for numbers that are not finite.
    """
    bare = next((b for b in blocks if b.kind == "batchnorm" or (b.kind == "convolutional" and b.bias == b.batch_norm)), None)
    if bare is not None:
        raise InputError(
            f"{path}: block {bare.name} ({bare.kind}) of its cfg has no place in Darknet's weights, where a convolution has either a batch norm or a bias"
        )
    values, scale = _read(path)
    owners = [b for b in blocks if b.kind == "convolutional"]
    shapes = [(b.channels, blocks[b.inputs[0]].channels // b.groups, b.size, b.size) for b in owners]
    wanted = sum(b.channels * (4 if b.batch_norm else 1) + int(np.prod(shape)) for b, shape in zip(owners, shapes))
    if len(values) != wanted:
        raise InputError(
            f"{path}: holds {len(values):,} numbers, but the {len(owners)} convolutions of its cfg have {wanted:,}; "
            f"it is {'cut short' if len(values) < wanted else 'too long'}, or the cfg (--cfg) is another model's"
        )
    state: dict[str, Tensor] = {}
    rest = torch.from_numpy(values)
    for block, shape in zip(owners, shapes):
        count = block.channels * (4 if block.batch_norm else 1) + int(np.prod(shape))
        state |= _tensors(block, rest[:count], shape, scale)
        rest = rest[count:]
    return state | anchors_state(blocks)


def _tensors(block: Block, values: Tensor, shape: tuple[int, ...], scale: int) -> dict[str, Tensor]:
    """The entries of a state dict that the numbers of one convolution, (count,), are; `shape`: its weight's, `scale`: see the module."""
    *vectors, weight = values.split([block.channels] * (4 if block.batch_norm else 1) + [int(np.prod(shape))])
    weight = weight.view(shape)
    if not block.batch_norm:
        return {f"{block.name}.bias": vectors[0].clone(), f"{block.conv_path}.weight": weight.clone()}
    beta, gamma, mean, var = vectors
    if scale != 1:
        weight, mean = weight / scale, mean / scale
        var = (var.double() / scale**2 - block.bn_eps).clamp(min=0).float()
    names = {"weight": gamma, "bias": beta, "running_mean": mean, "running_var": var, "num_batches_tracked": torch.tensor(0)}
    return {f"{block.bn_path}.{name}": value.clone() for name, value in names.items()} | {f"{block.conv_path}.weight": weight.clone()}


def anchors_state(blocks: Blocks) -> dict[str, Tensor]:
    """The entry of a state dict that holds the anchors, (levels, na, 2) in cells; of a classifier none."""
    levels = [blocks[i] for i in heads(blocks)]
    cells = [torch.tensor(b.anchors, dtype=torch.float32) / s for b, s in zip(levels, strides(blocks))]
    return {f"{levels[0].name}.anchors": torch.stack(cells)} if cells else {}


def _read(path: Path) -> tuple[np.ndarray, int]:
    """The float32 numbers behind the header, and the scale on which this project wrote them (1: another program's file)."""
    content = path.read_bytes()
    if len(content) < _HEADER.itemsize + 4:
        raise InputError(f"{path}: {len(content)} bytes are too few for a Darknet .weights file")
    header = np.frombuffer(content, _HEADER, 1)[0]
    major, minor, revision = (int(header[name]) for name in ("major", "minor", "revision"))
    if not (0 <= major < 1000 and 0 <= minor < 1000):
        raise InputError(f"{path}: not a Darknet .weights file (its header says version {major}.{minor})")
    start = _HEADER.itemsize + (8 if major * 10 + minor >= 2 else 4)
    if (len(content) - start) % 4 or len(content) < start:
        raise InputError(f"{path}: {len(content):,} bytes, which are not a header and whole numbers; the file is cut short")
    values = np.frombuffer(content, "<f4", offset=start).astype(np.float32)
    if not np.isfinite(values).all():
        raise InputError(f"{path}: holds values that are not finite; not a Darknet .weights file, or a damaged one")
    return values, SCALE if revision == SCALE else 1
