"""Exponential moving average of a network, buffers included, with YOLOv5's growing decay."""

from __future__ import annotations

import copy
from math import exp

import torch

from models.network import QUANTIZATION, Network


class Ema:
    """`network` follows the trained one: ema = d * ema + (1 - d) * model with d = 0.9999 * (1 - exp(-updates / 2000))."""

    def __init__(self, network: Network, decay: float = 0.9999, tau: float = 2000.0) -> None:
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self.updates, self.decay, self.tau = 0, decay, tau

    @torch.no_grad()
    def update(self, network: Network) -> None:
        """Move one step towards `network`. Integer buffers are copied, and so are the ranges of a quantisation, moving averages themselves."""
        self.updates += 1
        weight = 1 - self.decay * (1 - exp(-self.updates / self.tau))
        mine, theirs = self.network.state_dict(), network.state_dict()
        floats = [k for k, v in mine.items() if v.is_floating_point() and not k.startswith(QUANTIZATION)]
        torch._foreach_lerp_([mine[k] for k in floats], [theirs[k] for k in floats], weight)
        for key in mine.keys() - set(floats):
            mine[key].copy_(theirs[key])
        if self.network.quantization is not None:
            self.network.quantization.observed = network.quantization.observed
