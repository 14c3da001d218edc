"""Latency of a narrowed network, predicted from layers measured on this machine: thousands of candidates need no measuring.

Owns the table of layer times, how it is measured and how it is read. What a block costs depends on its setting (kind, kernel, stride,
activation, resolution; see `Setting`) and on its widths. Every setting of the full network is measured alone, as the fused network runs
it, at a grid of input and output widths, and read by linear interpolation. Two things make that hold:

- Vector units compute output channels 8 or 16 at a time, so a convolution of 33 filters costs no less than one of 40. Output widths are read
  at the next multiple of 8, and those beside the multiples of 16 cost the extra that was measured for their class (`CLASSES`).
- A layer in a network is not a layer alone: the loop around it costs too, and what it reads may have left the cache. So the sum is scaled and
  each block gets an overhead, such that the full network's prediction is its measured latency and that of two narrowed ones fits best.
"""

from __future__ import annotations

import statistics
import time
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from engine.latency import latency_ms
from models.blocks import Block, Blocks, resolutions
from models.network import Network, fuse, operation
from pruning.spaces import find_spaces
from pruning.surgery import narrowed
from utils.device import Precision
from utils.log import LOGGER

STEP, WIDE_STEP = 8, 16  # float32 lanes of 256-bit and 512-bit vectors
CLASSES = {"low": 12, "eight": 8, "high": 4}  # class of widths that are no multiples of 16 -> how far below one it is measured
FRACTIONS = (1, 3 / 4, 1 / 2, 3 / 8, 1 / 4, 1 / 8, 1 / 16)  # of the largest width that a setting has
PASSES, ROUNDS = 5, 3  # every point is measured this often, in several spells of the machine
SECONDS = 20.0  # no further pass begins after that
BUSY = 1.3  # median / least time of a layer above which something else is using the machine
FREE = ("input", "yolo", "softmax")  # hand on what they read


class Setting(NamedTuple):
    """What decides a block's time besides its widths. `groups`: 0 for a depthwise convolution, whose groups follow its width."""

    kind: str
    size: int
    stride: int
    padding: int
    groups: int
    activation: str
    inputs: int
    sliced: bool
    pads: tuple[int, int, int, int]
    height: int
    width: int


@dataclass(frozen=True)
class Surface:
    """Milliseconds of one setting over its widths: `ms[i][j]` at `cin[i]` input and `cout[j]` output channels, both ascending.

    An axis of one value means that the time does not depend on it. `extra`: for convolutions, what the classes of output widths that are no
    multiples of 16 cost, as factors. Between the points the time is linear, below the first constant, beyond the last continued.
    """

    cin: tuple[int, ...]
    cout: tuple[int, ...]
    ms: tuple[tuple[float, ...], ...]
    extra: Mapping[str, float] | None = None

    def __call__(self, cin: int, cout: int) -> float:
        """Milliseconds at these widths. Never less for more input channels, nor for more output channels of one class."""
        i, a = _place(self.cin, cin)
        factor = 1.0
        if self.extra is not None:
            factor = self.extra.get(width_class(cout), 1.0)
            cout += -cout % STEP
        j, b = _place(self.cout, cout)
        near, far = self.ms[i], self.ms[min(i + 1, len(self.cin) - 1)]
        k = min(j + 1, len(self.cout) - 1)
        return factor * ((1 - a) * ((1 - b) * near[j] + b * near[k]) + a * ((1 - b) * far[j] + b * far[k]))


def width_class(width: int) -> str:
    """The class of an output width: empty for a multiple of 16, else a key of `CLASSES`."""
    rest = width % WIDE_STEP
    return "" if rest == 0 else "eight" if rest == STEP else "low" if rest < STEP else "high"


def _place(axis: tuple[int, ...], value: int) -> tuple[int, float]:
    """(index, fraction) of `value` on an ascending axis: its segment and how far into it, over 1 beyond the last."""
    if value <= axis[0] or len(axis) == 1:
        return 0, 0.0
    i = min(bisect_right(axis, value) - 1, len(axis) - 2)
    return i, (value - axis[i]) / (axis[i + 1] - axis[i])


