"""Device and precision: where tensors live, what autocast uses there, which memory layout."""

from __future__ import annotations

import os
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from utils.errors import InputError
from utils.log import LOGGER
from utils.world import SOLO, World


def select_device(text: str, world: World = SOLO) -> torch.device:
    """`''`: CUDA where there is one, otherwise the CPU; `cpu`; `0`, `cuda:0`; `0,1`: one each for the processes that torchrun started."""
    text = text.strip().lower().replace("cuda:", "")
    count = torch.cuda.device_count()
    if text == "cpu" or (text in ("", "cuda") and not count):
        return torch.device("cpu")
    numbers = list(map(str, range(count))) if text in ("", "cuda") else text.split(",")
    if any(not n.strip().isdigit() for n in numbers):
        raise InputError(f"--device {text}: give cpu or the number of a CUDA device, such as 0")
    if any(int(n) >= count for n in numbers):
        raise InputError(f"--device {text}: this machine has {count} CUDA devices; use --device cpu")
    if world.locals > len(numbers):
        raise InputError(f"{world.locals} processes share {len(numbers)} CUDA devices; start as many as there are, or use --device cpu")
    if world.size == 1 and len(numbers) > 1 and text not in ("", "cuda"):
        raise InputError(f"--device {text}: several devices need a process each: torchrun --nproc_per_node {len(numbers)} train.py ...")
    return torch.device(f"cuda:{int(numbers[world.local])}")


def cpu_accelerates_bfloat16() -> bool:
    """Whether this CPU has bfloat16 instructions (AVX-512 BF16 or AMX); emulated bfloat16 is about ten times slower than float32."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


@dataclass(frozen=True)
class Precision:
    """How a network is run on `device`: `autocast_dtype` None means plain float32."""

    device: torch.device
    autocast_dtype: torch.dtype | None = None

    @property
    def scales(self) -> bool:
        """Whether gradients need loss scaling (float16's range is small; bfloat16's is not)."""
        return self.autocast_dtype == torch.float16

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, dtype=self.autocast_dtype, enabled=self.autocast_dtype is not None)

    def clock(self) -> float:
        """Seconds, once the device has finished what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def images(self, images: Tensor) -> Tensor:
        """uint8 (B, C, H, W) -> float 0..1 on the device, channels last."""
        images = images.to(self.device, non_blocking=True, memory_format=torch.channels_last)
        return images.float().div_(255)


class ReusedImages:
    """`Precision.images` on CPUs into memory that is used again, so what it returns holds until the next call.

    Fresh memory costs more than the conversion: of a batch of 16 at 640 px 33 ms, against 8 ms. For inference; a training step may still
    need its images.
    """

    def __init__(self, precision: Precision) -> None:
        self.precision = precision
        self._memory = torch.empty(0)

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (B, C, H, W) -> float 0..1, channels last."""
        if self.precision.device.type != "cpu":
            return self.precision.images(images)
        batch, channels, height, width = images.shape
        if self._memory.numel() < images.numel():
            self._memory = torch.empty(images.numel())
        floats = self._memory[: images.numel()].view(batch, height, width, channels).permute(0, 3, 1, 2)
        return floats.copy_(images).div_(255)


def training_precision(device: torch.device, amp: bool = True) -> Precision:
    """float16 on CUDA, bfloat16 on CPUs that accelerate it, float32 elsewhere or without `amp`."""
    if not amp:
        return Precision(device)
    if device.type == "cuda":
        return Precision(device, torch.float16)
    return Precision(device, torch.bfloat16 if cpu_accelerates_bfloat16() else None)


def inference_precision(device: torch.device, half: bool) -> Precision:
    """`--half`: float16 on CUDA, bfloat16 on CPUs that accelerate it, elsewhere float32 and a line that says so."""
    if not half:
        return Precision(device)
    precision = training_precision(device)
    if precision.autocast_dtype is None:
        LOGGER.info("--half: this CPU has no bfloat16 instructions, and emulating them is slower; computing in float32")
    return precision


def worker_count(wanted: int, world: World = SOLO) -> int:
    """Loader workers: no more than this process's part of the CPUs that it may use."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(max(wanted, 0), max(cpus // world.locals, 1))


def evaluation_workers(wanted: int, device: torch.device, world: World = SOLO) -> int:
    """Loader workers beside a network that only computes forward, hence faster than a training step and with little to wait for.

    On a CPU no more than half of this process's processors less one, so none on two: the network's threads work in step, and all wait
    for the one whose processor a loader took. Measured on two: 1.16 times the bare network's time without loaders, 1.29 with two.
    """
    workers = worker_count(wanted, world)
    return min(workers, max(worker_count(2**16, world) // 2 - 1, 0)) if device.type == "cpu" else workers
