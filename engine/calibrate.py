"""Calibration: the ranges of a quantised network from real images, without training.

Images of the training split pass through the float network: once for the smallest and largest value of each member of the plan, and for the methods that
cut tails once more, for a histogram of each. `utils/thresholds.py` says where the tails are cut.
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
from models.blocks import is_classifier
from models.checkpoint import Model
from models.network import Network
from models.quantization import IMAGE, QuantPlan, QuantScheme, Ranges, quantize
from utils.data_config import read_data
from utils.dataset import DatasetOptions, DetectionDataset, make_loader
from utils.device import Precision, evaluation_workers
from utils.errors import InputError, did_you_mean
from utils.flags import multiple
from utils.labels import scan_labels
from utils.log import LOGGER
from utils.thresholds import LEVELS, METHODS, entropy_threshold, percentile_range

BINS = 2048  # of |x|: the last of 128 levels is then still 16 bins
METHOD, IMAGES = "minmax", 128  # of the methods minmax loses least: benchmarks/calibration.py
Batches = Callable[[], Iterator[Tensor]]  # each call: the same images again


@dataclass(frozen=True)
class CalibrationOptions:
    """How ranges are found. `images`: how many of the training split, at most all. `imgsz`: one side, or height and width; None: the size that
    the checkpoint was trained at."""

    data: str
    method: str = METHOD
    images: int = IMAGES
    imgsz: tuple[int, ...] | None = None
    batch_size: int = 8
    workers: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InputError(f"--calibration {self.method}: known are {', '.join(METHODS)}{did_you_mean(self.method, METHODS)}")
        if self.images < 1:
            raise InputError(f"--calibration-images {self.images}: give at least 1")


def calibrated(model: Model, options: CalibrationOptions, scheme: QuantScheme, device: torch.device, weights: str = "the model") -> Model:
    """`model` quantised by `scheme`, with ranges from training images; `weights`: what it is called in messages.

    Raises `InputError` for what is quantised already, a classifier, data without images, and a network that gives what is no number.
    """
    if model.quantization is not None:
        raise InputError(f"{weights}: is quantised already, and cannot be quantised twice; start from the checkpoint before quantisation")
    if is_classifier(model.blocks):
        raise InputError(f"{weights}: is a classifier, and calibration reads detection data; only detectors are quantised here")
    network = inference_network(model.network(), Precision(device))
    dataset = _images(options, model, network, (multiple(s, network.max_stride) for s in options.imgsz or (model.imgsz,)))
    loader = make_loader(dataset, evaluation_workers(options.workers, device))
    precision = Precision(device)

    def images() -> Iterator[Tensor]:
        for batch in loader.epoch(0):
            yield precision.images(batch.images)

    ranges = find_ranges(network, images, scheme, options.method, len(loader))
    height, width = dataset.options.shape
    LOGGER.info(f"calibration: {len(ranges)} ranges from {len(dataset)} images of {options.data} at {height}x{width} px, {options.method}")
    return replace(model, quantization=Ranges(scheme, ranges))


def _images(options: CalibrationOptions, model: Model, network: Network, sides: Iterator[int]) -> DetectionDataset:
    """Images of the training split drawn by the seed, letterboxed as for evaluation."""
    config = read_data(options.data, ("train",))
    if config.nc != len(model.names):
        LOGGER.info(f"{options.data} has {config.nc} classes, and the model {len(model.names)}; only its images are looked at")
    labels = scan_labels(config.train, config.nc)
    count = min(options.images, len(labels))
    if count < options.images:
        LOGGER.info(f"--calibration-images {options.images}: {options.data} has {count} training images, and all of them are used")
    chosen = np.random.default_rng(options.seed).permutation(len(labels))[:count]
    height, *wide = sides
    shape = (height, *wide, height)[:2]
    return DetectionDataset(
        labels.subset(chosen.tolist()),
        DatasetOptions(
            max(shape), stride=network.max_stride, batch_size=options.batch_size, single_cls=True, channels=network.channels, shape=shape
        ),
    )


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
        if method == "minmax":
            low, high = extremes.averaged()
        else:
            histograms = _Histograms(extremes.low, extremes.high)
            _watch(network, images, histograms, bar)
            low, high = _cut(histograms, extremes.low, extremes.high, method, scheme.symmetric)
    if plan.image is not None:
        low[plan.image], high[plan.image] = IMAGE
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
    """The smallest and largest value of each member, in all and averaged over the batches."""

    def __init__(self, plan: QuantPlan) -> None:
        self.plan = plan
        self.low, self.high = np.full(len(plan.members), np.inf), np.full(len(plan.members), -np.inf)
        self._sums, self._counts = np.zeros((2, len(plan.members))), np.zeros(len(plan.members))

    def __call__(self, member: int, x: Tensor) -> None:
        low, high = (float(v) for v in torch.aminmax(x))
        if not math.isfinite(low + high):
            raise InputError(
                f"calibration: {self.plan.members[member]} gives values that are no numbers (NaN or infinite); train the network first"
            )
        low = max(low, self.plan.floors[member])
        self.low[member], self.high[member] = min(self.low[member], low), max(self.high[member], high)
        self._sums[:, member] += low, high
        self._counts[member] += 1

    def averaged(self) -> tuple[np.ndarray, np.ndarray]:
        """The mean of the batches' smallest values and of their largest: (members,) each."""
        low, high = self._sums / self._counts
        return low, high


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


def _cut(histograms: _Histograms, low: np.ndarray, high: np.ndarray, method: str, symmetric: bool) -> tuple[np.ndarray, np.ndarray]:
    """`low` and `high` without the tails that `method` leaves out."""
    if method == "percentile":
        ends = np.array([percentile_range(counts, most) for counts, most in zip(histograms.counts, histograms.most)])
        return np.maximum(low, ends[:, 0]), np.minimum(high, ends[:, 1])
    # |x| has half of the 256 levels where values lie on both sides of zero, and nearly all where they lie on one, as behind SiLU
    share = np.full(len(low), 0.5) if symmetric else histograms.most / np.maximum(high.clip(min=0) - low.clip(max=0), 1e-12)
    levels = (256 * share).round().clip(LEVELS, 256).astype(int)
    cut = np.array([entropy_threshold(*member) for member in zip(histograms.counts, histograms.most, levels)])
    return np.maximum(low, -cut), np.minimum(high, cut)
