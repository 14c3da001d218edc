"""`Runtime`: an exported detector that takes the place of a network in evaluation and detection. `engine/runtimes.py` opens the files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.metadata import Metadata
from utils.errors import InputError

CPU = torch.device("cpu")
Compute = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Runtime:
    """An exported detector, ready to run.

    program: what it runs in.  compute: float32 (B, C, H, W) in 0..1, RGB -> predictions (B, N, 5 + nc) as `utils.decode.decode` gives them,
    or where `metadata.nms` final rows (B, n, 6).  size, batch: the (height, width) and the number of images that the file is fixed to, None
    where it is free.
    """

    weights: str
    program: str
    metadata: Metadata
    compute: Compute
    size: tuple[int, int] | None = None
    batch: int | None = None
    device: torch.device = CPU

    @property
    def names(self) -> tuple[str, ...]:
        return self.metadata.names

    @property
    def classes(self) -> int:
        return len(self.metadata.names)

    @property
    def channels(self) -> int:
        return self.metadata.channels

    @property
    def max_stride(self) -> int:
        return self.metadata.stride

    def __call__(self, images: Tensor) -> Tensor:
        """Predictions for any number of images."""
        batch = self.batch or len(images)
        parts = [self._whole(images[start : start + batch], batch) for start in range(0, len(images), batch)]
        rows = parts[0] if len(parts) == 1 else torch.cat(parts)
        width = 6 if self.metadata.nms else 5 + self.classes
        if rows.dim() != 3 or rows.shape[2] != width:
            raise InputError(f"{self.weights}: gives {_shown(rows.shape)}, not rows of {width} numbers ({_meaning(self.metadata)})")
        return rows

    def _whole(self, images: Tensor, batch: int) -> Tensor:
        missing = batch - len(images)
        filled = torch.cat([images, images.new_zeros(missing, *images.shape[1:])]) if missing else images
        try:
            return self.compute(filled)[: len(images)]
        except Exception as error:  # noqa: BLE001 - each program has exceptions of its own
            raise InputError(f"{self.weights}: {self.program} cannot run it on {_shown(images.shape)} ({first_line(error)})") from error

    def refuse(self, **flags: bool) -> None:
        """Raise `InputError` for a flag that needs the network itself."""
        for name, given in flags.items():
            if given:
                raise InputError(f"--{name}: {self.weights} runs in {self.program} as it was exported; leave the flag out, or give the .pt")

    def sides(self, wanted: Sequence[int] | None) -> tuple[int, int] | None:
        """The (height, width) that the file is fixed to, or None; raise `InputError` where another is `wanted`: (side,) or (height, width)."""
        if self.size is None or not wanted:
            return self.size
        if tuple(wanted) not in (self.size, (max(self.size),)):
            height, width = self.size
            raise InputError(
                f"--imgsz {' '.join(map(str, wanted))}: {self.weights} takes {height}x{width} pixels only; leave --imgsz out, or export it with --dynamic"
            )
        return self.size


def first_line(error: BaseException) -> str:
    """The first line of what a program says of the reason, shortened."""
    text = getattr(error, "err", None) or str(error)  # OpenCV's exceptions have the reason in `err`, behind a place in its source
    lines = text.strip().splitlines() or [type(error).__name__]
    reasons = (line for line in lines if not line.startswith(("Exception from ", "Check '")))  # OpenVINO's places in its source
    return next(reasons, lines[0])[:200]


def _shown(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _meaning(metadata: Metadata) -> str:
    if metadata.nms:
        return "box, confidence and class of a suppressed detection"
    return f"box, objectness and {len(metadata.names)} classes; only detectors like YOLOv5's can be run"
