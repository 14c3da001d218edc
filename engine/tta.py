"""Test-time augmentation as in YOLOv5: the views of a batch that a network sees, and the way back of what it finds in them.

Plain inference is the case of one view, the image itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.decode import Level, decode_candidates

PAD = 0.447  # ImageNet's mean grey


@dataclass(frozen=True)
class View:
    """A batch scaled by `scale` and, with `flip`, mirrored left to right; `levels`: start and stop of the head's levels that are kept."""

    scale: float = 1.0
    flip: bool = False
    levels: tuple[int | None, int | None] = (None, None)

    def of(self, images: Tensor, stride: int) -> Tensor:
        """Return (B, 3, h, w) of `images` (B, 3, H, W): h and w multiples of `stride`, padded on the right and below."""
        if self.flip:
            images = images.flip(3)
        if self.scale == 1:
            return images
        sides = images.shape[2:]
        height, width = (int(side * self.scale) for side in sides)
        scaled = F.interpolate(images, (height, width), mode="bilinear", align_corners=False)
        down, right = (math.ceil(side * self.scale / stride) * stride - size for side, size in zip(sides, (height, width)))
        return F.pad(scaled, (0, right, 0, down), value=PAD)

    def back(self, rows: Tensor, width: int) -> Tensor:
        """Return decoded `rows` (n, 5 + nc) with xywh in pixels of the images themselves, which are `width` pixels wide."""
        if not self.flip and self.scale == 1:
            return rows
        x, y, w, h = (rows[:, :4] / self.scale).unbind(1)
        return torch.cat([torch.stack([width - x if self.flip else x, y, w, h], 1), rows[:, 4:]], 1)


PLAIN = (View(),)
# A large object is found in a small view, a small one in a large view: the levels that say otherwise are left out.
AUGMENTED = (View(levels=(None, -1)), View(0.83, flip=True), View(0.67, levels=(1, None)))


def candidates(
    maps: Sequence[Sequence[Tensor]], views: Sequence[View], levels: Sequence[Level], width: int, threshold: float
) -> list[Tensor]:
    """Decode what can be a detection in any of the views: per image (n, 5 + nc), views one after another.

    maps: per view the raw head maps, level by level.  levels: how each level decodes.  width: of the images, pixels.
    threshold: least objectness.  A detector with one level keeps it in every view.
    """
    found = []
    for raw, view in zip(maps, views):
        kept = slice(*view.levels) if len(levels) > 1 else slice(None)
        rows = decode_candidates(raw[kept], levels[kept], threshold)
        found.append([view.back(r, width) for r in rows])
    return [torch.cat(parts) for parts in zip(*found)]
