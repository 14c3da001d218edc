"""A recipe applied at once, without training: its final sparsity by one cut of the smallest weights, its quantisation by calibration.

What a recipe says of epochs and rates has no say here. Weights that were never trained to do without the others do worse than trained ones; it is a quick
look at what a recipe leads to, and enough where it quantises alone.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from engine.calibrate import CalibrationOptions, calibrated
from engine.recipe.document import read_recipe
from engine.recipe.modifiers import PRUNING, EpochRangeModifier, QuantizationModifier, Recipe
from engine.recipe.pruner import MagnitudePruner
from engine.recipe.transition import scheme_of
from engine.sparsity_report import ADVICE, checkpoint_report
from models.checkpoint import Model, load_model, save_model
from models.network import Network
from models.quantization import QuantScheme
from utils.errors import InputError
from utils.files import check_place, make_folder, run_folder
from utils.log import LOGGER

CPU = torch.device("cpu")


@dataclass(frozen=True)
class OneShot:
    """The model as the recipe leaves it, and the weights that its pruning claims."""

    model: Model
    pruned: tuple[str, ...]


def apply_recipe(model: Model, recipe: Recipe, calibration: CalibrationOptions, weights: str, scheme: QuantScheme | None = None) -> OneShot:
    """`model` pruned and quantised as at the end of `recipe`. `scheme`: how it is quantised where the recipe does not say; None: not at all.

    Raises `InputError` for a quantised model, a recipe that does neither, and quantisation without `calibration.data`.
    """
    if model.quantization is not None:
        raise InputError(f"--one-shot: {weights} is quantised already; start from the checkpoint before quantisation")
    pruning, quantising = recipe.of(*PRUNING), recipe.of(QuantizationModifier)
    if not pruning and not quantising and scheme is None:
        raise InputError(f"--one-shot: {recipe.source} neither prunes nor quantises, which is all that can be done at once; train with it")
    if quantising:
        scheme = scheme_of(quantising[-1], model.blocks)
    if scheme is not None and not calibration.data:
        where = quantising[-1].where if quantising else "--int8"
        raise InputError(f"{where}: quantising at once needs images to calibrate on; name them with --data DATA.yaml")
    _tell(recipe)
    model, names = _pruned(model, pruning) if pruning else (model, ())
    model = replace(model, training=None, epoch=-1, best_fitness=0.0)
    return OneShot(model if scheme is None else calibrated(model, calibration, scheme, CPU, weights), tuple(names))


def _tell(recipe: Recipe) -> None:
    for note in recipe.notes:
        LOGGER.info(note)
    acting = (*PRUNING, QuantizationModifier, EpochRangeModifier)
    idle = dict.fromkeys(m.tag for m in recipe.modifiers if not isinstance(m, acting))
    if idle:
        LOGGER.info(f"--one-shot: {', '.join(idle)} act in training alone")


def _pruned(model: Model, modifiers: Sequence) -> tuple[Model, list[str]]:
    network = Network(model.blocks)
    network.load_state_dict(model.state)
    pruner = MagnitudePruner(modifiers, network, sys.maxsize, 1)
    pruner.update(math.inf, last=True)
    return replace(model, state={k: v.detach() for k, v in network.state_dict().items()}), pruner.ramped or pruner.names


def save_one_shot(made: OneShot, path: Path) -> None:
    """Write the checkpoint and log how sparse it is, counted in the file."""
    save_model(path, made.model)
    _, text = checkpoint_report(path, made.pruned or None)
    if made.pruned:
        LOGGER.info(f"zeros in {path}, counted in the file:\n{text}\n{ADVICE}")
    LOGGER.info(f"checkpoint: {path}")


def one_shot_path(weights: str | Path) -> Path:
    """Where the checkpoint made from `weights` goes."""
    return Path(weights).with_name(f"{Path(weights).stem}_one_shot.pt")


@dataclass(frozen=True)
class OneShotOptions:
    """`train.py --one-shot`: the recipe's end on a checkpoint, in a run folder. `imgsz` None: the size that the checkpoint was trained at."""

    weights: str
    recipe: str
    data: str = ""
    recipe_args: str = ""
    imgsz: int | None = None
    project: str = "runs/train"
    name: str = "exp"
    exist_ok: bool = False

    def __post_init__(self) -> None:
        if not self.recipe:
            raise InputError("--one-shot: applies a recipe at once; name it with --recipe")
        if not self.weights:
            raise InputError("--one-shot: what is pruned and quantised without training must be trained; name it with --weights")


def one_shot(options: OneShotOptions) -> Path:
    """Apply the recipe and write the checkpoint; return its path."""
    recipe = read_recipe(options.recipe, options.recipe_args)
    check_place(options.project)
    model = load_model(options.weights)
    model = replace(model, imgsz=options.imgsz or model.imgsz)
    made = apply_recipe(model, recipe, CalibrationOptions(options.data), options.weights)
    folder = make_folder(run_folder(options.project, options.name, options.exist_ok) / "weights")
    path = folder / one_shot_path(options.weights).name
    save_one_shot(made, path)
    LOGGER.info(
        f"results saved to {folder.parent}\nnext: python val.py --weights {path} --data {options.data or 'DATA.yaml'}\n"
        f"      python export.py --weights {path}"
    )
    return path
