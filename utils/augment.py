"""Image and box transforms: letterbox, mosaic, perspective, mixup, HSV jitter, flips.

Pure functions of arrays and a `numpy.random.Generator`; inputs are never written to, and what changes nothing may
return its input. Images are uint8 (height, width, 3) in BGR. Which transform is applied when is decided in
`utils.dataset`. The constants are those of YOLOv5 v7.0.

Boxes come as float32 (n, 5): `corners` are [class, x1, y1, x2, y2] in pixels, `centres` [class, cx, cy, w, h] as shares
of the image's sides.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import cv2
import numpy as np

from utils.errors import InputError
from utils.log import LOGGER
from utils.planes import resize_planes

GRAY = 114
MIN_BOX_SIDE = 2.0  # pixels, after a perspective
MIN_AREA_SHARE = 0.10  # of a box's area before the perspective
MAX_ASPECT = 100.0
CLIP_MARGIN = 1e-3  # pixels that a normalised box stays inside the right and lower border
_LEVELS = np.arange(256, dtype=np.float32)


@dataclass(frozen=True)
class AugmentOptions:
    """Strengths and probabilities, named and defaulted as in `data/hyps/hyp.scratch-low.yaml`.

    hsv_*: share by which hue, saturation and value vary.  degrees, shear: up to +- degrees.  translate: +- share of the
    image. scale: zoom 1 +- scale.  perspective: +- perspective terms.  flipud, fliplr, mosaic, mixup: probabilities.
    """

    hsv_h: float = 0.015
    hsv_s: float = 0.7
    hsv_v: float = 0.4
    degrees: float = 0.0
    translate: float = 0.1
    scale: float = 0.5
    shear: float = 0.0
    perspective: float = 0.0
    flipud: float = 0.0
    fliplr: float = 0.5
    mosaic: float = 1.0
    mixup: float = 0.0

    def __post_init__(self) -> None:
        for name in (field.name for field in fields(self)):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise InputError(f"hyper-parameter {name} = {value}: must not be negative")
            if name in ("flipud", "fliplr", "mosaic", "mixup") and value > 1:
                raise InputError(f"hyper-parameter {name} = {value}: is a probability, so at most 1")
            if name == "scale" and value >= 1:
                raise InputError(f"hyper-parameter scale = {value}: the zoom is 1 +- scale, so it must be below 1")

    @classmethod
    def from_hyp(cls, hyp: Mapping[str, float]) -> AugmentOptions:
        """Take the augmentation keys out of a hyper-parameter mapping; other keys are left to their owners.

        `copy_paste` pastes polygons, and labels are boxes here: above 0 it is noted in the log and has no effect.
        """
        if hyp.get("copy_paste", 0) > 0:
            LOGGER.info("copy_paste needs polygons; labels are boxes here, so it has no effect")
        return cls(**{field.name: float(hyp[field.name]) for field in fields(cls) if field.name in hyp})


# Boxes ----------------------------------------------------------------------------------------------------------------


def to_corners(centres: np.ndarray, width: float, height: float, pad_x: float = 0.0, pad_y: float = 0.0) -> np.ndarray:
    """Turn `centres` into `corners` of an image of width x height pixels that begins at (pad_x, pad_y)."""
    corners = np.empty_like(centres)
    corners[:, 0] = centres[:, 0]
    half = centres[:, 3:5] / 2
    corners[:, 1:3] = centres[:, 1:3] - half
    corners[:, 3:5] = centres[:, 1:3] + half
    corners[:, 1:] *= np.array((width, height, width, height), np.float32)
    corners[:, 1:] += np.array((pad_x, pad_y, pad_x, pad_y), np.float32)
    return corners


def to_centres(corners: np.ndarray, width: int, height: int) -> np.ndarray:
    """Clip `corners` to the image, less `CLIP_MARGIN`, and normalise them to `centres`."""
    size = np.array((width, height), np.float32)
    low = np.clip(corners[:, 1:3], 0, size - CLIP_MARGIN)
    high = np.clip(corners[:, 3:5], 0, size - CLIP_MARGIN)
    centres = np.empty_like(corners)
    centres[:, 0] = corners[:, 0]
    centres[:, 1:3] = (low + high) / 2 / size
    centres[:, 3:5] = (high - low) / size
    return centres


def clip_corners(corners: np.ndarray, width: int, height: int) -> np.ndarray:
    """Clip `corners` to an image of width x height pixels."""
    clipped = corners.copy()
    np.clip(corners[:, 1:], 0, np.array((width, height, width, height), np.float32), out=clipped[:, 1:])
    return clipped


# Geometry -------------------------------------------------------------------------------------------------------------


def letterbox(
    image: np.ndarray,
    shape: tuple[int, int],
    colour: int = GRAY,
    *,
    scale_up: bool = True,
    auto_stride: int | None = None,
) -> tuple[np.ndarray, float, tuple[float, float]]:
    """Fit an image into `shape` = (height, width), keeping its aspect, and pad both sides of the shorter axis.

    Returns the image, its gain, and (pad_x, pad_y), the un-rounded halves of the padding: `x * gain + pad_x` maps a
    pixel of the input to the output, within the half pixel that the two sides of an odd padding differ by. Without
    `scale_up` a small image keeps its size. With `auto_stride` only the padding modulo that stride is kept, so the
    output may be smaller.
    """
    height, width = image.shape[:2]
    gain = min(shape[0] / height, shape[1] / width)
    if not scale_up:
        gain = min(gain, 1.0)
    new_width, new_height = max(round(width * gain), 1), max(round(height * gain), 1)
    pad_x, pad_y = shape[1] - new_width, shape[0] - new_height
    if auto_stride:
        pad_x, pad_y = pad_x % auto_stride, pad_y % auto_stride
    half_x, half_y = pad_x / 2, pad_y / 2

    if (new_width, new_height) != (width, height):
        image = cv2.resize(image, (new_width, new_height), interpolation=cv2.INTER_LINEAR)
    if pad_x or pad_y:
        top, bottom = round(half_y - 0.1), round(half_y + 0.1)
        left, right = round(half_x - 0.1), round(half_x + 0.1)
        image = cv2.copyMakeBorder(image, top, bottom, left, right, cv2.BORDER_CONSTANT, value=(colour,) * 3)
    return image, gain, (half_x, half_y)


def long_side_shape(height: int, width: int, imgsz: int) -> tuple[int, int]:
    """Return the (height, width) of an image whose long side becomes imgsz, the other in proportion, rounded up."""
    ratio = imgsz / max(height, width)
    # In floating point even the long side may come out above imgsz.
    return min(math.ceil(height * ratio), imgsz), min(math.ceil(width * ratio), imgsz)


def resize_long_side(image: np.ndarray, imgsz: int, *, smooth: bool, original: tuple[int, int] | None = None) -> np.ndarray:
    """Resize so that the long side is imgsz, the other rounded up (YOLOv5 after v7.0; v7.0 rounded down).

    `smooth` averages areas when shrinking, as YOLOv5 does for evaluation. `original` is the (height, width) that the
    new size follows from where the image was decoded at less than its own.
    """
    new_height, new_width = long_side_shape(*(original or image.shape[:2]), imgsz)
    if image.shape[:2] == (new_height, new_width):
        return image
    interpolation = cv2.INTER_AREA if smooth and imgsz < max(image.shape[:2]) else cv2.INTER_LINEAR
    return cv2.resize(image, (new_width, new_height), interpolation=interpolation)


def random_perspective(
    image: np.ndarray,
    corners: np.ndarray,
    rng: np.random.Generator,
    options: AugmentOptions,
    shape: tuple[int, int] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Rotate, zoom, shear, shift and tilt an image at random onto `shape` = (height, width), by default its own.

    The input's centre lands on the output's, apart from the shift, so a mosaic of twice the size is cropped to its
    middle. Returns the image and the boxes that survive `keeps`, as the hulls of their transformed corners, clipped.
    """
    height, width = shape or image.shape[:2]
    matrix, zoom = _random_matrix(rng, options, image.shape[:2], (height, width))
    if (height, width) != image.shape[:2] or not np.array_equal(matrix, np.eye(3)):
        border = (GRAY,) * 3
        if options.perspective:
            image = cv2.warpPerspective(image, matrix, (width, height), borderValue=border)
        else:
            image = cv2.warpAffine(image, matrix[:2], (width, height), borderValue=border)
    if not len(corners):
        return image, corners
    moved = clip_corners(_hulls(corners, matrix), width, height)
    return image, moved[keeps(corners, moved, zoom)]


