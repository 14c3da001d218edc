"""How a recipe joins a training session: it is read and checked against the run's options, and becomes the loop's seams.

Nothing here trains: schedule, masks, transitions, objective and observers are those of the one loop.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from engine.loop import Loop
from engine.objectives import DetectionObjective, read_teacher
from engine.observers import TensorBoard
from engine.options import TrainOptions
from engine.recipe.distill import RecipeDistillation
from engine.recipe.document import is_markdown, read_recipe, recipe_of
from engine.recipe.modifiers import (
    PRUNING,
    DistillationModifier,
    EpochRangeModifier,
    Modifier,
    QuantizationModifier,
    Recipe,
    TrainableParamsModifier,
    first_epoch,
)
from engine.recipe.observers import SparsityLog
from engine.recipe.phases import Phases, quantizes
from engine.recipe.pruner import MagnitudePruner
from engine.recipe.schedule import Clock, RecipeSchedule
from engine.recipe.selectors import counted, prunable
from engine.recipe.trainable import TrainableTransition
from engine.recipe.transition import QuantizationTransition, tell_memory
from engine.seams import Objective, Schedule, Seams, Transition
from engine.sparsity_report import report_sparsity
from models.cfg_text import read_text
from models.network import Network
from models.quantization import QuantScheme, quantize
from utils.device import Precision
from utils.errors import InputError
from utils.log import LOGGER

ALREADY_SPARSE = 0.1  # share of zeros in a start's convolution weights from which on they were made on purpose


def open_recipe(options: TrainOptions) -> tuple[TrainOptions, Recipe | None]:
    """The recipe of `--recipe`, and the options with what it decides: the number of epochs, who the teacher serves, the text for `--resume`.

    Raises `InputError` for a recipe that does not go with the run.
    """
    if not options.recipe:
        return options, None
    recipe = read_recipe(options.recipe, options.recipe_args)
    for note in recipe.notes:
        LOGGER.info(note)
    options = replace(options, recipe_text=read_text(Path(options.recipe)))
    if recipe.epochs is not None and recipe.epochs != options.epochs:
        LOGGER.info(f"{options.recipe}: its EpochRangeModifier makes this a run of {recipe.epochs} epochs (--epochs says {options.epochs})")
        options = replace(options, epochs=recipe.epochs)
    for modifier in recipe.modifiers:
        _check(modifier, options.epochs)
    return _with_teacher(options, recipe), recipe


def saved_recipe(options: TrainOptions) -> Recipe | None:
    """The recipe of a run that is resumed, as its file was when it started."""
    if not options.recipe:
        return None
    return recipe_of(options.recipe_text, options.recipe, options.recipe_args, markdown=is_markdown(options.recipe))


def _check(modifier: Modifier, epochs: int) -> None:
    if isinstance(modifier, EpochRangeModifier):
        return
    whole = isinstance(modifier, (QuantizationModifier, TrainableParamsModifier))  # these act between epochs
    if (first_epoch(modifier.start) if whole else modifier.start) >= epochs:
        raise InputError(
            f"{modifier.where}: {modifier.tag} starts at epoch {modifier.start:g}, the run has {epochs} epochs: it would never act; give more "
            "--epochs, or the recipe an EpochRangeModifier that ends later"
        )
    if isinstance(modifier, QuantizationModifier):
        steps = {"freeze_bn_stats_epoch": modifier.norm_freeze, "disable_quantization_observer_epoch": modifier.observer_stop}
        for name, epoch in steps.items():
            if epoch is not None and first_epoch(epoch) >= epochs:
                LOGGER.warning(
                    f"{modifier.where}: {modifier.tag}: {name}: {epoch:g} is after the start of the run's last epoch (of {epochs}): it has no effect"
                )


def _with_teacher(options: TrainOptions, recipe: Recipe) -> TrainOptions:
    """Leave the teacher to the recipe where it says when to distil. (`--distill` alone distils throughout.)"""
    distilling = recipe.of(DistillationModifier)
    if not distilling and options.recipe_teacher:
        raise InputError(
            f"--t_weight {options.recipe_teacher}: {options.recipe} has no DistillationModifier, so nothing would distil from it"
        )
    if distilling and options.teacher:
        LOGGER.info(f"{options.recipe}: its DistillationModifier says when the teacher acts, not --distill")
        return replace(options, teacher="", recipe_teacher=options.teacher)
    if distilling and not options.recipe_teacher:
        raise InputError(
            f"{distilling[0].where}: DistillationModifier needs a teacher: --t_weight TEACHER.pt, or self for that of --weights"
        )
    return options


def warn_of_regrowth(loop: Loop, weights: str) -> None:
    """Say it where layers that train are sparse at the start of a run, and nothing holds their zeros from the first batch on."""
    held = {name for pruner in _pruners(loop) for name in pruner.held_from_start}
    trained = {name: loop.network.get_parameter(name) for name in prunable(loop.network)}
    loose = {name: p for name, p in trained.items() if p.requires_grad and name not in held}
    if not loose:
        return
    zeros = int(torch.stack([(p == 0).sum() for p in loose.values()]).sum())  # one wait for the device
    share = zeros / sum(p.numel() for p in loose.values())
    if share >= ALREADY_SPARSE:
        LOGGER.warning(
            f"{weights}: {share:.1%} of the weights of {counted([*loose])} are zero, and nothing in this run holds them from the start: they will "
            "grow back; a recipe's ConstantPruningModifier without start_epoch holds them"
        )


def _pruners(loop: Loop) -> list[MagnitudePruner]:
    return [mask for mask in loop.seams.masks if isinstance(mask, MagnitudePruner)]


@dataclass(frozen=True)
class Pace:
    """Of a run: its epochs, batches per epoch, batches per optimizer step once warm, and momentum."""

    epochs: int
    batches: int
    accumulate: int
    momentum: float


@dataclass(frozen=True)
class RecipeSeams:
    """What a recipe gives the loop. `pruner` None: without pruning modifiers."""

    schedule: Schedule
    objective: Objective
    pruner: MagnitudePruner | None
    transitions: tuple[Transition, ...]

    def join(self, seams: Seams, board: TensorBoard) -> None:
        """Add masks, transitions and observers, behind those that are there."""
        if self.pruner is not None:
            seams.masks.append(self.pruner)
            seams.observers.append(SparsityLog(board, self.pruner))
        seams.transitions += self.transitions


def recipe_seams(
    recipe: Recipe, network: Network, optimizer: torch.optim.Optimizer, native: Schedule, objective: Objective, pace: Pace,
    options: TrainOptions, precision: Precision,
) -> RecipeSeams:  # fmt: skip
    """The seams of `recipe`; `native` and `objective` are those of a run without one. Raises `InputError` for what does not fit the network."""
    clock = Clock()
    pruner = MagnitudePruner(recipe.of(*PRUNING), network, pace.epochs, pace.batches) if recipe.of(*PRUNING) else None
    schedule = RecipeSchedule(native, optimizer, recipe, pace.batches, pace.epochs, pace.accumulate, pace.momentum, clock, pruner)
    transitions: list[Transition] = [Phases(recipe, pace.batches, pace.epochs)]
    if recipe.of(TrainableParamsModifier):
        transitions.append(TrainableTransition(recipe, network))
    if recipe.of(QuantizationModifier):
        transitions.append(QuantizationTransition(recipe, network.blocks, network.quantization is not None))
    if recipe.of(DistillationModifier):
        objective = _distilling(recipe, network, objective, options, precision, clock)
    return RecipeSeams(schedule, objective, pruner, tuple(transitions))


def _distilling(
    recipe: Recipe, network: Network, objective: Objective, options: TrainOptions, precision: Precision, clock: Clock
) -> Objective:
    modifiers = recipe.of(DistillationModifier)
    if not isinstance(objective, DetectionObjective):
        raise InputError(f"{modifiers[0].where}: DistillationModifier is for detectors, and this model is a classifier; leave it out")
    teacher = read_teacher(options.recipe_teacher, options.teacher_cfg, network, precision.device)
    return RecipeDistillation(objective.loss, teacher, network.anchors, modifiers, clock, options.distill_weight)


def heaviest_phase(recipe: Recipe | None, network: Network, precision: Precision) -> tuple[Network, Precision]:
    """What a run by `recipe` trains when it takes most memory, to try batches with: a quantised copy in float32 where it quantises later."""
    if not quantizes(recipe) or network.quantization is not None:
        return network, precision
    network = deepcopy(network)
    quantize(network, QuantScheme())
    return network, Precision(precision.device)


def tell_quantization(recipe: Recipe, network: Network, imgsz: int, batch: int, precision: Precision) -> None:
    """Say at the start what quantisation will take later. `batch`: images of one process."""
    for modifier in recipe.of(QuantizationModifier):
        if network.quantization is None:
            tell_memory(modifier, network.blocks, imgsz, batch, precision)


def report_recipe(loop: Loop, measured: Path, others: Sequence[Path], folder: Path) -> None:
    """At the end of a run: the zeros of the checkpoints that were saved, and what to do next with the one that counts, `measured`."""
    for pruner in _pruners(loop):
        report_sparsity([measured, *others], folder, pruner.ramped or pruner.names, pruner.target if pruner.ramped else None)
    LOGGER.info(f"next: {shlex.join(['python', 'export.py', '--weights', str(measured), '--include', 'onnx'])}")
