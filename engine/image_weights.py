"""`--image-weights`: images with rare or badly found classes are drawn more often (YOLOv5's rule)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from engine.loop import Loop
from utils.dataset import EpochLoader
from utils.metrics import APResult


class ImageWeights:
    """Transition that draws each epoch's images with replacement, in proportion to the summed weights of their labels' classes.

    A class weighs 1 / its number of labels (1 where it has none), normalised to sum 1, times (1 - its mAP@.5:.95 in the last
    evaluation)^2. `labels`: per image (n, 5), class first.
    """

    def __init__(self, loader: EpochLoader, labels: Sequence[np.ndarray], nc: int, seed: int) -> None:
        self.loader, self.nc, self.seed = loader, nc, seed
        self.counts = np.stack([np.bincount(rows[:, 0].astype(int), minlength=nc) for rows in labels])
        self.maps = np.zeros(nc)

    def observe(self, result: APResult) -> None:
        """Take the mAP of each class from an evaluation; classes without labels in it count as the mean."""
        self.maps = np.full(self.nc, float(result.map))
        self.maps[result.classes] = result.ap.mean(1)

    def weights(self) -> np.ndarray:
        """(images,) weights, not normalised."""
        total = self.counts.sum(0)
        classes = 1 / np.where(total == 0, 1, total)
        return self.counts @ (classes / classes.sum() * (1 - self.maps) ** 2)

    def before_epoch(self, loop: Loop, epoch: int) -> None:
        weights = self.weights()
        if not weights.sum() > 0:  # no label anywhere, or every class perfect
            self.loader.draw(None)
            return
        rng = np.random.default_rng([self.seed, epoch, 1])
        self.loader.draw(rng.choice(len(weights), len(weights), p=weights / weights.sum()))

    def state_dict(self) -> dict[str, Any]:
        return {"maps": self.maps.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.maps = np.array(state["maps"])
