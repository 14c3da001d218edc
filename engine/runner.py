"""How a batch of images becomes detections, whatever computes them: torch's network, or an exported model in another program.

The steps are apart because they run apart: evaluation suppresses one batch's boxes in a thread while the next batch is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from engine.runtime import Runtime
from engine.tta import AUGMENTED, PLAIN, candidates
from models.network import Network
from utils.device import Precision
from utils.nms import non_max_suppression

Suppressor = Callable[..., list[Tensor]]


class Runner(Protocol):
    """`suppress`: as `utils.nms.non_max_suppression`, from what `candidates` gives."""

    suppress: Suppressor

    def forward(self, images: Tensor) -> Any:
        """Where the time goes: float32 (B, C, H, W) in 0..1 -> what `candidates` understands."""

    def candidates(self, raw: Any, width: int, threshold: float) -> Sequence[Tensor]:
        """Per image the rows that can be detections at the confidence `threshold`; `width` of the images in pixels."""


class NetworkRunner:
    """torch's network, put into eval mode: raw head maps, of which only what can be a detection is decoded. `augment`: see `engine/tta.py`."""

    suppress = staticmethod(non_max_suppression)

    def __init__(self, network: Network, precision: Precision, augment: bool = False) -> None:
        self.network, self.precision = network.eval(), precision
        self.views = AUGMENTED if augment else PLAIN
        self.levels = [level.to(precision.device) for level in network.levels]

    def forward(self, images: Tensor) -> list[list[Tensor]]:
        """Per view the head's maps, level by level."""
        with self.precision.autocast():
            return [self.network(view.of(images, self.network.max_stride)) for view in self.views]

    def candidates(self, raw: list[list[Tensor]], width: int, threshold: float) -> list[Tensor]:
        return candidates(raw, self.views, self.levels, width, threshold)


class RuntimeRunner:
    """An exported model, which decodes its boxes itself, and may suppress them too."""

    def __init__(self, runtime: Runtime) -> None:
        self.forward = runtime
        self.suppress = chosen if runtime.metadata.nms else non_max_suppression

    def candidates(self, raw: Tensor, width: int, threshold: float) -> Tensor:
        return raw


def runner_of(network: Network | Runtime, precision: Precision, augment: bool = False) -> Runner:
    """The runner of `network`, which lies on the precision's device."""
    return RuntimeRunner(network) if isinstance(network, Runtime) else NetworkRunner(network, precision, augment)


def chosen(
    rows: Sequence[Tensor], conf_threshold: float, iou_threshold: float = 0.0, classes: Sequence[int] | None = None,
    agnostic: bool = False, multi_label: bool = False, max_det: int = 300,
) -> list[Tensor]:  # fmt: skip
    """The `non_max_suppression` of what is suppressed already: rows (B, n, 6) of x1, y1, x2, y2, confidence, class, best first, zeros at the end.

    Confidence, classes and number are left to choose; what suppressed what was decided when the file was made.
    """
    found = []
    for row in rows:
        kept = row[row[:, 4] > max(conf_threshold, 0.0)]
        if classes is not None:
            kept = kept[torch.isin(kept[:, 5], kept.new_tensor(list(classes)))]
        found.append(kept[:max_det])
    return found
