"""Box decoding: raw head maps -> boxes in pixels, in float32 whatever the network computed in.

bfloat16 cannot tell pixel 600 from 603, so evaluation, distillation, loss and export all decode through these functions. How a level decodes
(YOLOv5's way unless its cfg says otherwise) is a `Level`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Logits: more than the rounding of a float32 sigmoid, near 0 or 1, makes of them. What it lets in too many the exact test sorts out.
LOGIT_SLACK = 1e-3


@dataclass(frozen=True, eq=False)
class Level:
    """How one level of a head decodes. `anchors` (na, 2) and `stride` in pixels.

    With s = sigmoid(t): the centre lies at scale * s - (scale - 1) / 2 in its cell (Darknet's `scale_x_y`), a side is (2s)^2 x anchor, or
    e^t x anchor if `exp`. The defaults are YOLOv5's, which Darknet writes as `new_coords=1`, `scale_x_y=2.0`.
    """

    anchors: Tensor
    stride: int
    scale: float = 2.0
    exp: bool = False

    def to(self, device: torch.device | str) -> Level:
        """The level with its anchors, as float32, on `device`."""
        return replace(self, anchors=self.anchors.to(device, torch.float32))

    def boxes(self, raw: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor]:
        """`decode_boxes` as this level decodes."""
        return decode_boxes(raw, anchors, self.scale, self.exp)


def decode_boxes(raw: Tensor, anchors: Tensor, scale: float = 2.0, exp: bool = False) -> tuple[Tensor, Tensor]:
    """Decode raw logits (..., 4) against `anchors` (..., 2): centre offsets in cells, sizes in the anchors' unit; by default YOLOv5's
    2s - 0.5 and (2s)^2 x anchor, see `Level`."""
    raw = raw.float()
    s = raw.sigmoid()
    growth = raw[..., 2:4].exp() if exp else (s[..., 2:4] * 2) ** 2
    return s[..., :2] * scale - (scale - 1) / 2, growth * anchors


def split_anchors(raw: Tensor, na: int) -> Tensor:
    """Reshape a head map (B, na*no, ny, nx) to (B, na, ny, nx, no) without copying."""
    b, c, ny, nx = raw.shape
    return raw.view(b, na, c // na, ny, nx).permute(0, 1, 3, 4, 2)


def decode(maps: Sequence[Tensor], levels: Sequence[Level]) -> Tensor:
    """Decode head maps, one (B, na*no, ny, nx) per level, into predictions (B, sum na*ny*nx, no).

    Output rows: centre x, y, width, height in pixels of the network input, objectness and
    class probabilities; order per level (anchor, row, column), levels one after another.
    """
    return torch.cat([decode_level(raw, level) for raw, level in zip(maps, levels)], 1)


def decode_level(raw: Tensor, level: Level) -> Tensor:
    """One level of `decode`: (B, na*no, ny, nx) -> (B, na*ny*nx, no)."""
    level = level.to(raw.device)
    p = split_anchors(raw, len(level.anchors))
    b, na, ny, nx, no = p.shape
    grid_y, grid_x = torch.meshgrid(torch.arange(ny, device=raw.device), torch.arange(nx, device=raw.device), indexing="ij")
    grid = torch.stack((grid_x, grid_y), -1).float()
    xy, wh = level.boxes(p[..., :4], level.anchors.view(na, 1, 1, 2))
    return torch.cat(((xy + grid) * level.stride, wh, p[..., 4:].float().sigmoid()), -1).reshape(b, na * ny * nx, no)


def decode_candidates(maps: Sequence[Tensor], levels: Sequence[Level], threshold: float) -> list[Tensor]:
    """Decode only what can be a detection: per image, the rows of `decode` whose objectness exceeds `threshold`, in the same order.

    Arguments as for `decode`; returns one (n, no) tensor per image. A few rows within rounding of the threshold come along:
    `non_max_suppression` tests the decoded objectness itself. At a threshold of 0.001 a trained network leaves a few in a
    hundred of its rows, and the sigmoid of all the others is most of what `decode` costs.
    """
    found = [_level_candidates(raw, level, threshold) for raw, level in zip(maps, levels)]
    return [torch.cat(parts) for parts in zip(*found)]


def _level_candidates(raw: Tensor, level: Level, threshold: float) -> tuple[Tensor, ...]:
    """One level of `decode_candidates`: (B, na*no, ny, nx) -> per image (n, no)."""
    p = split_anchors(raw, len(level.anchors))
    image, anchor, y, x = (p[..., 4].float() > _logit(threshold) - LOGIT_SLACK).nonzero(as_tuple=True)
    rows = p[image, anchor, y, x].float()
    xy, wh = level.boxes(rows[:, :4], level.to(raw.device).anchors[anchor])
    decoded = torch.cat(((xy + torch.stack((x, y), -1)) * level.stride, wh, rows[:, 4:].sigmoid()), -1)
    return decoded.split(torch.bincount(image, minlength=len(raw)).tolist())


def _logit(probability: float) -> float:
    if not 0 < probability < 1:
        return math.copysign(math.inf, probability - 0.5)
    return math.log(probability / (1 - probability))
