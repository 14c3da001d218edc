"""The shipped detection dataset: handwritten digits composed into scenes, generated on first use, nothing fetched.

Owns the split of scikit-learn's 1,797 digit scans, the scenes drawn from them and the folder they are written to
(`images/{train,val}`, `labels/{train,val}`). It does not read datasets: the loader treats this one as any other.
A scene is one of five kinds of background, some clutter, and a few digits and letters that share the digits' brush.
The same seed and library versions give the same bytes; image i of a split depends on the seed and i alone.

    python -m data.digits --root data/generated/digits    # 1,280 + 256 images of 160 px: 8 s of one core, 16 MB
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from tqdm import tqdm

from utils.errors import InputError, run_script
from utils.log import LOGGER

Array = NDArray[np.float32]
Canvas = NDArray[np.uint8]  # (S, S, 3) BGR
Indices = NDArray[np.int64]
Box = tuple[int, int, int, int]  # xyxy px, x2 and y2 exclusive

VERSION = 1  # raise it whenever the same options would give other bytes
STAMP = "digits.json"
SPLITS = ("train", "val")
SMALLEST_IMAGE = 96  # px; below it the smallest digits have fewer pixels than their scans
SCAN_ZOOM = 8  # field px per scan px
INK_LEVEL = 0.2  # alpha from which a pixel counts as inked: what a box encloses
CONTRAST_FLOOR = 50.0  # luma steps between ink and the pixels around it, on 0..255
MOST_OVERLAP = 0.15  # of the smaller box: an IoU of 0.08 at most
LUMA = np.array([0.114, 0.587, 0.299], np.float32)  # BGR
LETTERS = "AEFHKMNVWX"  # none that a hand draws like a digit: no B, G, I, O, P, Q, S, Y, Z


@dataclass(frozen=True)
class DigitsOptions:
    """What to generate. `smallest` and `largest` bound a digit's longer side, as fractions of the image side."""

    train: int = 1280
    val: int = 256
    size: int = 128
    seed: int = 0
    val_fraction: float = 0.2
    fewest: int = 3
    most: int = 7
    smallest: float = 0.13
    largest: float = 0.55
    quality: int = 92

    def __post_init__(self) -> None:
        if min(self.train, self.val) < 1:
            raise InputError(f"digits: --train {self.train} and --val {self.val} must both be at least 1")
        if self.size < SMALLEST_IMAGE:
            raise InputError(f"digits: --size {self.size} must be at least {SMALLEST_IMAGE}")
        if self.seed < 0:
            raise InputError(f"digits: --seed {self.seed} must not be negative")


@dataclass(frozen=True)
class Scans:
    """Digit scans: `pixels` (n, 8, 8) in 0..1, ink high; `classes` (n,) in 0..9."""

    pixels: Array
    classes: NDArray[np.int64]


@dataclass(frozen=True)
class Scene:
    """One image; `boxes` (n, 4) integer xyxy px; `classes` (n,); `scans` (n,) indices used."""

    image: Canvas
    boxes: NDArray[np.int64]
    classes: NDArray[np.int64]
    scans: Indices


def load_scans() -> Scans:
    """Return scikit-learn's 1,797 bundled scans (UCI optdigits, test part)."""
    from sklearn.datasets import load_digits  # here: only generating needs it, and importing it takes a second

    bundle = load_digits()
    return Scans((bundle.images / 16).astype(np.float32), bundle.target.astype(np.int64))


def split_scans(seed: int, classes: Indices, val_fraction: float = 0.2) -> tuple[Indices, Indices]:
    """Return sorted, disjoint (train, val) indices into `classes`, each class split in the same proportion."""
    rng, train, val = np.random.default_rng(seed), [], []
    for label in np.unique(classes):
        members = rng.permutation(np.flatnonzero(classes == label))
        cut = round(len(members) * val_fraction)
        val.append(members[:cut])
        train.append(members[cut:])
    return np.sort(np.concatenate(train)), np.sort(np.concatenate(val))


