"""Whether an int8 file gives what torch's quantised network gives: the same rounded boxes, but for what no two programs agree on.

A value on the border of two steps falls to either side by the last bit of a sum, and moves the next layer's. Of a deep network on photographs about half of all
values differ in the end, by a step or two of their grids, between two programs that are both exact, and between torch and itself with biases moved by 1e-6
of their size. So means are compared, with that and with what rounding itself moves; what means something else (a zero point, a scale, a
missing bias) moves them ten times as far.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.export_check import LIMITS, Gap, reported
from models.network import Network, fuse
from models.quantization import FORMS
from models.torchscript import Decoded
from utils.errors import InputError

NUDGE = 1e-6  # of a bias: about what summing in another order moves
NOISES = 3  # times what a nudge moves


@dataclass(frozen=True)
class MeanGap(Gap):
    """Mean difference of boxes, in pixels, and of scores, to torch's rounded network; `step`: of that to the float network. A classifier has no boxes."""

    step: Gap
    classifier: bool = False

    def __str__(self) -> str:
        return f"probabilities within {self.scores:.2g} on average" if self.classifier else f"{super().__str__()} on average"

    @property
    def told(self) -> str:
        boxes = "" if self.classifier else f"{self.step.boxes:.2g} px and "
        return f"{self} of torch's int8, which is {boxes}{self.step.scores:.2g} from float32"


def mean_gap(got: np.ndarray, want: np.ndarray) -> Gap:
    """Of rows as `reported` gives them, (B, N, 5 + nc), or of a classifier's probabilities (B, nc). Other shapes differ infinitely."""
    if got.shape != want.shape or not np.isfinite(got).all():
        return Gap(np.inf, np.inf)
    apart = np.abs(got - want)
    boxes = 4 if got.ndim == 3 else 0
    return Gap(float(apart[..., :boxes].mean()) if boxes else 0.0, float(apart[..., boxes:].mean()))


@dataclass(frozen=True, eq=False)
class RoundedReference:
    """What torch's quantised network gives for `images` (B, C, H, W) in one form of `FORMS`, how far that is from float (`step`), and from
    itself with its biases nudged (`noise`)."""

    images: np.ndarray
    rows: np.ndarray
    step: Gap
    noise: Gap

    @classmethod
    @torch.no_grad()
    def of(cls, network: Network, images: Tensor, form: str) -> RoundedReference:
        def rows(changed: Network) -> np.ndarray:
            return _told_rows(Decoded(changed)(images).numpy())

        rounded = fuse(network)
        rounded.quantization.form = FORMS[form]
        want = rows(rounded)
        step = mean_gap(rows(_float(network)), want)
        generator = torch.Generator().manual_seed(0)
        for name, parameter in rounded.named_parameters():
            if name.endswith(".bias"):
                parameter.mul_(1 + NUDGE * torch.randn(parameter.shape, generator=generator))
        return cls(images.numpy(), want, step, mean_gap(rows(rounded), want))

    def check(self, kind: str, rows: np.ndarray, what: str) -> MeanGap:
        """The gap of `rows`, computed from a file of format `kind`; raise `InputError`, which begins with `what`, where it is of another kind than
        rounding."""
        found = mean_gap(_told_rows(rows), self.rows)
        own, step = self.noise, self.step
        limits = [max(*three) for three in zip(LIMITS[kind], (step.boxes, step.scores), (NOISES * own.boxes, NOISES * own.scores))]
        gap = MeanGap(found.boxes, found.scores, step, self.rows.ndim == 2)
        if found.boxes > limits[0] or found.scores > limits[1]:
            allowed = ("" if gap.classifier else f"{limits[0]:.2g} px and ") + f"{limits[1]:.2g}"
            raise InputError(
                f"{what}: computes something else than torch's int8 network ({gap}; allowed: {allowed}), so it was not written{_saturates()}"
            )
        return gap


def _told_rows(rows: np.ndarray) -> np.ndarray:
    return reported(rows) if rows.ndim == 3 else rows


def _float(network: Network) -> Network:
    plain = Network(network.blocks)
    plain.load_state_dict(network.weights())
    return fuse(plain.eval())


def _saturates() -> str:
    """Why this CPU may be at fault."""
    capable = torch.cpu.get_capabilities()
    if platform.machine().lower() not in ("x86_64", "amd64") or any(capable.get(k) for k in ("avx512_vnni", "avx_vnni", "amx_int8")):
        return ""
    return "; this CPU has no VNNI, and sums of its int8 products saturate: export on one that has it, or quantise with reduce_range"
