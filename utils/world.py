"""`World`: the processes that train or evaluate together, as torchrun starts them. One process is a world of size 1.

Everything that several processes must agree on goes through here: which of them writes, sums over them, who goes first. The rest of
the code asks a `World` and never torch's collectives, so that it reads the same with one process and with many.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from utils.errors import InputError
from utils.log import quiet

TIMEOUT = timedelta(hours=3)  # rank 0 may scan or cache a large dataset while the others wait


@dataclass(frozen=True)
class World:
    """This process among `size` of them: `rank` over all machines, `local` on this one."""

    rank: int = 0
    size: int = 1
    local: int = 0
    locals: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return self.rank == 0

    def total(self, values: Tensor) -> Tensor:
        """Sum of `values` over the processes."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def mean(self, values: Tensor) -> Tensor:
        """Mean of `values` over the processes."""
        return self.total(values) / self.size if self.size > 1 else values

    def share(self, counts: Tensor, total: Tensor) -> Tensor:
        """This process's share of `counts`, of which `total` is the sum, times the number of processes; 1 in a world of one.

        A mean over this process's items times its share, averaged over the processes as DDP averages gradients, is the mean over the
        items of all: with counts 3 and 1 the shares are 1.5 and 0.5. A count of 0 everywhere has share 0.
        """
        if self.size == 1:
            return torch.ones_like(counts)
        return counts * self.size / total.clamp(min=1e-12)

    def gather(self, item: Any) -> list[Any]:
        """The `item` of every process, in order of rank, in every process."""
        if self.size == 1:
            return [item]
        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item)
        return items

    def from_main(self, item: Any) -> Any:
        """The main process's `item`, in every process."""
        if self.size == 1:
            return item
        box = [item]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def align(self, module: nn.Module) -> None:
        """Give every process the main one's parameters and buffers of `module`."""
        if self.size > 1:
            for tensor in module.state_dict().values():
                dist.broadcast(tensor, src=0)

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Run the block in the main process first, so that the others find what it wrote (a label cache, a generated dataset)."""
        if self.size > 1 and not self.is_main:
            dist.barrier()
        yield
        if self.size > 1 and self.is_main:
            dist.barrier()


SOLO = World()


@contextmanager
def join() -> Iterator[World]:
    """The world that torchrun's environment describes; its process group lives as long as the block. gloo on CPUs, nccl on CUDA.

    Processes other than the main one are silent. Raises `InputError` where the others cannot be reached.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield SOLO
        return
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    world = World(rank, size, int(os.environ.get("LOCAL_RANK", rank)), int(os.environ.get("LOCAL_WORLD_SIZE", size)))
    if torch.cuda.is_available():
        torch.cuda.set_device(world.local % torch.cuda.device_count())
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"the {size} processes cannot find each other ({str(error).splitlines()[0]}); start them with torchrun") from None
    if not world.is_main:
        quiet()
    try:
        yield world
    finally:
        dist.destroy_process_group()
