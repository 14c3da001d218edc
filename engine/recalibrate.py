"""Batches of training images without augmentation, and the re-estimation of batch norm statistics on them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

import torch
from torch import Tensor, nn

from models.network import Network
from utils.data_config import read_data
from utils.dataset import DatasetOptions, DetectionDataset, make_loader
from utils.device import Precision, evaluation_workers
from utils.labels import scan_labels


def training_batches(
    data: str, network: Network, imgsz: int, batch_size: int, count: int, device: torch.device, workers: int = 0, seed: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """`count` batches of the training split, drawn by `seed`: (B, channels, imgsz, imgsz) float images in 0..1 and (m, 6) targets.

    Images are letterboxed as for evaluation, since that is what the network will see; a small dataset is gone through again.
    """
    config = read_data(data, ("train",))
    single = network.classes == 1
    options = DatasetOptions(
        imgsz, stride=network.max_stride, batch_size=batch_size, single_cls=single, seed=seed, channels=network.channels
    )
    loader = make_loader(DetectionDataset(scan_labels(config.train, config.nc), options), evaluation_workers(workers, device), shuffle=True)
    precision = Precision(device)

    def endless() -> Iterator:
        epoch = 0
        while True:
            yield from loader.epoch(epoch)
            epoch += 1

    for batch in islice(endless(), count):
        yield precision.images(batch.images), batch.targets.to(device)


@torch.no_grad()
def recalibrate(network: Network, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Re-estimate, in place, the running statistics of every batch norm as the mean over `batches`; nothing else changes.

    A cut changes what every later layer sees, while the statistics are still those of the full network. `network` comes back in eval mode.
    """
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    network.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # torch's cumulative mean
        norm.train()
    for images, _ in batches:
        network(images)
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum
    network.eval()
