"""What may not change the samples, and what may: decoding at reduced scale, the caches, quads. (Reading and batching: test_data.py.)"""

from __future__ import annotations

import pickle
import struct
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from utils.augment import (
    AugmentOptions,
    flip_left_right,
    flip_up_down,
    jitter_hsv,
    mosaic4,
    quad,
    random_perspective,
    resize_long_side,
    to_centres,
)
from utils.dataset import DatasetOptions, DetectionDataset, _reduction, make_loader
from utils.errors import InputError
from utils.image_cache import RamImages
from utils.labels import label_path, load_image, scan_labels
from utils.planes import stack, to_planes

SIZES = [(120, 160), (160, 120), (90, 161), (96, 96), (130, 127), (33, 200)]


def smooth_image(height: int, width: int, seed: int) -> np.ndarray:
    """An image with no detail that a JPEG at a quarter of the size could not hold."""
    return cv2.resize(np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8), (width, height))


@pytest.fixture
def jpegs(tmp_path) -> Path:
    """A folder of twelve JPEGs of several sizes, each with two boxes."""
    for number in range(12):
        image = tmp_path / "jpeg" / "images" / f"{number:02}.jpg"
        label = label_path(image)
        for path in (image, label):
            path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(image), smooth_image(*SIZES[number % 6], number))
        label.write_text(f"{number % 3} 0.4 0.5 0.4 0.3\n0 0.6 0.6 0.3 0.3\n")
    return tmp_path / "jpeg" / "images"


def same_pixels_as_png(jpegs: Path) -> Path:
    """The folder's images, decoded whole and stored without loss."""
    folder = jpegs.parents[1] / "png" / "images"
    for path in sorted(jpegs.glob("*.jpg")):
        copy = folder / path.with_suffix(".png").name
        for made in (copy, label_path(copy)):
            made.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(copy), load_image(path))
        label_path(copy).write_text(label_path(path).read_text())
    return folder


# Reduced scale --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("long_side", "imgsz", "reduction"), [(640, 640, 1), (1279, 640, 1), (1280, 640, 2), (2559, 640, 2), (2560, 640, 4), (9999, 640, 8)]
)
def test_reduction_keeps_the_long_side_at_the_target_or_above(long_side, imgsz, reduction):
    assert _reduction(long_side, imgsz) == reduction
    assert reduction == 1 or long_side // reduction >= imgsz


@pytest.mark.parametrize("orientation", range(1, 9))
def test_reduced_images_are_the_whole_ones_in_small_and_upright(tmp_path, orientation):
    coded = cv2.imencode(".jpg", smooth_image(96, 160, 0))[1].tobytes()
    payload = b"Exif\0\0II*\0" + struct.pack("<IHHHIHHI", 8, 1, 0x112, 3, 1, orientation, 0, 0)
    path = tmp_path / "image.jpg"
    path.write_bytes(coded[:2] + b"\xff\xe1" + struct.pack(">H", len(payload) + 2) + payload + coded[2:])
    whole = load_image(path)
    assert whole.shape == ((96, 160, 3) if orientation < 5 else (160, 96, 3))
    for reduction in (2, 4, 8):
        reduced = load_image(path, reduction)
        expected = cv2.resize(whole, (whole.shape[1] // reduction, whole.shape[0] // reduction), interpolation=cv2.INTER_AREA)
        assert reduced.shape == expected.shape
        assert np.abs(reduced.astype(int) - expected).max() <= 6


def test_only_jpegs_are_reduced_and_broken_ones_are_mended_as_ever(tmp_path):
    image = smooth_image(64, 96, 1)
    (tmp_path / "a.png").write_bytes(cv2.imencode(".png", image)[1].tobytes())
    np.testing.assert_array_equal(load_image(tmp_path / "a.png", 4), image)
    coded = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_BGR2GRAY))[1].tobytes()
    (tmp_path / "cut.jpg").write_bytes(coded[:-2])
    assert load_image(tmp_path / "cut.jpg", 2).shape == (32, 48, 3)