def settings(blocks: Blocks, imgsz: int) -> list[Setting | None]:
    """The setting of each block for images of `imgsz` pixels; None for those that cost nothing."""
    sizes = resolutions(blocks, imgsz, imgsz)
    found: list[Setting | None] = []
    for b in blocks:
        if b.kind in FREE:
            found.append(None)
            continue
        groups = b.groups
        if groups > 1 and groups == b.channels == blocks[b.inputs[0]].channels:
            groups = 0
        found.append(
            Setting(
                b.kind, b.size, b.stride, b.padding, groups, b.activation, len(b.inputs), b.slice is not None, b.pads, *sizes[b.inputs[0]]
            )  # fmt: skip
        )
    return found


@dataclass(frozen=True)
class LayerTimes:
    """The measured times of a network's settings at `imgsz` pixels, batch 1.

    A block costs `scale` times what its surface says plus `overhead` milliseconds; see `calibrated`.
    """

    imgsz: int
    surfaces: Mapping[Setting, Surface]
    scale: float = 1.0
    overhead: float = 0.0

    @staticmethod
    def measure(network_blocks: Blocks, imgsz: int, device: torch.device, progress: bool = True) -> LayerTimes:
        """Measure the layers of `network_blocks` (fused, float32, channels last, batch 1) and the whole; takes about half a minute."""
        points = _points(network_blocks, imgsz)
        count = sum(len(grid) for grid in points.values())
        LOGGER.info(f"latency at {imgsz} px, batch 1, on {device}: measuring {len(points)} kinds of layers at {count} widths ...")
        start = time.perf_counter()
        times = _measured(points, device, progress)
        raw = LayerTimes(imgsz, {setting: _surface(setting, times[setting]) for setting in points})
        networks = (network_blocks, _uniformly_narrowed(network_blocks, 0.5, WIDE_STEP), _uniformly_narrowed(network_blocks, 0.55, 1))
        table = raw.calibrated([(blocks, network_ms(blocks, imgsz, device)) for blocks in networks])
        LOGGER.info(f"... {time.perf_counter() - start:.0f} s; the whole network takes {table.predict(network_blocks):.2f} ms")
        return table

    def calibrated(self, measured: Sequence[tuple[Blocks, float]]) -> LayerTimes:
        """Choose scale and overhead so that the first network's prediction is its measured time, and the others' are near theirs.

        `measured`: (blocks, milliseconds) of the full network and of narrower ones with as many blocks.
        """
        plain = replace(self, scale=1.0, overhead=0.0)
        sums = [plain.predict(blocks) for blocks, _ in measured]
        whole, count = measured[0][1], sum(s is not None for s in settings(measured[0][0], self.imgsz))
        slopes = [(whole - ms) / (sums[0] - total) for (_, ms), total in zip(measured[1:], sums[1:]) if total < sums[0]]
        slope = statistics.mean(slopes) if slopes else 0.0
        if not 0 < slope < whole / sums[0]:  # a busy machine, or no narrower network: the ratio of the whole says more
            slope = whole / sums[0]
        return replace(self, scale=slope, overhead=(whole - slope * sums[0]) / count)

    def predict(self, blocks: Blocks) -> float:
        """Milliseconds of a network of `blocks`, fused or not. Raises `ValueError` for a setting that was not measured."""
        return sum(self.by_block(blocks))

    def by_block(self, blocks: Blocks) -> list[float]:
        """Milliseconds of each block; `predict` is their sum."""
        ms = []
        for block, setting in zip(blocks, settings(blocks, self.imgsz)):
            if setting is None:
                ms.append(0.0)
                continue
            surface = self.surfaces.get(setting)
            if surface is None:
                raise ValueError(f"block {block.name or block.kind}: {setting} was not measured; measure the network it was cut from")
            ms.append(self.overhead + self.scale * surface(blocks[block.inputs[0]].channels, block.channels))
        return ms

    def verify(self, blocks: Blocks, device: torch.device) -> tuple[float, float]:
        """(predicted, measured) milliseconds of a network of `blocks`."""
        return self.predict(blocks), network_ms(blocks, self.imgsz, device)


