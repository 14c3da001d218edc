"""A network as TorchScript: traced with its decoding, so that the file needs neither this project nor Python."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from models.blocks import is_classifier
from models.network import Network, fuse
from utils.decode import decode

CONFIG = "config.txt"  # the extra file that holds the metadata as JSON, as in YOLOv5's exports


class Decoded(nn.Module):
    """A network and what its maps mean: (B, channels, H, W) -> (B, N, 5 + nc) as `decode` gives it, or a classifier's probabilities (B, nc)."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network, self.levels = network, network.levels

    def forward(self, images: Tensor) -> Tensor:
        maps = self.network(images)
        if is_classifier(self.network.blocks):
            return maps[0].flatten(1).softmax(1)
        return decode(maps, self.levels)


def torchscript_bytes(network: Network, images: Tensor, props: Mapping[str, str]) -> bytes:
    """The file of `network`, fused and traced on `images` (B, channels, H, W); `props`: its metadata.

    Nothing in the network depends on the size, so the file takes other batches, heights and widths (multiples of the largest stride) too.
    """
    module = Decoded(fuse(network).cpu()).eval()
    buffer = io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # what is traced are shapes and constants; what comes out is compared by numbers
        traced = torch.jit.trace(module, images, check_trace=False)
        torch.jit.save(traced, buffer, _extra_files={CONFIG: json.dumps(dict(props))})
    return buffer.getvalue()
