"""Objectives: detection, and detection with distillation from a teacher that lives inside the objective."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from models.network import Network
from utils.decode import decode_boxes, split_anchors
from utils.loss import DetectionLoss


class DetectionObjective:
    """YOLOv5's detection loss."""

    names = ("box_loss", "obj_loss", "cls_loss")

    def __init__(self, loss: DetectionLoss) -> None:
        self.loss = loss

    def __call__(self, network: Network, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
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

        box = sum(a * |decode(s) - decode(t)|_1 / (sides of t)) / sum(a)     centre and size decoded as YOLOv5 decodes them
        cls = sum(a * BCE(s_cls, sigmoid(t_cls))) / sum(a)
        obj = sum(BCE(s_obj, a) - H(a)) / sum(a)                             i.e. KL, per unit of attention
        term = weight * (box * options.box + obj * options.obj + cls * options.cls) * batch size / levels

    Every sum runs over all anchor cells of the batch and is divided by the attention in it, so the terms keep their size when the
    batch, the image or the number of levels changes; the factor of the batch size is the one that YOLOv5's own loss has. Weighting
    by the teacher's objectness follows Mehta & Ozturk, "Object detection at 200 frames per second" (2018).
    """

    names = ("box_loss", "obj_loss", "cls_loss", "distill_loss")

    def __init__(self, loss: DetectionLoss, teacher: Network, options: DistillOptions = DistillOptions()) -> None:
        self.loss, self.teacher, self.options = loss, teacher.eval().requires_grad_(False), options
        self.anchors = teacher.anchors

    def __call__(self, network: Network, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        maps = network(images)
        total, parts = self.loss(maps, targets)
        with torch.no_grad():
            wanted = self.teacher(images)
        term = sum(self._level(s, t, a) for s, t, a in zip(maps, wanted, self.anchors)) * (self.options.weight / len(maps))
        return total + term * images.shape[0], torch.cat((parts, term.detach().view(1)))

    def _level(self, student: Tensor, teacher: Tensor, anchors: Tensor) -> Tensor:
        o, na = self.options, len(anchors)
        s, t = split_anchors(student, na).float(), split_anchors(teacher, na).float()
        attention = t[..., 4].sigmoid()
        total = attention.sum().clamp(min=1e-3)
        shape = anchors.to(student.device).view(na, 1, 1, 2)
        (s_xy, s_wh), (t_xy, t_wh) = decode_boxes(s[..., :4], shape), decode_boxes(t[..., :4], shape)
        box = (s_xy - t_xy).abs().sum(-1) / 2 + ((s_wh - t_wh).abs() / t_wh.clamp(min=1.0)).sum(-1) / 2
        entropy = F.binary_cross_entropy(attention, attention)
        obj = (F.binary_cross_entropy_with_logits(s[..., 4], attention) - entropy) * attention.numel()
        loss = o.box * (attention * box).sum() + o.obj * obj
        if s.shape[-1] > 6:  # more than one class
            bce = F.binary_cross_entropy_with_logits(s[..., 5:], t[..., 5:].sigmoid(), reduction="none").mean(-1)
            loss = loss + o.cls * (attention * bce).sum()
        return loss / total
