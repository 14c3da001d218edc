"""YOLOv5's box decoding: raw head maps -> boxes in pixels, in float32 whatever the network computed in.

bfloat16 cannot tell pixel 600 from 603, so evaluation, distillation, loss and export all decode through these functions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Logits: more than the rounding of a float32 sigmoid, near 0 or 1, makes of them. What it lets in too many the exact test sorts out.
LOGIT_SLACK = 1e-3


def decode_boxes(raw: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor]:
    """Decode raw logits (..., 4) against `anchors` (..., 2) into centre offsets 2s-0.5 in cells and sizes (2s)^2 x anchor (anchor's unit)."""
    s = raw.float().sigmoid()
    return s[..., :2] * 2 - 0.5, (s[..., 2:4] * 2) ** 2 * anchors


def split_anchors(raw: Tensor, na: int) -> Tensor:
    """Reshape a head map (B, na*no, ny, nx) to (B, na, ny, nx, no) without copying."""
    b, c, ny, nx = raw.shape
    return raw.view(b, na, c // na, ny, nx).permute(0, 1, 3, 4, 2)


def decode(maps: Sequence[Tensor], anchors: Tensor, strides: Sequence[int]) -> Tensor:
    """Decode head maps, one (B, na*no, ny, nx) per level, into predictions (B, sum na*ny*nx, no).

    `anchors`: (levels, na, 2) in pixels. Output rows: centre x, y, width, height in pixels of the network input, objectness and
    class probabilities; order per level (anchor, row, column), levels one after another.
    """
    return torch.cat([decode_level(raw, a, s) for raw, a, s in zip(maps, anchors, strides)], 1)


def decode_level(raw: Tensor, anchors: Tensor, stride: int) -> Tensor:
    """One level of `decode`: (B, na*no, ny, nx), anchors (na, 2) in pixels -> (B, na*ny*nx, no)."""
    p = split_anchors(raw, len(anchors))
    b, na, ny, nx, no = p.shape
    grid_y, grid_x = torch.meshgrid(torch.arange(ny, device=raw.device), torch.arange(nx, device=raw.device), indexing="ij")
    grid = torch.stack((grid_x, grid_y), -1).float()
    xy, wh = decode_boxes(p[..., :4], anchors.to(raw.device).float().view(na, 1, 1, 2))
    return torch.cat(((xy + grid) * stride, wh, p[..., 4:].float().sigmoid()), -1).reshape(b, na * ny * nx, no)


def decode_candidates(maps: Sequence[Tensor], anchors: Tensor, strides: Sequence[int], threshold: float) -> list[Tensor]:
    """Decode only what can be a detection: per image, the rows of `decode` whose objectness exceeds `threshold`, in the same order.

    Arguments as for `decode`; returns one (n, no) tensor per image. A few rows within rounding of the threshold come along:
    `non_max_suppression` tests the decoded objectness itself. At a threshold of 0.001 a trained network leaves a few in a
    hundred of its rows, and the sigmoid of all the others is most of what `decode` costs.
    """
    levels = [_level_candidates(raw, a, s, threshold) for raw, a, s in zip(maps, anchors, strides)]
    return [torch.cat(parts) for parts in zip(*levels)]


def _level_candidates(raw: Tensor, anchors: Tensor, stride: int, threshold: float) -> tuple[Tensor, ...]:
    """One level of `decode_candidates`: (B, na*no, ny, nx), anchors (na, 2) in pixels -> per image (n, no)."""
    p = split_anchors(raw, len(anchors))
    image, anchor, y, x = (p[..., 4].float() > _logit(threshold) - LOGIT_SLACK).nonzero(as_tuple=True)
    rows = p[image, anchor, y, x].float()
    xy, wh = decode_boxes(rows[:, :4], anchors.to(raw.device).float()[anchor])
    decoded = torch.cat(((xy + torch.stack((x, y), -1)) * stride, wh, rows[:, 4:].sigmoid()), -1)
    return decoded.split(torch.bincount(image, minlength=len(raw)).tolist())


def _logit(probability: float) -> float:
    if not 0 < probability < 1:
        return math.copysign(math.inf, probability - 0.5)
    return math.log(probability / (1 - probability))