@pytest.mark.parametrize("augment", [None, AugmentOptions(mixup=0.5, degrees=5), AugmentOptions(mosaic=0.0)])
@pytest.mark.parametrize("rect", [False, True])
def test_samples_of_images_that_are_not_reduced_are_those_of_their_exact_pixels(jpegs, augment, rect):
    """Evaluation, whatever the size, and training at more than half of the images' size decode them whole."""
    options = DatasetOptions(imgsz=128 if augment else 32, augment=augment, rect=rect, batch_size=4)
    coded = DetectionDataset(scan_labels(jpegs), options)
    exact = DetectionDataset(scan_labels(same_pixels_as_png(jpegs)), options)
    for epoch in range(2):
        for position in range(12):
            one, two = coded[epoch, position], exact[epoch, position]
            assert torch.equal(one.image, two.image) and torch.equal(one.labels, two.labels) and one.shape == two.shape


@pytest.mark.parametrize("augment", [AugmentOptions(mixup=0.5), AugmentOptions(mosaic=0.0)])
def test_reduced_images_change_neither_labels_nor_shapes_and_hardly_a_pixel(jpegs, augment):
    labels, exact = scan_labels(jpegs), scan_labels(same_pixels_as_png(jpegs))
    for imgsz in (32, 48):
        options = DatasetOptions(imgsz=imgsz, augment=augment)
        reduced, whole = DetectionDataset(labels, options), DetectionDataset(exact, options)
        for position in range(12):
            one, two = reduced[0, position], whole[0, position]
            assert torch.equal(one.labels, two.labels) and one.shape == two.shape
            assert (one.image.int() - two.image.int()).abs().float().mean() < 6  # another image differs by more than 30


# The order of the augmentations -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("epoch", range(3))
def test_a_training_sample_is_its_transforms_in_order(jpegs, epoch):
    """The whole pipeline against its parts, copied to channels the plain way: whatever is made faster, the bits stay."""
    options = AugmentOptions(degrees=5, flipud=0.5)
    labels = scan_labels(jpegs)
    dataset = DetectionDataset(labels, DatasetOptions(imgsz=128, augment=options, seed=7))
    for index in range(12):
        rng = np.random.default_rng([7, epoch, index])
        assert rng.random() < options.mosaic
        members = np.array([index, *rng.integers(12, size=3)])
        rng.shuffle(members)
        tiles = [(resize_long_side(load_image(labels.images[i]), 128, smooth=False), labels.labels[i]) for i in members]
        canvas, corners = mosaic4(tiles, 128, rng)
        image, corners = random_perspective(canvas, corners, rng, options, (128, 128))
        assert rng.random() >= options.mixup
        centres, image = to_centres(corners, 128, 128), jitter_hsv(image, rng, options)
        if rng.random() < options.flipud:
            image, centres = flip_up_down(image, centres)
        if rng.random() < options.fliplr:
            image, centres = flip_left_right(image, centres)
        sample = dataset[epoch, index]
        np.testing.assert_array_equal(sample.image, image[..., ::-1].transpose(2, 0, 1))
        np.testing.assert_array_equal(sample.labels[:, 1:], centres)


@pytest.mark.parametrize("shape", [(31, 17), (1, 5), (64, 96)])
def test_planes_are_the_transposed_image_in_rgb(shape):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    for view in (image, image[:, ::2], image[::-1]):
        planes = to_planes(view, 3)
        np.testing.assert_array_equal(planes, view[..., ::-1].transpose(2, 0, 1))
        assert planes.transpose(1, 2, 0).flags.c_contiguous, "channels last in memory"
    stacked = stack([to_planes(image, 3), to_planes(image[::-1], 3)])
    assert stacked.is_contiguous(memory_format=torch.channels_last) and stacked.shape == (2, 3, *shape)
    np.testing.assert_array_equal(stacked[1], image[::-1, :, ::-1].transpose(2, 0, 1))


def test_batches_lie_in_memory_as_the_network_wants_them(jpegs):
    dataset = DetectionDataset(scan_labels(jpegs), DatasetOptions(imgsz=48, batch_size=4))
    for workers in (0, 1):
        for batch in make_loader(dataset, workers).epoch(0):
            assert batch.images.is_contiguous(memory_format=torch.channels_last)


# Caches ---------------------------------------------------------------------------------------------------------------


