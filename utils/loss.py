"""YOLOv5's target assignment and detection loss (v7.0), vectorised over anchors, targets and cells.

Coordinates are in cells of a level's grid unless said otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.boxes import ciou
from utils.decode import decode_boxes, split_anchors
from utils.world import SOLO, World

_BALANCE = {3: (4.0, 1.0, 0.4)}
_BALANCE_OTHER = (4.0, 1.0, 0.25, 0.06, 0.02)


@dataclass(frozen=True)
class LossOptions:
    """Gains and shapes of the loss, as in a hyp file (before scaling by levels, classes and image size)."""

    box: float = 0.05
    cls: float = 0.5
    cls_pw: float = 1.0
    obj: float = 1.0
    obj_pw: float = 1.0
    anchor_t: float = 4.0
    fl_gamma: float = 0.0
    label_smoothing: float = 0.0


@dataclass(frozen=True)
class Matches:
    """Targets assigned to one level: `image`, `anchor`, `row`, `column`, `cls` (n,) long; `box` (n, 4): offset of the centre from the
    cell, width, height, in cells."""

    image: Tensor
    anchor: Tensor
    row: Tensor
    column: Tensor
    cls: Tensor
    box: Tensor


def assign(targets: Tensor, anchors: Tensor, rows: int, columns: int, anchor_t: float) -> Matches:
    """Assign targets (m, 6: image, class, centre x, y, width, height in 0..1) to the cells of a `rows` x `columns` grid.

    An anchor (na, 2; cells) takes a target if no side differs by the factor `anchor_t` or more; the target's own cell and the
    one or two nearest neighbours take it.
    """
    size = targets.new_tensor([columns, rows])
    centre, wh = targets[:, 2:4] * size, targets[:, 4:6] * size
    ratio = wh[None] / anchors[:, None]
    a, t = (torch.max(ratio, 1 / ratio).amax(2) < anchor_t).nonzero(as_tuple=True)
    xy = centre[t]
    low = (xy % 1 < 0.5) & (xy > 1)  # (n, 2): the left and the upper neighbour
    rest = size - xy
    high = (rest % 1 < 0.5) & (rest > 1)  # the right and the lower one
    chosen = torch.cat((torch.ones_like(low[:, :1]), low, high), 1).T  # (5, n)
    shifts = xy.new_tensor([[0, 0], [0.5, 0], [0, 0.5], [-0.5, 0], [0, -0.5]])
    which, n = chosen.nonzero(as_tuple=True)
    cell = (xy[n] - shifts[which]).long()
    column, row = cell[:, 0].clamp(0, columns - 1), cell[:, 1].clamp(0, rows - 1)
    box = torch.cat((xy[n] - torch.stack((column, row), 1), wh[t[n]]), 1)
    return Matches(targets[t[n], 0].long(), a[n], row, column, targets[t[n], 1].long(), box)


class _Pick(torch.autograd.Function):
    """The two parts of a head map that the loss reads: matched cells (n, no), and every cell's objectness (B, na, ny, nx).

    Plain indexing would build a map of zeros for the gradient of each part and add the two; here one map takes both.
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, raw: Tensor, na: int, *index: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(*index)
        ctx.like, ctx.na = torch.empty_like(raw, device="meta"), na
        p = split_anchors(raw, na)
        return p[index], p[..., 4]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, cells: Tensor, objectness: Tensor) -> tuple[Tensor | None, ...]:
        raw = torch.zeros_like(ctx.like, device=cells.device)
        p = split_anchors(raw, ctx.na)
        p.index_put_(ctx.saved_tensors, cells, accumulate=True)
        p[..., 4] += objectness
        return raw, None, *(None for _ in ctx.saved_tensors)


