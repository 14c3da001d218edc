"""YOLOv5's box decoding: raw head maps -> boxes in pixels, in float32 whatever the network computed in.

bfloat16 cannot tell pixel 600 from 603, so evaluation, distillation, loss and export all decode through these functions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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
