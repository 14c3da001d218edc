"""Transforms of images and boxes: a box has to stay on the pixels it was drawn around."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml

from utils.augment import (
    AugmentOptions,
    _random_matrix,
    flip_left_right,
    flip_up_down,
    jitter_hsv,
    keeps,
    letterbox,
    mixup,
    mosaic4,
    random_perspective,
    resize_long_side,
    to_centres,
    to_corners,
)
from utils.errors import InputError

HYPS = Path(__file__).resolve().parents[1] / "data" / "hyps"
STILL = AugmentOptions(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)


def painted(height: int, width: int, box: tuple[int, int, int, int], colour: tuple[int, int, int], cls: int = 0):
    """A black image with a filled rectangle, and the rectangle as corners."""
    image = np.zeros((height, width, 3), np.uint8)
    x1, y1, x2, y2 = box
    image[y1:y2, x1:x2] = colour
    return image, np.array([[cls, *box]], np.float32)


def pixels(image: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """The corners x1, y1, x2, y2 of the pixels whose colour is close to the given one."""
    near = np.abs(image.astype(int) - colour).max(axis=2) < 100
    y, x = np.nonzero(near)
    return np.array([x.min(), y.min(), x.max() + 1, y.max() + 1], np.float32)


@pytest.mark.parametrize(
    ("size", "shape", "options", "out", "gain", "pad"),
    [
        ((480, 640), (640, 640), {}, (640, 640), 1.0, (0, 80)),
        ((427, 640), (640, 640), {}, (640, 640), 1.0, (0, 106.5)),
        ((100, 50), (200, 200), {}, (200, 200), 2.0, (50, 0)),
        ((100, 50), (200, 200), {"scale_up": False}, (200, 200), 1.0, (75, 50)),
        ((480, 640), (640, 640), {"auto_stride": 32}, (480, 640), 1.0, (0, 0)),
        ((427, 640), (640, 640), {"auto_stride": 32}, (448, 640), 1.0, (0, 10.5)),
        ((1080, 810), (640, 640), {"auto_stride": 32}, (640, 480), 640 / 1080, (0, 0)),
    ],
)
def test_letterbox_geometry(size, shape, options, out, gain, pad):
    image = np.full((*size, 3), 255, np.uint8)
    boxed, found_gain, found_pad = letterbox(image, shape, **options)
    assert boxed.shape == (*out, 3)
    assert found_gain == pytest.approx(gain)
    assert found_pad == pad


def test_letterbox_puts_the_smaller_half_of_odd_padding_first():
    wide, _, _ = letterbox(np.full((427, 640, 3), 255, np.uint8), (640, 640))
    high, _, _ = letterbox(np.full((640, 427, 3), 255, np.uint8), (640, 640))
    for line in (wide[:, 0, 0], high[0, :, 0]):
        assert (line[:106] == 114).all() and (line[106:533] == 255).all() and (line[533:] == 114).all()


def test_letterbox_maps_boxes_there_and_back():
    box = (50, 20, 190, 80)
    image, corners = painted(150, 200, box, (0, 0, 255))
    boxed, gain, (pad_x, pad_y) = letterbox(image, (320, 416))
    expected = np.array(box) * gain + [pad_x, pad_y, pad_x, pad_y]
    np.testing.assert_allclose(pixels(boxed, (0, 0, 255)), expected, atol=1)
    centres = to_centres(to_corners(to_centres(corners, 200, 150), 200 * gain, 150 * gain, pad_x, pad_y), 416, 320)
    back = (to_corners(centres, 416, 320)[:, 1:] - [pad_x, pad_y, pad_x, pad_y]) / gain
    np.testing.assert_allclose(back, corners[:, 1:], atol=1e-2)


def test_letterbox_leaves_a_fitting_image_alone():
    image = np.zeros((64, 64, 3), np.uint8)
    assert letterbox(image, (64, 64))[0] is image


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"translate": 0.2, "scale": 0.5},
        {"degrees": 45.0},
        {"shear": 15.0},
        {"perspective": 0.0008},
        {"degrees": 20.0, "translate": 0.1, "scale": 0.3, "shear": 5.0, "perspective": 0.0005},
    ],
)
@pytest.mark.parametrize("seed", range(4))
def test_perspective_moves_boxes_with_their_pixels(options, seed):
    image, corners = painted(240, 320, (110, 90, 200, 150), (0, 255, 0), cls=7)
    warped, moved = random_perspective(image, corners, np.random.default_rng(seed), replace(STILL, **options))
    assert warped.shape == image.shape
    assert moved[0, 0] == 7
    np.testing.assert_allclose(moved[0, 1:], pixels(warped, (0, 255, 0)), atol=2)


@pytest.mark.parametrize(("size", "imgsz", "out"), [((427, 640), 320, (214, 320)), ((77, 30), 320, (320, 125)), ((1000, 3), 320, (320, 1))])
def test_long_side_is_exact_and_the_other_rounded_up(size, imgsz, out):
    image = np.zeros((*size, 3), np.uint8)
    assert resize_long_side(image, imgsz, smooth=True).shape[:2] == out
    assert resize_long_side(image, max(size), smooth=True) is image


def test_long_side_is_exact_for_every_size():
    for long_side in range(10, 700):
        assert resize_long_side(np.zeros((long_side, 1, 3), np.uint8), 320, smooth=False).shape[0] == 320


def test_perspective_without_strength_changes_nothing():
    image, corners = painted(64, 64, (8, 8, 20, 30), (0, 255, 0))
    warped, moved = random_perspective(image, corners, np.random.default_rng(0), STILL)
    assert warped is image
    np.testing.assert_array_equal(moved, corners)


def test_matrix_is_shift_shear_rotation_tilt_centre():
    options = AugmentOptions(degrees=30, scale=0.5, shear=10, translate=0.2, perspective=0.001)
    matrix, zoom = _random_matrix(np.random.default_rng(3), options, (100, 200), (60, 80))
    tilt, turn, scale, shear, shift = np.split(np.random.default_rng(3).uniform(-1, 1, 8), (2, 3, 4, 6))
    assert zoom == pytest.approx(1 + 0.5 * scale[0])
    centre, perspective, rotation, slant, move = (np.eye(3) for _ in range(5))
    centre[:2, 2] = -100, -50
    perspective[2, :2] = 0.001 * tilt
    rotation[:2] = cv2.getRotationMatrix2D((0, 0), 30 * turn[0], zoom)
    slant[(0, 1), (1, 0)] = np.tan(np.deg2rad(10 * shear))
    move[:2, 2] = (0.5 + 0.2 * shift) * (80, 60)
    by_hand = move @ slant @ rotation @ perspective @ centre
    np.testing.assert_allclose(matrix, by_hand, atol=1e-9)


def test_perspective_crops_a_larger_canvas_to_its_middle():
    image, corners = painted(200, 200, (90, 80, 120, 130), (0, 255, 0))
    warped, moved = random_perspective(image, corners, np.random.default_rng(0), STILL, (100, 100))
    np.testing.assert_array_equal(warped, image[50:150, 50:150])
    np.testing.assert_array_equal(moved[0, 1:], [40, 30, 70, 80])


def test_perspective_fills_with_gray_and_drops_boxes_that_left():
    image, corners = painted(100, 100, (2, 2, 8, 8), (0, 255, 0))
    options = replace(STILL, translate=0.9)
    for seed in range(20):
        warped, moved = random_perspective(image, corners, np.random.default_rng(seed), options)
        visible = (np.abs(warped.astype(int) - (0, 255, 0)).max(axis=2) < 100).any()
        assert len(moved) <= visible
        assert (warped == 114).all(axis=2).any()


@pytest.mark.parametrize(
    ("after", "kept"),
    [
        ((0, 0, 100, 100), True),
        ((0, 0, 2, 100), False),  # a side must exceed 2 pixels
        ((0, 0, 2.5, 100), False),  # 2.5% of the area is left
        ((0, 0, 20, 49), False),  # 9.8%
        ((0, 0, 20, 51), True),  # 10.2%
    ],
)
def test_candidate_filter(after, kept):
    before = np.array([[0, 0, 0, 100, 100]], np.float32)
    assert keeps(before, np.array([[0, *after]], np.float32), 1.0)[0] == kept


def test_candidate_filter_compares_with_the_zoomed_area_and_limits_the_aspect():
    before = np.array([[0, 0, 0, 100, 100]], np.float32)
    after = np.array([[0, 0, 0, 40, 30]], np.float32)
    assert keeps(before, after, 1.0)[0] and not keeps(before, after, 1.2)[0]
    flat = np.array([[0, 0, 0, 400, 3.9], [0, 0, 0, 380, 3.9]], np.float32)
    assert keeps(flat, flat, 1.0).tolist() == [False, True]


@pytest.mark.parametrize("seed", range(6))
def test_mosaic_boxes_lie_on_their_pixels(seed):
    colours = [(0, 0, 255), (0, 255, 0), (255, 0, 0), (0, 255, 255)]
    sizes = [(64, 64), (48, 64), (64, 40), (30, 64)]
    tiles = []
    for number, (colour, (height, width)) in enumerate(zip(colours, sizes)):
        box = (width // 4, height // 4, 3 * width // 4, 3 * height // 4)
        image, corners = painted(height, width, box, colour, number)
        tiles.append((image, to_centres(corners, width, height)))
    canvas, corners = mosaic4(tiles, 64, np.random.default_rng(seed))
    assert canvas.shape == (128, 128, 3) and len(corners) == 4
    assert corners[:, 1:].min() >= 0 and corners[:, 1:].max() <= 128
    for number, colour in enumerate(colours):
        np.testing.assert_allclose(corners[number, 1:], pixels(canvas, colour), atol=0.1)


def test_mosaic_centre_is_drawn_from_the_middle_half():
    white = (np.full((64, 64, 3), 255, np.uint8), np.zeros((0, 5), np.float32))
    gray = (np.full((64, 64, 3), 1, np.uint8), np.zeros((0, 5), np.float32))
    rng = np.random.default_rng(0)
    meets = []
    for _ in range(200):
        canvas, corners = mosaic4((white, gray, gray, gray), 64, rng)
        assert corners.shape == (0, 5)
        meets.append(pixels(canvas, (255, 255, 255))[2:])
    meets = np.array(meets)
    assert meets.min() >= 32 and meets.max() < 96
    assert np.ptp(meets, axis=0).min() > 50


def test_mosaic_then_perspective_keeps_boxes_on_their_pixels():
    image, corners = painted(160, 160, (40, 40, 120, 120), (0, 0, 255))
    blank = (np.zeros((160, 160, 3), np.uint8), np.zeros((0, 5), np.float32))
    tile = (image, to_centres(corners, 160, 160))
    checked = 0
    for seed in range(8):
        rng = np.random.default_rng(seed)
        canvas, boxes = mosaic4((tile, blank, blank, blank), 160, rng)
        warped, boxes = random_perspective(canvas, boxes, rng, AugmentOptions(), (160, 160))
        if len(boxes):
            np.testing.assert_allclose(boxes[0, 1:], pixels(warped, (0, 0, 255)), atol=2)
            checked += 1
    assert checked >= 4


@pytest.mark.parametrize("flip", [flip_left_right, flip_up_down])
def test_flips_move_boxes_with_their_pixels_and_undo_themselves(flip):
    image, corners = painted(60, 100, (10, 5, 40, 25), (255, 0, 0))
    centres = to_centres(corners, 100, 60)
    flipped, moved = flip(image, centres)
    np.testing.assert_allclose(to_corners(moved, 100, 60)[0, 1:], pixels(flipped, (255, 0, 0)), atol=1e-3)
    again, back = flip(flipped, moved)
    np.testing.assert_array_equal(again, image)
    np.testing.assert_allclose(back, centres, atol=1e-6)


def test_mixup_blends_near_the_middle_and_joins_boxes():
    dark, bright = np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 200, np.uint8)
    boxes = np.array([[1, 0, 0, 4, 4]], np.float32), np.array([[2, 1, 1, 5, 5]], np.float32)
    ratios = []
    for seed in range(200):
        image, joined = mixup((dark, boxes[0]), (bright, boxes[1]), np.random.default_rng(seed))
        ratios.append(image[0, 0, 0] / 200)
    np.testing.assert_array_equal(joined, np.concatenate(boxes))
    # Beta(32, 32) has mean 1/2 and standard deviation 1 / sqrt(4 * 65).
    assert np.mean(ratios) == pytest.approx(0.5, abs=0.02)
    assert np.std(ratios) == pytest.approx(0.062, abs=0.01)


@pytest.mark.parametrize("seed", range(4))
def test_hsv_jitter_multiplies_each_channel(seed):
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    options = replace(STILL, hsv_h=0.1, hsv_s=0.7, hsv_v=0.4)
    gains = 1 + np.random.default_rng(seed).uniform(-1, 1, 3) * (0.1, 0.7, 0.4)
    scaled = cv2.cvtColor(image, cv2.COLOR_BGR2HSV) * gains
    scaled[..., 0] %= 180
    expected = cv2.cvtColor(np.clip(scaled, 0, 255).astype(np.uint8), cv2.COLOR_HSV2BGR)
    found = jitter_hsv(image, np.random.default_rng(seed), options)
    assert np.abs(found.astype(int) - expected).max() <= 1
    assert (found != image).any()


def test_hsv_jitter_without_strength_returns_the_image():
    image = np.zeros((4, 4, 3), np.uint8)
    assert jitter_hsv(image, np.random.default_rng(0), STILL) is image


def test_nothing_writes_to_its_input():
    image, corners = painted(64, 64, (10, 10, 40, 40), (0, 255, 0))
    image.setflags(write=False)
    corners.setflags(write=False)
    centres = to_centres(corners, 64, 64)
    centres.setflags(write=False)
    rng = np.random.default_rng(0)
    options = AugmentOptions(degrees=5)
    letterbox(image, (96, 128))
    random_perspective(image, corners, rng, options)
    mosaic4([(image, centres)] * 4, 64, rng)
    mixup((image, corners), (image, corners), rng)
    jitter_hsv(image, rng, options)
    flip_left_right(image, centres)
    flip_up_down(image, centres)


def test_normalising_clips_just_inside_the_border():
    centres = to_centres(np.array([[0, -10, -10, 200, 50]], np.float32), 100, 100)
    corners = to_corners(centres, 100, 100)
    np.testing.assert_allclose(corners[0, 1:], [0, 0, 99.999, 50], atol=1e-4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mosaic": 1.5}, "mosaic = 1.5: is a probability"),
        ({"degrees": -1.0}, "degrees = -1.0: must not be negative"),
        ({"scale": 1.0}, "scale = 1.0: the zoom"),
        ({"hsv_h": float("nan")}, "hsv_h = nan"),
    ],
)
def test_bad_strengths_are_refused(wrong, message):
    with pytest.raises(InputError, match=message):
        AugmentOptions.from_hyp(wrong)


SCRATCH = {
    "low": {"lrf": 0.01, "cls": 0.5, "obj": 1.0, "scale": 0.5, "mixup": 0, "copy_paste": 0},
    "med": {"lrf": 0.1, "cls": 0.3, "obj": 0.7, "scale": 0.9, "mixup": 0.1, "copy_paste": 0},
    "high": {"lrf": 0.1, "cls": 0.3, "obj": 0.7, "scale": 0.9, "mixup": 0.1, "copy_paste": 0.1},
}
SCRATCH_COMMON = {
    "lr0": 0.01, "momentum": 0.937, "weight_decay": 0.0005, "nbs": 64, "label_smoothing": 0,
    "warmup_epochs": 3, "warmup_momentum": 0.8, "warmup_bias_lr": 0.1,
    "box": 0.05, "cls_pw": 1, "obj_pw": 1, "iou_t": 0.2, "anchor_t": 4, "fl_gamma": 0,
    "hsv_h": 0.015, "hsv_s": 0.7, "hsv_v": 0.4, "degrees": 0, "translate": 0.1, "shear": 0, "perspective": 0,
    "flipud": 0, "fliplr": 0.5, "mosaic": 1,
}  # fmt: skip


@pytest.mark.parametrize("name", SCRATCH)
def test_shipped_hyper_parameters(name):
    hyp = yaml.safe_load((HYPS / f"hyp.scratch-{name}.yaml").read_text())
    assert hyp == SCRATCH_COMMON | SCRATCH[name]
    expected = AugmentOptions(scale=SCRATCH[name]["scale"], mixup=SCRATCH[name]["mixup"])
    assert AugmentOptions.from_hyp(hyp) == expected


def test_copy_paste_is_noted(capsys):
    AugmentOptions.from_hyp({"copy_paste": 0.1})
    assert "copy_paste needs polygons" in capsys.readouterr().out
