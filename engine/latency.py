"""Latency of networks side by side: interleaved, so that a slow moment of the machine hits all of them alike."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

import torch

from models.network import Network
from utils.device import Precision


@torch.no_grad()
def latency_ms(networks: Mapping[str, Network], imgsz: int, device: torch.device, repeats: int = 30, batch: int = 1) -> dict[str, float]:
    """Median milliseconds of a forward pass of each network on one random (batch, channels, imgsz, imgsz) input, in turns, after a warm-up."""
    clock = Precision(device).clock
    channels = next(iter(networks.values())).channels
    images = torch.rand(batch, channels, imgsz, imgsz, device=device).contiguous(memory_format=torch.channels_last)
    times: dict[str, list[float]] = {name: [] for name in networks}
    for round_ in range(repeats + 3):
        for name, network in networks.items():
            start = clock()
            network(images)
            if round_ >= 3:
                times[name].append(clock() - start)
    return {name: statistics.median(values) * 1e3 for name, values in times.items()}