def network_ms(blocks: Blocks, imgsz: int, device: torch.device) -> float:
    """Milliseconds of a fused float32 network of `blocks` with random tensors at batch 1: the least of a few medians, as a busy moment only adds."""
    network = fuse(Network(blocks).eval()).to(device, memory_format=torch.channels_last)
    return min(latency_ms({"": network}, imgsz, device, repeats=6)[""] for _ in range(PASSES))


# Measuring

Point = tuple[int, int]  # input and output channels


def _uniformly_narrowed(blocks: Blocks, share: float, divisor: int) -> Blocks:
    """The network with every prunable space at `share` of its width, as a multiple of `divisor` where that leaves anything."""
    spaces = find_spaces(blocks)
    mask = np.ones(spaces.count, dtype=bool)
    for space in spaces.spaces:
        if space.keep is None:
            kept = max(round(space.width * share / divisor), 1) * divisor
            mask[space.classes[kept:]] = False
    return narrowed(blocks, spaces, mask)


def _points(blocks: Blocks, imgsz: int) -> dict[Setting, list[Point]]:
    """The widths at which each setting of a network is to be measured."""
    widths: dict[Setting, list[Point]] = {}
    for block, setting in zip(blocks, settings(blocks, imgsz)):
        if setting is not None:
            widths.setdefault(setting, []).append((blocks[block.inputs[0]].channels, block.channels))
    return {setting: _grid(setting, seen) for setting, seen in widths.items()}


def _reads_width(setting: Setting) -> bool:
    """Whether the input's width is free of the output's."""
    return setting.kind == "convolutional" and setting.groups == 1


