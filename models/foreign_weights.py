"""Weights that come with another program's cfg: Darknet's `.weights`, and the state dicts that the pruning repositories before us saved.

A pruned pair of theirs is a cfg (dialect `yolov5_prune`) and a dict whose `model` holds the tensors of section i as `module_list.i.Conv2d.*` and
`module_list.i.BatchNorm2d.*`. It says neither class names nor the batch norms' constants, which were YOLOv5's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from models.blocks import Blocks
from models.darknet_weights import anchors_state
from models.foreign import ForeignCfg
from utils.errors import InputError


def cfg_beside(weights: Path, cfg: str | Path | None) -> Path:
    """The cfg that goes with `weights`: `cfg` if given, else the file of the same name."""
    if cfg:
        return Path(cfg)
    beside = weights.with_suffix(".cfg")
    if not beside.is_file():
        raise InputError(f"{weights}: says nothing of the structure, and there is no {beside.name} beside it; name the cfg with --cfg")
    return beside


def names_beside(files: tuple[Path, ...], classes: int) -> tuple[str, ...]:
    """Class names from the first `.names` file beside one of `files`, one a line; `class0`, ... where there is none."""
    path = next((p for file in files if (p := file.with_suffix(".names")).is_file()), None)
    if path is None:
        return tuple(f"class{i}" for i in range(classes))
    names = tuple(line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip())
    if len(names) != classes:
        raise InputError(f"{path}: has {len(names)} class names, but the cfg says classes={classes}; correct it or take it away")
    return names


def module_list(content: object) -> Mapping[str, Tensor] | None:
    """The tensors of a pruning repository's checkpoint, if `content` (what `torch.load` gave) is one."""
    model = content.get("model") if isinstance(content, Mapping) else None
    if isinstance(model, Mapping) and model and all(isinstance(k, str) and k.startswith("module_list.") for k in model):
        return model
    return None


def named_tensors(tensors: Mapping[str, Tensor], cfg: ForeignCfg, blocks: Blocks, what: str) -> dict[str, Tensor]:
    """The state dict of a network of `blocks` (those of `cfg`, named) from a repository's `tensors`.

    Raise `InputError`, which begins with `what`, for a tensor of a section that has none.
    """
    paths: dict[str, str] = {}
    for block, section in zip(blocks, cfg.sections):
        if block.kind == "convolutional":
            paths[f"module_list.{section}.Conv2d"] = block.conv_path
        if block.has_gamma:
            paths[f"module_list.{section}.BatchNorm2d"] = block.bn_path
    state = anchors_state(blocks)
    for key, value in tensors.items():
        module, _, name = key.rpartition(".")
        if module not in paths or not isinstance(value, Tensor):
            raise InputError(f"{what}: its {key} belongs to no section of the cfg; use the cfg that was written with these weights")
        state[f"{paths[module]}.{name}"] = value.float() if value.is_floating_point() else value
    for block in blocks:
        if block.has_gamma:  # some of their files lack the count, which only a cumulative mean needs
            state.setdefault(f"{block.bn_path}.num_batches_tracked", torch.tensor(0))
    return state