def scan_field(scan: Array) -> Array:
    """Upscale a scan (8, 8) to a smooth ink field (96, 96) in 0..1 with an empty margin of two scan pixels."""
    padded = cv2.copyMakeBorder(scan, 2, 2, 2, 2, cv2.BORDER_CONSTANT, value=0)
    # The scans are coarse enough for the holes of an 8 to be grey: sharpen over one scan pixel to keep them open.
    sharp = padded + 1.2 * (padded - cv2.GaussianBlur(padded, (0, 0), 1.2))
    field = cv2.resize(sharp, None, fx=SCAN_ZOOM, fy=SCAN_ZOOM, interpolation=cv2.INTER_CUBIC)
    return np.clip(cv2.GaussianBlur(field, (0, 0), SCAN_ZOOM * 0.25), 0, 1)


def letter_field(rng: Generator) -> Array:
    """Draw one of `LETTERS` as a field like `scan_field`'s, so that only its shape tells it from a digit."""
    canvas = np.zeros((96, 96), np.float32)
    letter = LETTERS[rng.integers(len(LETTERS))]
    cv2.putText(canvas, letter, (20, 74), cv2.FONT_HERSHEY_SIMPLEX, 2.4, 1.0, int(rng.integers(7, 12)))
    return cv2.GaussianBlur(canvas, (0, 0), SCAN_ZOOM * 0.4)


def ink_bounds(alpha: Array, level: float = INK_LEVEL) -> Box:
    """Return the tight xyxy bounds (x2, y2 exclusive) of the pixels of `alpha` (h, w) above `level`."""
    inked = alpha > level
    ys, xs = np.flatnonzero(inked.any(axis=1)), np.flatnonzero(inked.any(axis=0))
    return int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1


def warp_glyph(field: Array, side: float, rng: Generator) -> Array:
    """Return the field as an alpha mask (h, w) in 0..1, its longer side about `side` px, cropped to its ink.

    Rotation stays within 10 degrees, shear within 0.15 and aspect within 15 %: more would turn a 1 into a 7.
    """
    pen = rng.uniform(0.42, 0.56)  # the field level of the stroke's edge: lower is a broader pen
    x1, y1, x2, y2 = ink_bounds(field, pen)
    scale = side / max(x2 - x1, y2 - y1)
    angle, shear, aspect = np.radians(rng.uniform(-10, 10)), rng.uniform(-0.15, 0.15), rng.uniform(0.85, 1.15)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    linear = scale * turn @ np.array([[aspect, shear], [0, 1]])
    extent = int(1.8 * side) + 4
    shift = extent / 2 - linear @ np.array([(x1 + x2) / 2, (y1 + y2) / 2])
    soft = cv2.warpAffine(field, np.column_stack([linear, shift]), (extent, extent))

    # A stroke's edge spans about one scan pixel; steepen it to about one and a half pixels of the image.
    alpha = np.clip((soft - pen) * max(1.5, scale * SCAN_ZOOM / 1.5) + 0.5, 0, 1)
    x1, y1, x2, y2 = ink_bounds(alpha)
    return alpha[y1:y2, x1:x2]


def _ramp(rng: Generator, size: int) -> Array:
    """Return a (size, size, 1) plane of px along a random direction."""
    angle = rng.uniform(0, 2 * np.pi)
    axis = np.arange(size, dtype=np.float32)
    return (np.cos(angle) * axis[None, :] + np.sin(angle) * axis[:, None])[..., None].astype(np.float32)


def _smooth_noise(rng: Generator, size: int, cells: int) -> Array:
    """Return unit noise (size, size, 3) with `cells` cells a side, mostly shared by the colours."""
    grid = rng.normal(size=(cells, cells, 1)) + 0.4 * rng.normal(size=(cells, cells, 3))
    return cv2.resize(grid.astype(np.float32), (size, size), interpolation=cv2.INTER_CUBIC)


def _base(rng: Generator) -> Array:
    """Return a base colour (3,): a brightness and a milder tint."""
    return np.clip(rng.uniform(15, 240) + rng.normal(0, 25, 3), 0, 255).astype(np.float32)


def _gradient(rng: Generator, size: int) -> Array:
    return _base(rng) + _ramp(rng, size) / size * rng.normal(0, 40, 3).astype(np.float32)


