"""`--batch-size -1`: the largest batch that fits on a CUDA device, found by trying."""

from __future__ import annotations

from collections.abc import Callable

import torch

from models.network import Network
from utils.device import Precision
from utils.errors import InputError
from utils.log import LOGGER

SHARE = 0.85  # of the device's memory; the loss, the EMA and the evaluation need some too
CPU_BATCH = 16
LARGEST = 1024

Probe = Callable[[int], int | None]


def choose(probe: Probe, budget: int) -> int:
    """The largest batch whose memory stays within `budget` bytes; 0 if not even one image does.

    `probe(batch)` gives the peak memory of a training step in bytes, or None where it does not fit. Memory grows linearly with the batch
    once it is large enough, so doubling brackets the answer and a line through the last two points proposes it; what is returned was tried.
    """
    points: list[tuple[int, int]] = []
    batch = 1
    while batch <= LARGEST and (used := probe(batch)) is not None and used <= budget:
        points.append((batch, used))
        batch *= 2
    if not points:
        return 0
    low, high = points[-1][0], min(batch, LARGEST + 1)  # low fits, high does not
    if len(points) > 1 and low < LARGEST:
        (b0, m0), (b1, m1) = points[-2:]
        guess = min(max(int(b1 + (budget - m1) * (b1 - b0) / max(m1 - m0, 1)), low), high - 1)
        for candidate in (guess, (low + guess) // 2):
            used = probe(candidate) if candidate > low else None
            if used is not None and used <= budget:
                return candidate
    return low


def largest_batch(network: Network, imgsz: int, precision: Precision) -> int:
    """The largest training batch of `network` at `imgsz` px on the precision's device. On a CPU, YOLOv5's 16.

    Raises `InputError` where not even one image fits.
    """
    if precision.device.type != "cuda":
        LOGGER.info(f"--batch-size -1 measures memory on CUDA; on the CPU the batch size is {CPU_BATCH}")
        return CPU_BATCH
    total = torch.cuda.mem_get_info(precision.device)[0] + torch.cuda.memory_reserved(precision.device)
    batch = choose(lambda b: _training_memory(network, b, imgsz, precision), int(total * SHARE))
    if batch < 1:
        raise InputError(
            f"--batch-size -1: not even one image of {imgsz} px fits into {total / 1e9:.1f} GB; use a smaller --imgsz or model"
        )
    LOGGER.info(f"--batch-size -1: {batch} images of {imgsz} px use up to {SHARE:.0%} of {total / 1e9:.1f} GB")
    return batch


def _training_memory(network: Network, batch: int, imgsz: int, precision: Precision) -> int | None:
    device = precision.device
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    running = {k: v.clone() for k, v in network.named_buffers()}
    try:
        images = precision.images(torch.zeros(batch, network.channels, imgsz, imgsz, dtype=torch.uint8))
        with precision.autocast():
            loss = sum(m.float().square().mean() for m in network.train()(images))
        loss.backward()
        return torch.cuda.max_memory_reserved(device)
    except torch.cuda.OutOfMemoryError:
        return None
    finally:
        network.zero_grad()
        for name, buffer in network.named_buffers():  # the trial must not move running statistics
            buffer.copy_(running[name])
        torch.cuda.empty_cache()
