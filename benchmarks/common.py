"""What the benchmarks share: where the project is, images to time with, turns, and the two lines that each prints."""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from utils.labels import LabelSet  # noqa: E402


def report(name: str, text: str, **figures: Any) -> None:
    """Print a line for people and one for programs."""
    print(f"{name}: {text}", flush=True)
    print(json.dumps({"benchmark": name, **figures}), flush=True)


def in_turns(work: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Call each function `repeats` times, one after the other, so that a slow spell of the machine hits all; return their results."""
    results: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(repeats):
        for name, function in work.items():
            results[name].append(function())
    return results


def median_ratio(numerators: list[float], denominators: list[float]) -> float:
    """The median of the ratios of neighbours in time."""
    return statistics.median(n / d for n, d in zip(numerators, denominators, strict=True))


def first_images(labels: LabelSet, count: int) -> LabelSet:
    """The first `count` images of a label set."""
    return labels.subset(range(min(count, len(labels))))


def jpeg_yaml(folder: Path) -> Path:
    """Write a dataset yaml of JPEG photographs into `folder` and return it.

    COCO128 (train2017) where the variable COCO128_DIR names its folder, linked, so that no cache is written there; else 128
    generated images of 640 x 480 px with detail on every scale, so that they cost what a photograph costs to decode.
    """
    coco = os.environ.get("COCO128_DIR")
    for kind in ("images", "labels"):
        (folder / kind).mkdir()
        if coco:
            (folder / kind / "train").symlink_to(Path(coco) / kind / "train2017")
    if not coco:
        _write_photos(folder, 128)
    path = folder / "data.yaml"
    names = ", ".join(f"c{i}" for i in range(80))
    path.write_text(f"path: {folder}\ntrain: images/train\nval: images/train\nnc: 80\nnames: [{names}]\n")
    return path


def _write_photos(folder: Path, count: int) -> None:
    import cv2
    import numpy as np

    for kind in ("images", "labels"):
        (folder / kind / "train").mkdir()
    for number in range(count):
        rng = np.random.default_rng(number)
        image = np.full((480, 640, 3), 128, np.float32)
        for scale in (2, 4, 8, 16, 32, 64, 128):  # the contrast of a natural image grows with the size of its parts
            cells = rng.normal(0, 6 * scale**0.4, (480 // scale + 1, 640 // scale + 1, 3)).astype(np.float32)
            image += cv2.resize(cells, (640, 480))
        cv2.imwrite(str(folder / f"images/train/{number:03}.jpg"), image.clip(0, 255), [cv2.IMWRITE_JPEG_QUALITY, 92])
        boxes = rng.uniform((0, 0.3, 0.3, 0.05, 0.05), (80, 0.7, 0.7, 0.5, 0.5), (7, 5))
        rows = (f"{int(c)} {x:.4f} {y:.4f} {w:.4f} {h:.4f}\n" for c, x, y, w, h in boxes)
        (folder / f"labels/train/{number:03}.txt").write_text("".join(rows))
