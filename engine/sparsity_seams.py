"""The seams of a sparsity training (`train_sparsity.py`): the penalty on gammas, in the gradient or as a proximal step, and its log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.optim import Optimizer

from engine.loop import Loop
from engine.observers import TensorBoard
from engine.options import TrainOptions
from engine.schedule import cosine, linear
from engine.seams import EpochRecord, Observer, Seams
from models.network import Network
from pruning.proximal import ProximalStep, reach
from pruning.sparsity import SparsityOptions, SparsityTerm, advice, equivalent_scale, gammas, near_zero_share, penalised, strength_at
from utils import plots
from utils.log import LOGGER


def add_penalty(
    seams: Seams, network: Network, optimizer: Optimizer, hyp: dict, options: TrainOptions, batches: int, board: TensorBoard, folder: Path
) -> None:
    """Add the penalty that `options.sr` asks for to `seams`; `batches` per epoch."""
    paths = penalised(network.blocks, shortcuts=options.prune == 1)
    strength = SparsityOptions(options.sr, options.sr_decay, options.beta_sr)
    if options.sparsity_method == "proximal":
        term = ProximalStep(paths, strength, options.epochs, network, optimizer)
        seams.masks.append(term)
    else:
        term = SparsityTerm(paths, strength, options.epochs)
        seams.terms.append(term)
    seams.transitions.append(term)
    seams.observers.append(GammaLog(paths, term, board, folder))
    _say_sparsity(paths, hyp, options, batches)


def _say_sparsity(paths: list[str], hyp: dict, options: TrainOptions, batches: int) -> None:
    """The log's line on the penalty: how it acts, and what its strength amounts to."""
    if options.sparsity_method == "proximal":
        curve, epochs = cosine if options.cos_lr else linear, range(options.epochs)
        rates = [hyp["lr0"] * curve(epoch, options.epochs, hyp["lrf"]) for epoch in epochs]
        strengths = [strength_at(SparsityOptions(options.sr, options.sr_decay), epoch, options.epochs) for epoch in epochs]
        steps = max(1, round(batches / max(round(hyp["nbs"] / options.batch_size), 1)))
        same = f"over the run it alone takes {reach(rates, strengths, steps):.2g} off a gamma"
    else:
        scale = equivalent_scale(options.sr, options.batch_size)
        same = f"in the predecessors this is --scale {scale:g} at batch {options.batch_size}"
    LOGGER.info(
        f"sparsity ({options.sparsity_method}): {len(paths)} batch norms penalised (--prune {options.prune}), strength {options.sr:g} per "
        f"optimizer step{', decaying to a tenth' if options.sr_decay else ''}; {same}"
    )


class GammaLog(Observer):
    """What users compare to choose their sparsity strength: gamma histograms per epoch, overall (`bn_weights/hist`) and per layer, the share
    near zero, the strength; advice in the log after a few epochs; and `gammas.png`, the distribution over the epochs."""

    def __init__(self, paths: list[str], term: SparsityTerm | ProximalStep, board: TensorBoard, folder: Path) -> None:
        self.paths, self.term, self.board, self.folder = paths, term, board, folder
        self.history: list[np.ndarray] = []
        self.shares: list[float] = []
        self.fitness: list[float] = []
        self.start = 0.0
        self.advised = False

    def train_start(self, loop: Loop) -> None:
        layers = gammas(loop.network, self.paths)
        if not self.history:
            self.start = near_zero_share(layers)
            self.history = [np.concatenate(layers)]
            self._layers("before_train_perlayer_bn_weights", layers)

    def epoch_end(self, loop: Loop, record: EpochRecord) -> bool:
        layers = gammas(loop.network, self.paths)
        share = near_zero_share(layers)
        self.history.append(np.concatenate(layers))
        self.shares.append(share)
        self.fitness.append(record.fitness)
        strength = self.term.strength
        zeros = int((self.history[-1] == 0).sum())
        exact = f" ({zeros} exactly zero)" if zeros else ""
        LOGGER.info(f"{'':>14}gammas near zero: {share:.1%} of {len(self.history[-1])}{exact}, strength {strength:g}")
        writer = self.board.writer
        writer.add_histogram("bn_weights/hist", self.history[-1], record.epoch, bins="doane")
        for path, layer in zip(self.paths, layers):
            writer.add_histogram(f"bn_weights_by_layer/{path}", layer, record.epoch)
        writer.add_scalar("sparsity/near_zero_share", share, record.epoch)
        writer.add_scalar("sparsity/sr", strength, record.epoch)
        self._advise(loop)
        return False

    def _advise(self, loop: Loop) -> None:
        if not self.term.options.strength or self.advised:
            return
        medians = [float(np.median(g)) for g in self.history]
        text = advice(medians, self.shares, self.fitness, loop.options.epochs, self.term.options.strength)
        if text:
            LOGGER.info(text)
            self.advised = True

    def _layers(self, tag: str, layers: list[np.ndarray]) -> None:
        for i, layer in enumerate(layers):
            self.board.writer.add_histogram(f"{tag}/hist", layer, i, bins="doane")

    def train_end(self, loop: Loop) -> None:
        self._layers("after_train_perlayer_bn_weights", gammas(loop.network, self.paths))
        if len(self.history) > 1:
            plots.plot_gamma_history(self.history, [self.start, *self.shares], self.folder / "gammas.png")

    def state_dict(self) -> dict[str, Any]:
        return {
            "history": [torch.from_numpy(g.copy()) for g in self.history], "shares": self.shares, "fitness": self.fitness,
            "start": self.start, "advised": self.advised,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history = [g.numpy() for g in state["history"]]
        self.shares, self.fitness = list(state["shares"]), list(state["fitness"])
        self.start, self.advised = state["start"], state["advised"]
