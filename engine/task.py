"""What a training session asks of its task, detection or classification: data, loaders, objective, evaluation. The loop knows neither."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.options import TrainOptions
from engine.seams import Evaluator, Objective, Transition
from models.blocks import Blocks
from models.checkpoint import Model
from models.network import Network
from utils.dataset import EpochLoader
from utils.device import Precision
from utils.labels import LabelSet
from utils.world import World

Hyp = dict[str, Any]


@dataclass(frozen=True)
class TrainData:
    """The images of a run and the names of their classes; `imgsz`: the network's input, pixels."""

    names: tuple[str, ...]
    train: LabelSet
    val: LabelSet
    imgsz: int

    @property
    def nc(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class Goal:
    """What is minimised and what is measured, and transitions that both need."""

    objective: Objective
    evaluator: Evaluator
    transitions: tuple[Transition, ...] = ()


@dataclass(frozen=True)
class Task:
    """`metrics`: the columns of an evaluation in results.csv and TensorBoard.

    read(options, stride, world): the data. fit(blocks, data, hyp, options): the structure for its classes. loaders(data, hyp, options, network,
    precision, world): of training and validation. goal(network, data, hyp, options, precision, loaders, world). pictures(folder, data): of the
    labels, once per run. measure(model, data, options, precision, folder): evaluate the finished run's model, write its figures and pictures.
    """

    metrics: tuple[str, ...]
    read: Callable[[TrainOptions, int, World], TrainData]
    fit: Callable[[Blocks, TrainData, Hyp, TrainOptions], Blocks]
    loaders: Callable[[TrainData, Hyp, TrainOptions, Network, Precision, World], tuple[EpochLoader, EpochLoader]]
    goal: Callable[[Network, TrainData, Hyp, TrainOptions, Precision, tuple[EpochLoader, EpochLoader], World], Goal]
    pictures: Callable[[Path, TrainData], None]
    measure: Callable[[Model, TrainData, TrainOptions, Precision, Path], None]
