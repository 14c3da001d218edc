"""Scores of a loaded model by any criterion; `taylor` looks at training images."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.recalibrate import training_batches
from models.checkpoint import Model
from pruning.criteria import DEFAULT_NORMALIZE, Scores, normalized, scores_of, taylor_scores
from utils.loss import DetectionLoss


@dataclass(frozen=True)
class Scoring:
    """How channels are judged. `normalize` empty: the criterion's own. `batches`: of training images, for taylor. `seed`: for random
    scores and for which images taylor sees."""

    criterion: str = "gamma"
    normalize: str = ""
    batches: int = 8
    seed: int = 0

    @property
    def normalization(self) -> str:
        """The normalisation in force."""
        return self.normalize or DEFAULT_NORMALIZE[self.criterion]


@dataclass(frozen=True)
class CalibrationData:
    """Where training images come from, where a criterion or a recalibration needs them."""

    data: str
    imgsz: int
    batch_size: int
    device: torch.device
    workers: int = 0


def score_model(model: Model, scoring: Scoring, source: CalibrationData) -> Scores:
    """The normalised scores of `model`'s blocks. Reads training images for taylor alone."""
    if scoring.criterion != "taylor":
        scores = scores_of(model.blocks, model.state, scoring.criterion, scoring.seed)
    else:
        network = model.network().to(source.device, memory_format=torch.channels_last)
        loss = DetectionLoss(network.anchors, network.strides, network.classes, source.imgsz)
        batches = training_batches(
            source.data, network, source.imgsz, source.batch_size, scoring.batches, source.device, source.workers, scoring.seed
        )
        scores = taylor_scores(network, batches, loss)
    return normalized(scores, scoring.normalization)
