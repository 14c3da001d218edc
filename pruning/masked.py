"""The masked network: full width, with the removed channels' activations held at zero. It is the oracle that surgery must equal."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from models.blocks import Block, Blocks
from models.network import Network
from pruning.spaces import Spaces


def masked_network(blocks: Blocks, state: dict[str, Tensor], spaces: Spaces, mask: np.ndarray) -> Network:
    """`Network(blocks)` with `state`, in eval mode, whose convolutions and batch norms multiply their output by the mask of their channels."""
    network = Network(blocks)
    network.load_state_dict(state)
    for index, block in enumerate(blocks):
        keep = mask[spaces.channels[index]]
        if block.kind in ("convolutional", "batchnorm") and not keep.all():
            _mask_output(network.get_submodule(block.name), torch.from_numpy(keep).float().view(1, -1, 1, 1))
    return network.eval()


def _mask_output(module: nn.Module, mask: Tensor) -> None:
    module.register_forward_hook(lambda module, inputs, output: output * mask.to(output.device))


def zero_gamma(blocks: Blocks, state: dict[str, Tensor], spaces: Spaces, mask: np.ndarray) -> dict[str, Tensor]:
    """The predecessors' preview: a state dict with gamma at zero in the removed channels, everything else untouched."""
    state = dict(state)
    for index, block in enumerate(blocks):
        if block.has_gamma:
            state[_gamma(block)] = state[_gamma(block)] * torch.from_numpy(mask[spaces.channels[index]])
    return state


def _gamma(block: Block) -> str:
    return f"{block.bn_path}.weight"


@torch.no_grad()
def largest_difference(a: nn.Module, b: nn.Module, images: Tensor) -> tuple[float, float]:
    """max |difference| of the raw float32 head logits of two networks on `images` (B, 3, H, W), and the bound 1e-4 * max(1, max |logit|)."""
    pairs = list(zip(a(images), b(images)))
    worst = torch.stack([(x - y).abs().max() for x, y in pairs]).max()  # nan stays nan
    return float(worst), 1e-4 * max(1.0, max(float(x.abs().max()) for x, _ in pairs))
