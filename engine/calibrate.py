"""Calibration: the ranges of a quantised network from real images, without training.

Images of the training split pass through the float network twice: for the smallest and largest value of each member of the plan, then for its histogram.
`utils/thresholds.py` says where the tails are cut.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from engine.inference import inference_network
from engine.recalibrate import training_batches
from models.blocks import is_classifier
from models.checkpoint import Model
from models.network import Network
from models.quantization import QuantPlan, QuantScheme, Ranges, quantize
from utils.device import Precision
from utils.errors import InputError, did_you_mean
from utils.log import LOGGER
from utils.thresholds import METHODS, entropy_threshold, percentile_range

BINS = 2048  # of |x|: the last of 128 levels is then still 16 bins
METHOD, IMAGES = "percentile", 128
Batches = Callable[[], Iterator[Tensor]]  # each call: the same images again


@dataclass(frozen=True)
class CalibrationOptions:
    """How ranges are found. `images`: how many of the training split. `imgsz` None: the size that the checkpoint was trained at."""

    data: str
    method: str = METHOD
    images: int = IMAGES
    imgsz: int | None = None
    batch_size: int = 8
    scheme: QuantScheme = QuantScheme()
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InputError(f"--calibration {self.method}: known are {', '.join(METHODS)}{did_you_mean(self.method, METHODS)}")
        if self.images < 1:
            raise InputError(f"--calibration-images {self.images}: give at least 1")
        if not self.data:
            raise InputError("calibration needs images: name a data set with --data")


def calibrated(model: Model, options: CalibrationOptions, device: torch.device, weights: str = "the model") -> Model:
    """`model` quantised, with ranges from `options.images` training images; `weights`: what it is called in messages.

    Raises `InputError` for what is quantised already, a classifier, data without images, and a network that gives what is no number.
    """
    if model.quantization is not None:
        raise InputError(f"{weights}: is quantised already, and cannot be quantised twice; start from the checkpoint before quantisation")
    if is_classifier(model.blocks):
        raise InputError(f"{weights}: is a classifier, and calibration reads detection data; only detectors are quantised here")
    network = inference_network(model.network(), Precision(device))
    size, batch = options.imgsz or model.imgsz, min(options.batch_size, options.images)

    def images() -> Iterator[Tensor]:
        left = options.images
        count = math.ceil(options.images / batch)
        for found, _ in training_batches(options.data, network, size, batch, count, device, seed=options.seed):
            yield found[:left]
            left -= len(found[:left])

    ranges = find_ranges(network, images, options.scheme, options.method, math.ceil(options.images / batch))
    LOGGER.info(f"calibration: {len(ranges)} ranges from {options.images} images of {options.data} at {size} px, {options.method}")
    return replace(model, quantization=Ranges(options.scheme, ranges))


@torch.no_grad()
def find_ranges(network: Network, images: Batches, scheme: QuantScheme, method: str, count: int) -> dict[str, tuple[float, float]]:
    """The range of each member of `network`, which is quantised in place and looks at `images` as a float network; `count`: of batches, for the bar."""
    quantize(network, scheme)
    network.eval()
    quantization = network.quantization
    plan: QuantPlan = quantization.plan
    passes = 1 if method == "minmax" else 2
    with tqdm(total=passes * count, desc=f"calibration ({method})", leave=False, disable=None) as bar:
        extremes = _Extremes(plan)
        _watch(network, images, extremes, bar)
        low, high = extremes.floored()
        if method != "minmax":
            histograms = _Histograms(low, high)
            _watch(network, images, histograms, bar)
            low, high = _cut(histograms, low, high, method)
    if 0 in plan.sources:  # the image itself, whose 256 levels are the bytes
        low[plan.sources[0]], high[plan.sources[0]] = 0.0, 1.0
    return {name: (float(a), float(b)) for name, a, b in zip(plan.members, low, high)}


def _watch(network: Network, images: Batches, watcher: Callable[[int, Tensor], None], bar: tqdm) -> None:
    network.quantization.watch = watcher
    try:
        for batch in images():
            network(batch)
            bar.update()
    finally:
        network.quantization.watch = None


class _Extremes:
    """The smallest and largest value of each member."""

    def __init__(self, plan: QuantPlan) -> None:
        self.plan = plan
        self.low, self.high = np.full(len(plan.members), np.inf), np.full(len(plan.members), -np.inf)

    def __call__(self, member: int, x: Tensor) -> None:
        low, high = (float(v) for v in torch.aminmax(x))
        if not math.isfinite(low + high):
            raise InputError(f"calibration: {self.plan.members[member]} gives values that are no numbers (NaN or infinite); train the network first")
        self.low[member], self.high[member] = min(self.low[member], low), max(self.high[member], high)

    def floored(self) -> tuple[np.ndarray, np.ndarray]:
        """Ranges (members,) that begin no lower than the plan says."""
        if not np.isfinite(self.low).all():
            raise InputError("calibration: there were no images to look at")
        return np.maximum(self.low, self.plan.floors), self.high


class _Histograms:
    """Counts of each member's values over [-most, most], `most` being the larger end of its range; what lies below is in the first bin."""

    def __init__(self, low: np.ndarray, high: np.ndarray) -> None:
        self.most = np.maximum(np.maximum(-low, high), 1e-12)
        self.counts = np.zeros((len(low), 2 * BINS))

    def __call__(self, member: int, x: Tensor) -> None:
        most = float(self.most[member])
        found = torch.histc(x.float(), 2 * BINS, -most, most).double().cpu().numpy()
        found[0] += x.numel() - found.sum()
        self.counts[member] += found


def _cut(histograms: _Histograms, low: np.ndarray, high: np.ndarray, method: str) -> tuple[np.ndarray, np.ndarray]:
    """`low` and `high` without the tails that `method` leaves out."""
    if method == "percentile":
        ends = np.array([percentile_range(counts, most) for counts, most in zip(histograms.counts, histograms.most)])
        return np.maximum(low, ends[:, 0]), np.minimum(high, ends[:, 1])
    cut = np.array([entropy_threshold(counts, most) for counts, most in zip(histograms.counts, histograms.most)])
    return np.maximum(low, -cut), np.minimum(high, cut)
