"""Objectives: detection, and detection with distillation from a teacher that lives inside the objective; and how a teacher is read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.seams import Forward
from models.checkpoint import load_model, require_detector
from models.network import Network, fuse
from utils.decode import Level, decode_boxes, split_anchors
from utils.errors import InputError
from utils.log import LOGGER
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
    """Weights of the distillation terms, each a mean over the teacher's attention and so independent of batch and grid size.

    `temperature` T: the divergences are those of the logits divided by T, times T^2, which keeps their gradients' size (Hinton et al. 2015).
    """

    weight: float = 1.0
    box: float = 2.0
    obj: float = 4.0
    cls: float = 2.0
    temperature: float = 1.0


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
        term, scale = self.term(maps, images)
        return total + term * scale, torch.cat((parts, term.detach().view(1)))

    def term(self, maps: list[Tensor], images: Tensor) -> tuple[Tensor, Tensor]:
        """The term of the student's `maps`, before the factor of the batch size, and that factor."""
        with torch.no_grad():
            wanted = self.teacher(images)
        attention = [split_anchors(t, len(a)).float()[..., 4].sigmoid() for t, (a, _) in zip(wanted, self.heads)]
        counts = torch.stack([*(a.sum() for a in attention), attention[0].new_tensor(len(images))])
        sums = self.loss.world.total(counts)
        levels = zip(maps, wanted, attention, self.heads, self.loss.world.share(counts, sums))
        term = sum(self._level(s, t, a, *heads) * share for s, t, a, heads, share in levels) * (self.options.weight / len(maps))
        return term, sums[-1] * self.loss.samples

    def _level(self, student: Tensor, teacher: Tensor, attention: Tensor, anchors: Tensor, head: Level) -> Tensor:
        o, na = self.options, len(anchors)
        s, t = split_anchors(student, na).float(), split_anchors(teacher, na).float()
        own, theirs = (a.to(student.device).view(na, 1, 1, 2) for a in (anchors, head.anchors))
        (s_xy, s_wh), (t_xy, t_wh) = decode_boxes(s[..., :4], own), head.boxes(t[..., :4], theirs)
        box = (s_xy - t_xy).abs().sum(-1) / 2 + ((s_wh - t_wh).abs() / t_wh.clamp(min=1.0)).sum(-1) / 2
        loss = o.box * (attention * box).sum() + o.obj * self._kl(t[..., 4], s[..., 4]).sum()
        if s.shape[-1] > 6:  # more than one class
            loss = loss + o.cls * (attention * self._kl(t[..., 5:], s[..., 5:]).mean(-1)).sum()
        return loss / attention.sum().clamp(min=1e-3)

    def _kl(self, teacher: Tensor, student: Tensor) -> Tensor:
        t = self.options.temperature
        return _binary_kl(teacher, student) if t == 1 else _binary_kl(teacher / t, student / t) * t**2


def _binary_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(sigmoid(teacher) || sigmoid(student)) of logits, elementwise; differentiable in the student."""
    p = teacher.sigmoid()
    return p * (F.logsigmoid(teacher) - F.logsigmoid(student)) + (1 - p) * (F.logsigmoid(-teacher) - F.logsigmoid(-student))


def read_teacher(weights: str, cfg: str, student: Network, device: torch.device) -> Network:
    """The fused network of the checkpoint `weights` (its structure from `cfg`, if given) on `device`.

    Raises `InputError` where its outputs cannot be compared with the student's cell by cell.
    """
    teacher = fuse(require_detector(load_model(weights, cfg or None), weights).network()).to(device, memory_format=torch.channels_last)
    if teacher.channels != student.channels:
        raise InputError(
            f"--t_weight {weights}: the teacher reads images of {teacher.channels} channels, the student of {student.channels}"
        )
    if (teacher.classes, teacher.strides, teacher.anchors.shape) != (student.classes, student.strides, student.anchors.shape):
        raise InputError(
            f"--t_weight {weights}: the teacher has {teacher.classes} classes at strides {teacher.strides}, "
            f"the student {student.classes} at {student.strides}; distillation compares their outputs cell by cell, so use a teacher trained on the same classes"
        )
    if not torch.allclose(teacher.anchors, student.anchors):
        LOGGER.info("the teacher's anchors differ from the student's; each is decoded with its own")
    return teacher
