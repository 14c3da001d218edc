"""Observers of a training by a recipe: how sparse the network is, epoch by epoch."""

from __future__ import annotations

from engine.loop import Loop
from engine.observers import TensorBoard
from engine.recipe.pruner import MagnitudePruner
from engine.seams import EpochRecord, Observer
from engine.sparsity_report import sparsity_rows, total
from utils.log import LOGGER


class SparsityLog(Observer):
    """Per epoch a line with the share of zeros beside the one that the recipe asks for, and TensorBoard's `sparsity/<layer>` and
    `sparsity/total`: of the EMA's weights, which are what is evaluated and saved."""

    def __init__(self, board: TensorBoard, pruner: MagnitudePruner) -> None:
        self.board, self.pruner = board, pruner
        self.ramped = pruner.ramped
        self.names = self.ramped or pruner.names

    def epoch_end(self, loop: Loop, record: EpochRecord) -> bool:
        rows = sparsity_rows(dict(loop.ema.network.named_parameters()), self.names)
        share = total(rows).share
        target = f" (target {self.pruner.target:.1%})" if self.ramped else ""
        LOGGER.info(f"{'':>14}sparsity {share:.1%}{target}")
        for row in rows:
            self.board.writer.add_scalar(f"sparsity/{row.name.removesuffix('.weight')}", row.share, record.epoch)
        self.board.writer.add_scalar("sparsity/total", share, record.epoch)
        return False