def _clouds(rng: Generator, size: int) -> Array:
    coarse, fine = (_smooth_noise(rng, size, int(rng.integers(*cells))) for cells in ((3, 7), (12, 30)))
    return _base(rng) + 16 * coarse + 6 * fine


def _grain(rng: Generator, size: int) -> Array:
    return _gradient(rng, size) + rng.uniform(6, 16) * _smooth_noise(rng, size, size // int(rng.integers(1, 4)))


def _stripes(rng: Generator, size: int) -> Array:
    canvas = _base(rng)
    for _ in range(rng.integers(1, 3)):  # twice: a weave
        wave = rng.choice([1.0, 8.0]) * np.sin(_ramp(rng, size) * (2 * np.pi * rng.uniform(4, 20) / size))
        canvas = canvas + np.clip(wave, -1, 1) * rng.normal(0, 15, 3).astype(np.float32)
    return canvas


def _blobs(rng: Generator, size: int) -> Array:
    base = _base(rng)
    canvas = np.full((size, size, 3), base, np.float32)
    for _ in range(rng.integers(4, 12)):
        centre = rng.integers(0, size, 2).tolist()
        colour = (base + rng.normal(0, 30, 3)).tolist()
        cv2.circle(canvas, centre, int(size * rng.uniform(0.05, 0.25)), colour, -1)
    return cv2.GaussianBlur(canvas, (0, 0), size * rng.uniform(0.01, 0.05))


# Each returns (size, size, 3), around 0..255.
BACKGROUNDS: tuple[Callable[[Generator, int], Array], ...] = (_gradient, _clouds, _grain, _stripes, _blobs)


def _points(rng: Generator, size: int, count: int, reach: float) -> NDArray[np.int32]:
    """Return `count` points (count, 1, 2) px within `reach * size` of a random centre."""
    centre = rng.uniform(0, size, 2)
    return (centre + rng.uniform(-reach, reach, (count, 2)) * size).astype(np.int32)[:, None]


def _pen(rng: Generator, size: int) -> tuple[list[float], int]:
    """Return a colour (3,) and a thickness in px."""
    return rng.uniform(0, 255, 3).tolist(), int(rng.integers(1, max(3, size // 40)))


def _line(rng: Generator, canvas: Canvas) -> None:
    # From one edge to another: a short stroke would be a 1.
    size = len(canvas)
    a, b = rng.integers(0, size, 2).tolist()
    ends = ((0, a), (size, b)) if rng.random() < 0.5 else ((a, 0), (b, size))
    cv2.line(canvas, *ends, *_pen(rng, size), cv2.LINE_AA)


def _disc(rng: Generator, canvas: Canvas) -> None:
    # Filled, or a ring too wide for its pen: a small thick ring would be a 0.
    size = len(canvas)
    centre, filled = rng.integers(0, size, 2).tolist(), rng.random() < 0.6
    radius = size * (rng.uniform(0.02, 0.12) if filled else rng.uniform(0.22, 0.4))
    colour, thickness = _pen(rng, size)
    cv2.circle(canvas, centre, int(radius), colour, -1 if filled else thickness, cv2.LINE_AA)


def _polygon(rng: Generator, canvas: Canvas) -> None:
    size = len(canvas)
    corners = _points(rng, size, 3, 0.15)
    if rng.random() < 0.7:
        centre, sides = rng.uniform(0, size, 2), rng.uniform(0.08, 0.45, 2) * size
        corners = cv2.boxPoints((centre.tolist(), sides.tolist(), rng.uniform(0, 90))).astype(np.int32)
    colour, thickness = _pen(rng, size)
    if rng.random() < 0.5:
        cv2.fillPoly(canvas, [corners], colour, cv2.LINE_AA)
    else:
        cv2.polylines(canvas, [corners], True, colour, thickness, cv2.LINE_AA)


def _scribble(rng: Generator, canvas: Canvas) -> None:
    # Many sharp turns: two or three would often be a 2, a 4 or a 7.
    points = _points(rng, len(canvas), int(rng.integers(7, 12)), rng.uniform(0.06, 0.15))
    cv2.polylines(canvas, [points], False, *_pen(rng, len(canvas)), cv2.LINE_AA)


CLUTTER: tuple[Callable[[Generator, Canvas], None], ...] = (_line, _disc, _polygon, _polygon, _scribble)


def overlap(box: Box, others: Collection[Box]) -> float:
    """Return the largest intersection over the smaller of two areas, between `box` and each of `others`, all xyxy.

    Unlike the IoU it is not small for a small box inside a large one; a value of s bounds the IoU by s / (2 - s).
    """
    x1, y1, x2, y2 = box
    worst = 0.0
    for u1, v1, u2, v2 in others:
        shared = max(0, min(x2, u2) - max(x1, u1)) * max(0, min(y2, v2) - max(y1, v1))
        worst = max(worst, shared / min((x2 - x1) * (y2 - y1), (u2 - u1) * (v2 - v1)))
    return worst


def pick_ink(rng: Generator, patch: Array) -> Array | None:
    """Return a colour (3,) lighter than nearly all of `patch` (h, w, 3) by `CONTRAST_FLOOR`; else None."""
    luma = np.sort(patch @ LUMA, axis=None)
    high = luma[int(0.95 * len(luma))]
    lowest = [[40]] * 11 + [[215]]  # any colour first, then a nearly white one: on a busy patch only that stands out
    colours = rng.uniform(lowest, 255, (12, 3)).astype(np.float32)
    clear = colours @ LUMA > high + CONTRAST_FLOOR
    return colours[clear.argmax()] if clear.any() else None


def paste(rng: Generator, canvas: Array, alpha: Array, taken: Collection[Box], tries: int = 40) -> Box | None:
    """Ink `alpha` (h, w) onto `canvas` (S, S, 3) in place, clear of `taken`; return its xyxy box, None if no spot."""
    (height, width), size = alpha.shape, len(canvas)
    for _ in range(tries):
        x, y = int(rng.integers(1, size - width)), int(rng.integers(1, size - height))
        box = (x, y, x + width, y + height)
        patch = canvas[y : y + height, x : x + width]
        ink = pick_ink(rng, patch) if overlap(box, taken) <= MOST_OVERLAP else None
        if ink is not None:
            opacity = alpha[..., None] * rng.uniform(0.85, 1)
            patch += opacity * (ink - patch)
            return box
    return None


def draw_background(rng: Generator, size: int) -> Array:
    """Return a cluttered background (size, size, 3) float32 in 0..255."""
    plain = BACKGROUNDS[rng.integers(len(BACKGROUNDS))](rng, size)
    plain = plain * rng.uniform(0.35, 0.75)  # ink is lighter than what it stands on
    canvas = np.ascontiguousarray(np.clip(plain, 0, 255).astype(np.uint8))  # OpenCV smooths edges on 8 bits alone
    for _ in range(rng.integers(1, 4)):
        CLUTTER[rng.integers(len(CLUTTER))](rng, canvas)
    return canvas.astype(np.float32)


def expose(rng: Generator, canvas: Array) -> Canvas:
    """Return `canvas` as a camera would: slightly out of focus, with sensor noise, in uint8."""
    if rng.random() < 0.5:
        canvas = cv2.GaussianBlur(canvas, (0, 0), rng.uniform(0.3, 0.7))
    noise = rng.standard_normal((*canvas.shape[:2], 1), np.float32) * np.float32(rng.uniform(0, 8))
    return np.clip(canvas + noise, 0, 255).astype(np.uint8)


def render_scene(rng: Generator, scans: Scans, members: Indices, options: DigitsOptions) -> Scene:
    """Draw one scene with digits taken from `scans[members]` alone."""
    canvas = draw_background(rng, options.size)
    chosen = rng.choice(members, rng.integers(options.fewest, options.most + 1), replace=False)
    glyphs = len(chosen) + rng.integers(0, 2)  # those after the digits are letters
    sides = np.exp(rng.uniform(np.log(options.smallest), np.log(options.largest), glyphs)) * options.size
    # The largest first, while there is room for it; what finds no room is left out.
    placed: dict[int, Box] = {}
    for i in np.argsort(-sides).tolist():
        field = scan_field(scans.pixels[chosen[i]]) if i < len(chosen) else letter_field(rng)
        box = paste(rng, canvas, warp_glyph(field, sides[i], rng), placed.values())
        if box is not None:
            placed[i] = box
    digits = [i for i in placed if i < len(chosen)]
    boxes = np.array([placed[i] for i in digits], np.int64).reshape(-1, 4)
    return Scene(expose(rng, canvas), boxes, scans.classes[chosen[digits]], chosen[digits])


def label_rows(scene: Scene) -> str:
    """Return the scene's label file: `class cx cy w h` a line, as fractions of the image side."""
    x1, y1, x2, y2 = (scene.boxes / len(scene.image)).T
    columns = zip(scene.classes, (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1, strict=True)
    return "".join(f"{label} {cx:.6f} {cy:.6f} {w:.6f} {h:.6f}\n" for label, cx, cy, w, h in columns)


def generate(root: Path, options: DigitsOptions = DigitsOptions()) -> None:
    """Write the dataset to `root`, or return at once where it already lies there complete, of the same options.

    It grows in a temporary folder beside `root` and is renamed into place, so `root` never holds half a dataset.
    A digits dataset of other options is replaced; any other folder with content raises `InputError`.
    """
    root = Path(root).resolve()
    if is_complete(root, options):
        return
    if root.exists() and not (root / STAMP).is_file() and (root.is_file() or any(root.iterdir())):
        raise InputError(f"{root} is not a generated digits dataset: remove it or choose another folder")
    root.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as staging:
        fresh = Path(staging) / "fresh"
        _write(fresh, options)
        if is_complete(root, options):
            return  # another process was faster
        if root.exists():
            root.rename(Path(staging) / "old")
        fresh.rename(root)
    LOGGER.info(f"digits: {options.train} train and {options.val} val images in {root}")


def is_complete(root: Path, options: DigitsOptions) -> bool:
    """Return whether `root` holds the stamp and the number of files of the dataset that `options` describe."""
    if not (root / STAMP).is_file() or (root / STAMP).read_text() != _stamp(options):
        return False
    files = product(("images/{}/*.jpg", "labels/{}/*.txt"), SPLITS)
    return all(len(list(root.glob(kind.format(split)))) == getattr(options, split) for kind, split in files)


def _stamp(options: DigitsOptions) -> str:
    return json.dumps({"version": VERSION, **asdict(options)}, indent=2) + "\n"


def _write(folder: Path, options: DigitsOptions) -> None:
    """Write both splits and then the stamp to `folder`, which must not exist."""
    scans = load_scans()
    members = split_scans(options.seed, scans.classes, options.val_fraction)
    jobs = [(k, i) for k, split in enumerate(SPLITS) for i in range(getattr(options, split))]
    for kind, split in product(("images", "labels"), SPLITS):
        (folder / kind / split).mkdir(parents=True)
    for k, i in tqdm(jobs, desc="Generating digits", unit="image"):
        scene = render_scene(np.random.default_rng([options.seed, k, i]), scans, members[k], options)
        encoded = cv2.imencode(".jpg", scene.image, [cv2.IMWRITE_JPEG_QUALITY, options.quality])[1]
        (folder / "images" / SPLITS[k] / f"{i:06d}.jpg").write_bytes(encoded)
        (folder / "labels" / SPLITS[k] / f"{i:06d}.txt").write_text(label_rows(scene))
    (folder / STAMP).write_text(_stamp(options))


def main() -> None:
    """Generate the dataset from the command line."""
    parser = argparse.ArgumentParser(prog="python -m data.digits", description="Generate the shipped digits dataset.")
    parser.add_argument("--root", type=Path, default=Path("data/generated/digits"), help="folder to write to")
    meanings = {"train": "training images", "val": "validation images", "size": "image side in px", "seed": "of it all"}
    for name, meaning in meanings.items():
        parser.add_argument(f"--{name}", type=int, default=getattr(DigitsOptions, name), help=meaning)
    chosen = vars(parser.parse_args())
    generate(chosen.pop("root"), DigitsOptions(**chosen))


if __name__ == "__main__":
    run_script(main)
