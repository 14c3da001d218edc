"""The shipped classification dataset: one handwritten digit on a cluttered background per image, a folder per class, nothing fetched.

Each of scikit-learn's 1,797 digit scans becomes one image of `train/CLASS/` or `val/CLASS/`, drawn with the brush and the backgrounds of
`data.digits`. The same seed and library versions give the same bytes; an image depends on the seed and its scan alone.

    python -m data.digit_folders --root data/generated/digit_folders    # 1,438 + 359 images of 64 px: 3 s of one core
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import cv2
import numpy as np

from data.digits import Array, Canvas, draw_background, expose, load_scans, paste, scan_field, split_scans, warp_glyph
from utils.errors import InputError, run_script
from utils.log import LOGGER

VERSION = 1  # raise it whenever the same options would give other bytes
STAMP = "digit_folders.json"
SPLITS = ("train", "val")
SMALLEST_IMAGE = 32  # px


@dataclass(frozen=True)
class FolderOptions:
    """What to generate. `smallest`, `largest` bound the digit's longer side as shares of the image's; `share`: of the scans that are used."""

    size: int = 64
    seed: int = 0
    share: float = 1.0
    val_fraction: float = 0.2
    smallest: float = 0.5
    largest: float = 0.85
    quality: int = 92

    def __post_init__(self) -> None:
        if self.size < SMALLEST_IMAGE or self.seed < 0:
            raise InputError(f"digit_folders: --size {self.size} must be at least {SMALLEST_IMAGE}, --seed {self.seed} at least 0")
        if not 0.02 <= self.share <= 1:
            raise InputError(f"digit_folders: --share {self.share} must lie in 0.02..1")


def render(rng: np.random.Generator, scan: Array, options: FolderOptions) -> Canvas:
    """One image (S, S, 3) BGR with the digit of `scan` (8, 8)."""
    side = rng.uniform(options.smallest, options.largest) * options.size
    alpha = warp_glyph(scan_field(scan), side, rng)
    while True:  # a background on which the digit finds no clear place is drawn anew
        canvas = draw_background(rng, options.size)
        if max(alpha.shape) > options.size - 2:
            alpha = cv2.resize(alpha, None, fx=0.8, fy=0.8, interpolation=cv2.INTER_AREA)
        elif paste(rng, canvas, alpha, ()) is not None:
            return expose(rng, canvas)


def generate(root: Path, options: FolderOptions = FolderOptions()) -> None:
    """Write the dataset to `root`, or return at once where it lies there complete, of the same options.

    It grows in a temporary folder beside `root` and is renamed into place. Any other folder with content raises `InputError`.
    """
    root = Path(root).resolve()
    stamp = json.dumps({"version": VERSION, **asdict(options)}, indent=2) + "\n"
    if (root / STAMP).is_file() and (root / STAMP).read_text() == stamp:
        return
    if root.exists() and not (root / STAMP).is_file() and (root.is_file() or any(root.iterdir())):
        raise InputError(f"{root} is not a generated dataset of digit folders: remove it or choose another folder")
    root.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as staging:
        fresh = Path(staging) / "fresh"
        counts = _write(fresh, options)
        (fresh / STAMP).write_text(stamp)  # last: what has it is whole
        if root.exists():
            root.rename(Path(staging) / "old")
        fresh.rename(root)
    LOGGER.info(f"digit_folders: {counts[0]} train and {counts[1]} val images in {root}")


def _write(folder: Path, options: FolderOptions) -> list[int]:
    scans = load_scans()
    counts = []
    for split, members in zip(SPLITS, split_scans(options.seed, scans.classes, options.val_fraction)):
        step = max(round(1 / options.share), 1)
        for index in members[::step].tolist():
            place = folder / split / str(scans.classes[index])
            place.mkdir(parents=True, exist_ok=True)
            image = render(np.random.default_rng([options.seed, index]), scans.pixels[index], options)
            place.joinpath(f"{index:04d}.jpg").write_bytes(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, options.quality])[1])
        counts.append(len(members[::step]))
    return counts


def main() -> None:
    """Generate the dataset from the command line."""
    parser = argparse.ArgumentParser(prog="python -m data.digit_folders", description="Generate the shipped digits as an image folder.")
    parser.add_argument("--root", type=Path, default=Path("data/generated/digit_folders"), help="folder to write to")
    parser.add_argument("--size", type=int, default=FolderOptions.size, help="image side in px")
    parser.add_argument("--seed", type=int, default=FolderOptions.seed, help="of it all")
    parser.add_argument("--share", type=float, default=FolderOptions.share, help="share of the scans that are used")
    chosen = vars(parser.parse_args())
    generate(chosen.pop("root"), FolderOptions(**chosen))


if __name__ == "__main__":
    run_script(main)
