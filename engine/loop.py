"""The training loop. One loop, with typed seams called in a fixed order; nothing here knows flags, files or detection.

Per batch: schedule -> objective -> backward; per optimizer step: unscale, masks on the gradients, clip, gradient terms, step, masks, EMA, masks
on the EMA.
Per epoch: transitions before it; evaluation of the EMA, then observers after it.

With several processes (a `World`) each runs this loop on its slice of every batch. Gradients are averaged by torch's
DistributedDataParallel, so weights, optimizer and EMA stay equal in all of them; observers belong to the main process.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from engine.ema import Ema
from engine.seams import EpochRecord, Evaluator, GradientMask, Objective, Schedule, Seams, Structural
from models.network import QUANTIZATION, Network
from utils.device import Precision
from utils.errors import InputError
from utils.log import LOGGER
from utils.world import SOLO, World


class TrainingBatch(Protocol):
    """What the loop needs of a batch: (B, 3, H, W) uint8 images and (m, 6) targets; `total`: images over all processes."""

    images: Tensor
    targets: Tensor
    total: int


class EpochData(Protocol):
    """Batches of any epoch, by number."""

    def __len__(self) -> int: ...

    def epoch(self, epoch: int) -> Iterator[TrainingBatch]: ...


@dataclass(frozen=True)
class LoopOptions:
    """`clip`: largest gradient norm (YOLOv5: 10); `evaluate_every_epoch`: otherwise only the last epoch is evaluated."""

    epochs: int
    clip: float = 10.0
    evaluate_every_epoch: bool = True


class Diverged(InputError):
    """The loss is no number any more. Resuming would only repeat it: the remedy is another hyper-parameter."""


class Loop:
    """Trains `network` in place and keeps its EMA. `run()` trains from `start_epoch` to `options.epochs`."""

    def __init__(
        self, network: Network, objective: Objective, optimizer: torch.optim.Optimizer, schedule: Schedule, data: EpochData,
        evaluator: Evaluator, precision: Precision, options: LoopOptions, seams: Seams, world: World = SOLO,
    ) -> None:  # fmt: skip
        self.network, self.objective, self.optimizer, self.schedule = network, objective, optimizer, schedule
        self.data, self.evaluator, self.precision, self.options, self.seams = data, evaluator, precision, options, seams
        self.world = world
        self.ema = Ema(network)
        self.parallel = self.wrap()
        self.scaler = torch.amp.GradScaler(precision.device.type, enabled=precision.scales)
        self.start_epoch = 0
        self.best_fitness = -math.inf
        self.phase = ""
        self.stopped = False
        self._last_step = -1
        self._means = torch.zeros(len(objective.names))

    def wrap(self) -> nn.Module:
        """The network as the objective calls it: itself, or one whose backward averages the gradients over the processes."""
        if self.world.size == 1:
            return self.network
        devices = [self.precision.device] if self.precision.device.type == "cuda" else None
        # 1x1 weights are the same in either layout; torch warns of a slower copy all the same.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        return DistributedDataParallel(self.network, device_ids=devices)

    def begin_phase(self, name: str) -> None:
        """For transitions: from here on the network is another one (pruned, quantised), whose results are not compared with those before."""
        self.phase, self.best_fitness = name, -math.inf

    def run(self) -> None:
        """Train; observers see every epoch, and may stop it."""
        for observer in self.seams.observers:
            observer.train_start(self)
        for epoch in range(self.start_epoch, self.options.epochs):
            if self.stopped or self._epoch(epoch):
                break
        for observer in reversed(self.seams.observers):  # what was opened first is closed last
            observer.train_end(self)

    def _epoch(self, epoch: int) -> bool:
        for transition in self.seams.transitions:
            transition.before_epoch(self, epoch)
        losses = self._train_epoch(epoch)
        rates = {f"x/lr{i}": group["lr"] for i, group in enumerate(self.optimizer.param_groups)}
        last = epoch + 1 == self.options.epochs
        self.world.align(self.ema.network)  # running statistics are each process's own until here
        fitness, metrics = self.evaluator(self.ema.network) if last or self.options.evaluate_every_epoch else (0.0, {})
        is_best = fitness >= self.best_fitness
        self.best_fitness = max(fitness, self.best_fitness)
        record = EpochRecord(epoch, losses, metrics, rates, fitness, is_best, self.phase)
        for observer in self.seams.observers:  # the checkpoint comes last and holds what those before it asked for
            self.stopped = observer.epoch_end(self, record) or self.stopped
        self.stopped = self.world.from_main(self.stopped)
        return self.stopped

    def _train_epoch(self, epoch: int) -> dict[str, float]:
        self.network.train()
        self.optimizer.zero_grad()
        self._last_step = epoch * len(self.data) - 1
        self._means = torch.zeros(len(self.objective.names))
        for index, batch in enumerate(self.data.epoch(epoch)):
            images = self.precision.images(batch.images)
            # Of fewer images than processes each takes all: their gradients and parts are then counted that many times.
            repeats = self.world.size if batch.total < self.world.size else 1
            items = self._batch(epoch, index, images, batch.targets.to(images.device, non_blocking=True), repeats)
            self._means += (items - self._means) / (index + 1)
            for observer in self.seams.observers:
                observer.batch_end(self, index, batch.images, batch.targets, self._means)
        if self._last_step + 1 < (epoch + 1) * len(self.data):  # a mask may have grown before a batch that was no step
            self._mask_ema()
        return {f"train/{name}": float(v) for name, v in zip(self.objective.names, self._means)}

    def _batch(self, epoch: int, index: int, images: Tensor, targets: Tensor, repeats: int = 1) -> Tensor:
        """Forward, backward and, where it is due, the optimizer's step; return the parts of the loss over all processes, on the CPU."""
        step = epoch * len(self.data) + index
        accumulate = min(self.schedule.batch(step, epoch), len(self.data))
        due = step - self._last_step >= accumulate
        with nullcontext() if due or self.world.size == 1 else self.parallel.no_sync():
            with self.precision.autocast():
                loss, items = self.objective(self.parallel, images, targets)
            items = self.world.mean(items).cpu()
            self._check(items, epoch, index)
            self.scaler.scale(loss / repeats if repeats > 1 else loss).backward()
        if due:
            self._optimizer_step()
            self._last_step = step
        return items

    def _check(self, items: Tensor, epoch: int, index: int) -> None:
        """Raise `InputError` where the loss is no number any more. (The same in every process, since the parts are their mean.)"""
        if not bool(torch.isfinite(items).all()):
            raise Diverged(
                f"the loss became {items.tolist()} in epoch {epoch + 1}, batch {index + 1}; training stopped, the last checkpoint is kept. "
                "Lower lr0 in the hyp file (a tenth is a good start) or the sparsity strength"
            )

    def _optimizer_step(self) -> None:
        self.scaler.unscale_(self.optimizer)
        for mask in self.seams.masks:
            if isinstance(mask, GradientMask):
                mask.mask_gradients(self.network)
        nn.utils.clip_grad_norm_(self.network.parameters(), self.options.clip, foreach=True)
        for term in self.seams.terms:
            term.add(self.network)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        for mask in self.seams.masks:
            mask.apply(self.network)
        self.ema.update(self.network)
        self._mask_ema()

    def _mask_ema(self) -> None:
        for mask in self.seams.masks:
            mask.apply(self.ema.network)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs besides the EMA's tensors: raw weights, optimizer, scaler, seams, counters."""
        return {
            "network": {k: v.cpu().clone() for k, v in self.network.state_dict().items()},
            "ema_ranges": {k: v.cpu().clone() for k, v in self.ema.network.state_dict().items() if k.startswith(QUANTIZATION)},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema_updates": self.ema.updates,
            "best_fitness": self.best_fitness,
            "phase": self.phase,
            "stopped": self.stopped,
            "seams": {name: seam.state_dict() for name, seam in self.seams.stateful().items()},
        }

    def load_state_dict(self, state: dict[str, Any], ema: dict[str, Tensor], epoch: int) -> None:
        """Continue after `epoch` (0-based, finished) from `state_dict()`'s content and the EMA's tensors."""
        seams = self.seams.stateful()
        if self.world.is_main and seams.keys() != state["seams"].keys():  # the others have no observers
            raise InputError(
                f"--resume: the run was made with {sorted(state['seams'])}, this one has {sorted(seams)}; "
                "use the script and flags it was started with"
            )
        for transition in self.seams.transitions:
            if isinstance(transition, Structural):
                transition.restore(self, epoch)
        self.network.load_state_dict(state["network"])
        self.ema.network.load_state_dict({**ema, **state.get("ema_ranges", {})})
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.ema.updates, self.best_fitness, self.start_epoch = state["ema_updates"], state["best_fitness"], epoch + 1
        self.stopped, self.phase = state["stopped"], state.get("phase", "")
        for name, seam in seams.items():
            seam.load_state_dict(state["seams"][name])
        LOGGER.info(f"resuming after epoch {epoch + 1}")