def _random_matrix(
    rng: np.random.Generator, options: AugmentOptions, size: tuple[int, int], output: tuple[int, int]
) -> tuple[np.ndarray, float]:
    """Draw the matrix T Sh R P C (the rightmost acts first); return it with its zoom. Sizes are (height, width)."""
    draw = rng.uniform(-1, 1, 8)
    centre = np.array([[1, 0, -size[1] / 2], [0, 1, -size[0] / 2], [0, 0, 1]])
    tilt = np.array([[1, 0, 0], [0, 1, 0], [options.perspective * draw[0], options.perspective * draw[1], 1]])
    angle, zoom = math.radians(options.degrees * draw[2]), 1 + options.scale * draw[3]
    cos, sin = zoom * math.cos(angle), zoom * math.sin(angle)
    rotation = np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])
    shear_x, shear_y = (math.tan(math.radians(options.shear * value)) for value in draw[4:6])
    shear = np.array([[1, shear_x, 0], [shear_y, 1, 0], [0, 0, 1]])
    shift_x, shift_y = 0.5 + options.translate * draw[6:8]
    shift = np.array([[1, 0, shift_x * output[1]], [0, 1, shift_y * output[0]], [0, 0, 1]])
    return shift @ shear @ rotation @ tilt @ centre, zoom


