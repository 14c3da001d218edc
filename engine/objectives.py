"""Objectives: detection, and detection with distillation from a teacher that lives inside the objective."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.seams import Forward
from models.network import Network
from utils.decode import Level, decode_boxes, split_anchors
from utils.loss import DetectionLoss


class DetectionObjective:
    """YOLOv5's detection loss."""

    names = ("box_loss", "obj_loss", "cls_loss")

    def __init__(self, loss: DetectionLoss) -> None:
        self.loss = loss

    def __call__(self, network: Forward, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return self.loss(network(images), targets)


@dataclass(frozen=True)
class DistillOptions:
    """Weights of the distillation terms, each a mean over the teacher's attention and so independent of batch and grid size."""

    weight: float = 1.0
    box: float = 2.0
    obj: float = 4.0
    cls: float = 2.0


class DistillationObjective:
    """Detection loss plus a term that pulls the student's outputs to the teacher's.

    With a = the teacher's objectness probability of each anchor cell (detached), per level and summed over levels::

        box = sum(a * (mean |d centre| in cells + mean |d side| / t's side)) / sum(a)     each decoded as its network decodes
        obj = sum(KL(a || sigmoid(s_obj))) / sum(a)
        cls = sum(a * mean KL(sigmoid(t_cls) || sigmoid(s_cls))) / sum(a)
        term = weight * (box * options.box + obj * options.obj + cls * options.cls) * batch size / levels

    so that the term is zero where the student equals the teacher.
    Every sum runs over all anchor cells of the batch and is divided by the attention in it, so the terms keep their size when the
    batch, the image or the number of levels changes; the factor of the batch size is the one that YOLOv5's own loss has. Weighting
    by the teacher's objectness follows Mehta & Ozturk, "Object detection at 200 frames per second" (2018).
    """

    names = ("box_loss", "obj_loss", "cls_loss", "distill_loss")

    def __init__(self, loss: DetectionLoss, teacher: Network, anchors: Tensor, options: DistillOptions = DistillOptions()) -> None:
        """`anchors`: the student's, (levels, na, 2) in pixels."""
        self.loss, self.teacher, self.options = loss, teacher.eval().requires_grad_(False), options
        self.heads = list(zip(anchors, teacher.levels))

    def __call__(self, network: Forward, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        maps = network(images)
        total, parts = self.loss(maps, targets)
        with torch.no_grad():
            wanted = self.teacher(images)
        attention = [split_anchors(t, len(a)).float()[..., 4].sigmoid() for t, (a, _) in zip(wanted, self.heads)]
        counts = torch.stack([*(a.sum() for a in attention), attention[0].new_tensor(len(images))])
        sums = self.loss.world.total(counts)
        levels = zip(maps, wanted, attention, self.heads, self.loss.world.share(counts, sums))
        term = sum(self._level(s, t, a, *heads) * share for s, t, a, heads, share in levels) * (self.options.weight / len(maps))
        return total + term * (sums[-1] * self.loss.samples), torch.cat((parts, term.detach().view(1)))

    def _level(self, student: Tensor, teacher: Tensor, attention: Tensor, anchors: Tensor, head: Level) -> Tensor:
        o, na = self.options, len(anchors)
        s, t = split_anchors(student, na).float(), split_anchors(teacher, na).float()
        own, theirs = (a.to(student.device).view(na, 1, 1, 2) for a in (anchors, head.anchors))
        (s_xy, s_wh), (t_xy, t_wh) = decode_boxes(s[..., :4], own), head.boxes(t[..., :4], theirs)
        box = (s_xy - t_xy).abs().sum(-1) / 2 + ((s_wh - t_wh).abs() / t_wh.clamp(min=1.0)).sum(-1) / 2
        loss = o.box * (attention * box).sum() + o.obj * _binary_kl(t[..., 4], s[..., 4]).sum()
        if s.shape[-1] > 6:  # more than one class
            loss = loss + o.cls * (attention * _binary_kl(t[..., 5:], s[..., 5:]).mean(-1)).sum()
        return loss / attention.sum().clamp(min=1e-3)


def _binary_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(sigmoid(teacher) || sigmoid(student)) of logits, elementwise; differentiable in the student."""
    p = teacher.sigmoid()
    return p * (F.logsigmoid(teacher) - F.logsigmoid(student)) + (1 - p) * (F.logsigmoid(-teacher) - F.logsigmoid(-student))