class DetectionLoss:
    """Box (CIoU), objectness and class loss of raw head maps against targets.

    `anchors` (levels, na, 2) in pixels; `nc` classes; `imgsz` the training size in pixels, which scales the objectness gain. With
    several processes in `world`, every mean is one over the whole batch: averaged over the processes, loss, parts and gradients are
    those of one process that has all of it. `samples`: of which an image is made (`--quad`: 4); the batch size counts them.
    """

    def __init__(
        self, anchors: Tensor, strides: Sequence[int], nc: int, imgsz: int, options: LossOptions = LossOptions(), world: World = SOLO,
        samples: int = 1,
    ) -> None:  # fmt: skip
        levels = len(strides)
        self.world, self.samples = world, samples
        self.anchors = [a / s for a, s in zip(anchors, strides)]
        self.nc, self.options = nc, options
        self.balance = _BALANCE.get(levels, _BALANCE_OTHER[:levels])
        self.box_gain = options.box * 3 / levels
        self.cls_gain = options.cls * nc / 80 * 3 / levels
        self.obj_gain = options.obj * (imgsz / 640) ** 2 * 3 / levels

    def alone(self) -> DetectionLoss:
        """The same loss over the batches of this process alone: for evaluation, where the processes do not move in step."""
        loss = copy(self)
        loss.world = SOLO
        return loss

    def __call__(self, maps: Sequence[Tensor], targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss (scalar, times the batch size as in YOLOv5) and its detached parts (3,): box, objectness, class, with gains.

        `maps`: (B, na*(5+nc), ny, nx) raw logits per level; `targets`: (m, 6) as in `assign`.
        """
        anchors = [a.to(raw.device) for a, raw in zip(self.anchors, maps)]
        matches = [assign(targets, a, raw.shape[2], raw.shape[3], self.options.anchor_t) for a, raw in zip(anchors, maps)]
        images = maps[0].shape[0]
        counts = targets.new_tensor([len(m.image) for m in matches] + [images])
        total = self.world.total(counts)
        *shares, image_share = self.world.share(counts, total)
        parts = torch.zeros(3, device=targets.device)
        for raw, a, m, balance, share in zip(maps, anchors, matches, self.balance, shares):
            parts = parts + self._level(raw, a, m, balance) * torch.stack((share, image_share, share))
        parts = parts * parts.new_tensor([self.box_gain, self.obj_gain, self.cls_gain])
        return parts.sum() * (total[-1] * self.samples), parts.detach()

    def _level(self, raw: Tensor, anchors: Tensor, m: Matches, balance: float) -> Tensor:
        index = m.image, m.anchor, m.row, m.column
        picked, objectness = _Pick.apply(raw, len(anchors), *index)
        wanted = torch.zeros(objectness.shape, device=raw.device)
        box = cls = torch.zeros((), device=raw.device)
        if len(m.image):
            picked = picked.float()
            xy, wh = decode_boxes(picked[:, :4], anchors[m.anchor])
            iou = ciou(torch.cat((xy, wh), 1), m.box)
            box = (1 - iou).mean()
            wanted[index] = iou.detach().clamp(min=0)
            if self.nc > 1:
                cls = self._class_loss(picked[:, 5:], m.cls)
        obj = self._bce(objectness.float(), wanted, self.options.obj_pw) * balance
        return torch.stack((box, obj, cls))

    def _class_loss(self, logits: Tensor, cls: Tensor) -> Tensor:
        eps = self.options.label_smoothing
        wanted = torch.full_like(logits, 0.5 * eps)
        wanted[torch.arange(len(cls), device=cls.device), cls] = 1 - 0.5 * eps
        return self._bce(logits, wanted, self.options.cls_pw)

    def _bce(self, logits: Tensor, wanted: Tensor, positive: float) -> Tensor:
        """Mean binary cross-entropy; focal (Lin et al. 2017, alpha 0.25) where `fl_gamma` > 0."""
        weight = None if positive == 1 else logits.new_tensor([positive])
        gamma = self.options.fl_gamma
        if gamma <= 0:
            return F.binary_cross_entropy_with_logits(logits, wanted, pos_weight=weight)
        loss = F.binary_cross_entropy_with_logits(logits, wanted, pos_weight=weight, reduction="none")
        p = logits.sigmoid()
        p_true = wanted * p + (1 - wanted) * (1 - p)
        alpha = wanted * 0.25 + (1 - wanted) * 0.75
        return (loss * alpha * (1 - p_true) ** gamma).mean()