def test_ram_cache_is_the_same_in_every_process(jpegs):
    labels = scan_labels(jpegs)
    options = DatasetOptions(imgsz=48, augment=AugmentOptions(), batch_size=4)
    plain = list(make_loader(DetectionDataset(labels, options)).epoch(0))
    cached = DetectionDataset(labels, replace(options, cache="ram"))
    for dataset, workers in ((cached, 0), (cached, 2), (pickle.loads(pickle.dumps(cached)), 0)):
        for one, two in zip(plain, make_loader(dataset, workers).epoch(0), strict=True):
            assert torch.equal(one.images, two.images) and torch.equal(one.targets, two.targets)


def test_ram_images_come_back_and_cannot_be_written_to():
    shapes = np.array([(3, 4), (1, 7), (5, 2)])
    content = [np.random.default_rng(i).integers(0, 256, (*shape, 3), dtype=np.uint8) for i, shape in enumerate(shapes)]
    images = RamImages(shapes)
    images.fill(content.__getitem__)
    assert len(images) == 3
    for index, image in enumerate(content):
        np.testing.assert_array_equal(images[index], image)
        assert not images[index].flags.writeable


# Quad -----------------------------------------------------------------------------------------------------------------


def test_quad_enlarges_the_first_or_tiles_all_four():
    images = [np.full((3, 8, 10), 10 * (i + 1), np.uint8) for i in range(4)]
    labels = [np.array([[0, i, 0.5, 0.5, 0.2, 0.4]], np.float32) for i in range(4)]
    enlarged = 0
    for seed in range(40):
        image, rows = quad(images, labels, np.random.default_rng(seed))
        assert image.shape == (3, 16, 20) and image.dtype == np.uint8 and rows.dtype == np.float32
        if len(rows) == 1:
            enlarged += 1
            assert (image == 10).all()
            np.testing.assert_array_equal(rows, labels[0])
            continue
        corners = image[0, [0, -1, 0, -1], [0, 0, -1, -1]]
        assert corners.tolist() == [10, 20, 30, 40]
        centres = [[0.25, 0.25], [0.25, 0.75], [0.75, 0.25], [0.75, 0.75]]
        np.testing.assert_allclose(rows[:, 2:], [[*centre, 0.1, 0.2] for centre in centres], atol=1e-6)
        assert rows[:, 1].tolist() == [0, 1, 2, 3]
    assert 10 < enlarged < 30


def test_quad_batches_are_a_quarter_as_long_and_depend_on_seed_and_epoch_alone(jpegs):
    labels = scan_labels(jpegs)
    options = DatasetOptions(imgsz=32, augment=AugmentOptions(), batch_size=8, quad=True, seed=5)
    dataset = DetectionDataset(labels, options)
    alone, helped = make_loader(dataset, 0, shuffle=True), make_loader(dataset, 2, shuffle=True)
    assert len(alone) == 2
    epochs = []
    for epoch in (0, 1, 0):
        mine, theirs = list(alone.epoch(epoch)), list(helped.epoch(epoch))
        assert [tuple(batch.images.shape) for batch in mine] == [(2, 3, 64, 64), (1, 3, 64, 64)]
        for one, two in zip(mine, theirs, strict=True):
            assert torch.equal(one.images, two.images) and torch.equal(one.targets, two.targets) and one.paths == two.paths
            assert len(one.indices) == len(one.images) and set(one.targets[:, 0].int().tolist()) <= set(range(len(one.images)))
        epochs.append(torch.cat([batch.images for batch in mine]))
    assert torch.equal(epochs[0], epochs[2]) and not torch.equal(epochs[0], epochs[1])


def test_quad_leaves_out_the_images_beyond_a_multiple_of_four(jpegs):
    for path in sorted(jpegs.glob("*.jpg"))[:2]:
        path.unlink()
    options = DatasetOptions(imgsz=32, batch_size=8, quad=True)
    loader = make_loader(DetectionDataset(scan_labels(jpegs), options), shuffle=True)
    assert len(loader) == 1 and [len(batch) for batch in loader.epoch(0)] == [2]


def test_quad_needs_fours(jpegs):
    with pytest.raises(InputError, match="--batch-size 6: --quad makes one image of four"):
        DatasetOptions(batch_size=6, quad=True)
    for path in sorted(jpegs.glob("*.jpg"))[3:]:
        path.unlink()
    with pytest.raises(InputError, match="there are only 3"):
        make_loader(DetectionDataset(scan_labels(jpegs), DatasetOptions(imgsz=32, batch_size=4, quad=True)))