def _grid(setting: Setting, seen: list[Point]) -> list[Point]:
    """Widths up to the largest that a setting was seen with."""
    widest_in, widest_out = (max(axis) for axis in zip(*seen))
    if setting.groups > 1 or setting.kind == "focus":  # such blocks are never narrowed
        return sorted(set(seen))
    if setting.kind != "convolutional":
        return [(0, cout) for cout in _axis(widest_out, setting.inputs)]
    couts = _axis(widest_out, WIDE_STEP)
    aside = [cout - below for cout in couts for below in CLASSES.values() if cout > WIDE_STEP]
    if setting.groups == 0:
        return [(0, cout) for cout in sorted({*couts, *aside})]
    cins = _axis(widest_in, 1)
    return [(cin, cout) for cin in cins for cout in couts] + [(cins[len(cins) // 2], cout) for cout in aside]


def _axis(widest: int, step: int) -> tuple[int, ...]:
    """Widths at which to measure, ascending: fractions of the widest in multiples of `step`, and below them the half step."""
    top = -(-widest // step) * step
    widths = {max(round(top * f / step), 1) * step for f in FRACTIONS}
    return tuple(sorted(widths | {max(step // 2, 1)}))


def _measured(points: Mapping[Setting, list[Point]], device: torch.device, progress: bool) -> dict[Setting, dict[Point, float]]:
    """Milliseconds at every point: the least of several spells, for a busy moment only adds."""
    best = {setting: dict.fromkeys(grid, float("inf")) for setting, grid in points.items()}
    clock, start = Precision(device).clock, time.perf_counter()
    scatter: list[float] = []
    with tqdm(total=PASSES * len(points), desc="measuring layers", leave=False, disable=None if progress else True) as bar:
        for number in range(PASSES):
            if number and time.perf_counter() - start > SECONDS:
                break
            for setting, grid in points.items():
                for point, ms in zip(grid, _rounds(setting, grid, device, clock)):
                    best[setting][point] = min(best[setting][point], *ms)
                    scatter.append(statistics.median(ms) / min(ms))
                bar.update()
    if statistics.mean(scatter) > BUSY:
        LOGGER.warning(
            "the measured times scatter: something else is using this machine, and predictions will be rough; better measure when it is idle"
        )
    return best


@torch.inference_mode()
def _rounds(setting: Setting, grid: list[Point], device: torch.device, clock: Callable[[], float]) -> list[list[float]]:
    """Milliseconds at each point of one setting, a few times in turns after a warm-up."""
    work = [_isolated(setting, point, device) for point in grid]
    seconds: list[list[float]] = [[] for _ in grid]
    for _ in range(ROUNDS + 1):
        for (op, inputs), values in zip(work, seconds):
            for x in inputs:
                x.add_(0.0)  # in a network the input was just written
            start = clock()
            op(*inputs)
            values.append(clock() - start)
    return [[1e3 * s for s in values[1:]] for values in seconds]


def _isolated(setting: Setting, point: Point, device: torch.device) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """The operation of a setting at some widths, and inputs for it."""
    cin, cout = point
    widths = [cin] if _reads_width(setting) or setting.groups > 1 else [cout] * setting.inputs
    if setting.kind == "focus":
        widths = [cout // 4]
    elif setting.kind == "route":
        widths = [2 * cout] if setting.sliced else [cout // setting.inputs] * setting.inputs
    inputs = [Block("input", channels=c) for c in widths]
    block = Block(
        setting.kind, "layer", tuple(range(len(inputs))), cout, setting.size, setting.stride, setting.padding, setting.groups or cout,
        setting.activation, bias=True, slice=(0, cout) if setting.sliced else None, pads=setting.pads,
    )  # fmt: skip
    with torch.device("meta"):  # random starting values would take longer than the measuring
        op = operation(block, [*inputs, block])
    if isinstance(op, nn.Module):
        op = op.to_empty(device=device).eval().requires_grad_(False)
        for tensor in op.state_dict().values():
            tensor.fill_(0.01)
        op = op.to(memory_format=torch.channels_last)
    shape = (setting.height, setting.width)
    return op, [torch.full((1, c, *shape), 0.5, device=device).contiguous(memory_format=torch.channels_last) for c in widths]


def _surface(setting: Setting, times: Mapping[Point, float]) -> Surface:
    """Turn measured times into a surface, made monotone: measuring is never exact."""
    convolution = setting.kind == "convolutional" and setting.groups < 2
    on_grid = {point for point in times if not convolution or width_class(point[1]) == "" or point[1] <= STEP}
    cin = tuple(sorted({point[0] for point in on_grid})) if _reads_width(setting) else (0,)
    cout = tuple(sorted({point[1] for point in on_grid}))
    if _reads_width(setting):
        ms = np.array([[times[i, j] for j in cout] for i in cin])
    else:
        ms = np.array([[min(t for point, t in times.items() if point[1] == j) for j in cout]])
    plain = Surface(cin, cout, _rows(_monotone(ms)))
    if not convolution:
        return plain
    ratios: dict[str, list[float]] = {name: [] for name in CLASSES}
    for i, j in times.keys() - on_grid:
        ratios[width_class(j)].append(times[i, j] / plain(i, j + -j % STEP))
    return replace(plain, extra={name: max(statistics.median(r), 1.0) for name, r in ratios.items() if r})


def _monotone(ms: np.ndarray) -> np.ndarray:
    """The mean of the least monotone table above `ms` and the greatest below it: itself monotone along both axes."""
    above, below = ms, ms[::-1, ::-1]
    for axis in (0, 1):
        above, below = np.maximum.accumulate(above, axis), np.minimum.accumulate(below, axis)
    return (above + below[::-1, ::-1]) / 2


def _rows(table: np.ndarray) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in table.tolist())