def _hulls(corners: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Transform the four corners of each box and return the upright boxes around them."""
    points = np.ones((len(corners), 4, 3))
    points[..., :2] = corners[:, [1, 2, 3, 4, 1, 4, 3, 2]].reshape(-1, 4, 2)
    points = points @ matrix.T
    points = points[..., :2] / points[..., 2:]
    moved = np.empty_like(corners)
    moved[:, 0] = corners[:, 0]
    moved[:, 1:3] = points.min(axis=1)
    moved[:, 3:5] = points.max(axis=1)
    return moved


def keeps(before: np.ndarray, after: np.ndarray, zoom: float) -> np.ndarray:
    """Return the mask (n,) of boxes worth keeping: sides, aspect, and area left after zooming and clipping."""
    old = (before[:, 3:5] - before[:, 1:3]) * zoom
    new = after[:, 3:5] - after[:, 1:3]
    area_share = new.prod(axis=1) / (old.prod(axis=1) + 1e-16)
    aspect = new.max(axis=1) / (new.min(axis=1) + 1e-16)
    return (new > MIN_BOX_SIDE).all(axis=1) & (area_share > MIN_AREA_SHARE) & (aspect < MAX_ASPECT)


def mosaic4(tiles: Sequence[tuple[np.ndarray, np.ndarray]], imgsz: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Put four images on a gray canvas of side 2 * imgsz, their inner corners meeting at a random point.

    tiles: (image, centres) in the order upper left, upper right, lower left, lower right. Returns the canvas and the
    `corners` of all boxes on it, clipped to it.
    """
    side = 2 * imgsz
    canvas = np.full((side, side, 3), GRAY, np.uint8)
    meet_y, meet_x = (int(value) for value in rng.uniform(imgsz / 2, 3 * imgsz / 2, 2))
    boxes = []
    for number, (image, centres) in enumerate(tiles):
        height, width = image.shape[:2]
        # Where the tile's own upper left corner lies; it may be off the canvas.
        x = meet_x if number % 2 else meet_x - width
        y = meet_y if number // 2 else meet_y - height
        left, top, right, bottom = max(x, 0), max(y, 0), min(x + width, side), min(y + height, side)
        canvas[top:bottom, left:right] = image[top - y : bottom - y, left - x : right - x]
        boxes.append(to_corners(centres, width, height, x, y))
    return canvas, clip_corners(np.concatenate(boxes), side, side)


def flip_up_down(image: np.ndarray, centres: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mirror an image and its boxes upside down."""
    flipped = centres.copy()
    flipped[:, 2] = 1 - centres[:, 2]
    return cv2.flip(image, 0), flipped


def flip_left_right(image: np.ndarray, centres: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mirror an image and its boxes left to right."""
    flipped = centres.copy()
    flipped[:, 1] = 1 - centres[:, 1]
    return cv2.flip(image, 1), flipped


# Pixels ---------------------------------------------------------------------------------------------------------------


def mixup(
    first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Blend two (image, boxes) pairs of equal size with a ratio from Beta(32, 32) and join their boxes."""
    ratio = rng.beta(32.0, 32.0)
    image = cv2.addWeighted(first[0], ratio, second[0], 1 - ratio, 0)
    return image, np.concatenate((first[1], second[1]))


def jitter_hsv(image: np.ndarray, rng: np.random.Generator, options: AugmentOptions) -> np.ndarray:
    """Multiply hue (modulo 180), saturation and value (up to 255) by gains of 1 + U(-1, 1) * hsv_h, hsv_s, hsv_v."""
    strengths = (options.hsv_h, options.hsv_s, options.hsv_v)
    if not any(strengths):
        return image
    hue_gain, saturation_gain, value_gain = 1 + rng.uniform(-1, 1, 3) * strengths
    # Three one-channel tables are faster in OpenCV than one of three channels.
    hue, saturation, value = cv2.split(cv2.cvtColor(image, cv2.COLOR_BGR2HSV))
    jittered = cv2.merge(
        (
            cv2.LUT(hue, (_LEVELS * hue_gain % 180).astype(np.uint8)),
            cv2.LUT(saturation, np.clip(_LEVELS * saturation_gain, 0, 255).astype(np.uint8)),
            cv2.LUT(value, np.clip(_LEVELS * value_gain, 0, 255).astype(np.uint8)),
        )
    )
    return cv2.cvtColor(jittered, cv2.COLOR_HSV2BGR, dst=jittered)


def quad(images: Sequence[np.ndarray], labels: Sequence[np.ndarray], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Make one image of twice the size out of four: with probability 1/2 the first, enlarged, else all as a 2 x 2 tiling.

    images: planes (C, H, W), in the order upper left, lower left, upper right, lower right.  labels: float32 (n, 6),
    [0, class, cx, cy, w, h], normalised. Returns planes (C, 2H, 2W) and their labels.
    """
    if rng.random() < 0.5:
        height, width = images[0].shape[1:]
        return resize_planes(images[0], (2 * width, 2 * height)), labels[0]
    left, right = (np.concatenate(images[i : i + 2], axis=1) for i in (0, 2))
    tiles = []
    for rows, corner in zip(labels, ((0, 0), (0, 1), (1, 0), (1, 1))):
        tile = rows.copy()
        tile[:, 2:4] += np.array(corner, np.float32)
        tile[:, 2:] /= 2
        tiles.append(tile)
    return np.concatenate((left, right), axis=2), np.concatenate(tiles)
