"""Optimizers: YOLOv5's parameter groups, found by role."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

GROUPS = ("bias", "weight", "norm")  # YOLOv5 v6.2+ order: x/lr0 is the biases


def parameter_groups(network: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Split the parameters into `bias` (no decay), `weight` (decayed) and `norm` (weights of normalisation layers, no decay)."""
    groups: dict[str, list[nn.Parameter]] = {name: [] for name in GROUPS}
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if name == "bias":
                groups["bias"].append(parameter)
            else:
                groups["norm" if isinstance(module, _BatchNorm) else "weight"].append(parameter)
    return groups


def build_optimizer(network: nn.Module, name: str, lr: float, momentum: float, decay: float) -> torch.optim.Optimizer:
    """SGD (Nesterov), Adam or AdamW with betas (momentum, 0.999). `decay` acts on the `weight` group alone."""
    groups = [
        {"params": parameters, "lr": lr, "role": role, "weight_decay": decay if role == "weight" else 0.0}
        for role, parameters in parameter_groups(network).items()
    ]
    if name == "SGD":
        return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=True, fused=True)
    kind = {"Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}[name]
    return kind(groups, lr=lr, betas=(momentum, 0.999), fused=True)
