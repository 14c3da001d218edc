"""Calibration: where tails are cut, and which ranges a network gets from images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.calibrate import CalibrationOptions, _Histograms, calibrated, find_ranges
from models.checkpoint import Model
from models.network import Network, fuse
from models.quantization import QuantScheme, quantize
from tests.helpers import SMALL_CLASSIFIER, alive, small, write_dataset
from utils.errors import InputError
from utils.thresholds import METHODS, entropy_threshold, percentile_range

AFFINE, SYMMETRIC, CPU = QuantScheme(), QuantScheme(symmetric=True), torch.device("cpu")
NAMES = ("a", "b", "c")


def histogram(values: np.ndarray, most: float, bins: int = 4096) -> np.ndarray:
    return np.histogram(values, bins, (-most, most))[0].astype(float)


# ---- where tails are cut -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("percentile", [90.0, 99.0, 99.9])
def test_percentile_leaves_out_its_share_at_either_end(percentile: float) -> None:
    values = np.random.default_rng(0).normal(1.0, 2.0, 100_000)
    low, high = percentile_range(histogram(values, 12.0), 12.0, percentile)
    width, tail = 24 / 4096, (100 - percentile) / 100
    assert (values < low).mean() <= tail < (values < low + width).mean()
    assert (values > high).mean() <= tail < (values > high - width).mean()


def test_the_hundredth_percentile_leaves_out_nothing() -> None:
    values = np.array([-3.0, 0.0, 5.0])
    low, high = percentile_range(histogram(values, 8.0), 8.0, 100.0)
    assert low <= -3.0 < low + 16 / 4096 and high - 16 / 4096 <= 5.0 <= high


def test_entropy_keeps_what_has_no_tail_and_cuts_what_has() -> None:
    rng = np.random.default_rng(0)
    assert entropy_threshold(histogram(rng.uniform(-1, 1, 400_000), 1.0), 1.0) > 0.95
    long = np.concatenate((rng.normal(0, 1, 400_000), [60.0, -55.0]))
    assert 2.5 < entropy_threshold(histogram(long, 60.0), 60.0) < 12
    heavier = np.concatenate((rng.normal(0, 1, 400_000), rng.normal(0, 12, 40_000).clip(-60, 60)))
    assert entropy_threshold(histogram(heavier, 60.0), 60.0) > entropy_threshold(histogram(long, 60.0), 60.0)


def test_more_levels_let_entropy_reach_further() -> None:
    values = np.abs(np.random.default_rng(0).laplace(0, 1, 200_000)).clip(0, 16)
    cuts = [entropy_threshold(histogram(values, 16.0), 16.0, levels) for levels in (64, 128, 256)]
    assert cuts == sorted(cuts) and cuts[0] < cuts[-1]


def test_entropy_scales_with_the_values() -> None:
    values = np.random.default_rng(0).normal(0, 1, 100_000)
    assert entropy_threshold(histogram(values * 7, 70.0), 70.0) == pytest.approx(7 * entropy_threshold(histogram(values, 10.0), 10.0))


def test_entropy_of_next_to_nothing_is_finite() -> None:
    assert 0 < entropy_threshold(histogram(np.array([0.5]), 1.0), 1.0) <= 1
    assert 0 < entropy_threshold(np.zeros(4096), 1.0) <= 1


def test_a_histogram_counts_every_value() -> None:
    """Also what lies below the range, which `floors` cut."""
    histograms = _Histograms(np.array([-2.0, -0.1]), np.array([1.0, 4.0]))
    histograms(0, torch.linspace(-50, 1, 1000).view(2, 5, 10, 10))
    histograms(1, torch.zeros(10))
    assert histograms.counts.sum(1).tolist() == [1000, 10] and histograms.counts[0, 0] > 900
    assert histograms.most.tolist() == [2.0, 4.0]


# ---- ranges of a network -------------------------------------------------------------------------------------------------------


def batches(count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.rand(2, 3, 64, 64, generator=generator) for _ in range(count)]


def ranges(network: Network, method: str, scheme: QuantScheme = AFFINE) -> dict[str, tuple[float, float]]:
    images = batches()
    return find_ranges(fuse(network), lambda: iter(images), scheme, method, len(images))


def seen(network: Network) -> dict[str, list[Tensor]]:
    """The values of each member in the float network, batch by batch."""
    fused = fuse(network)
    quantize(fused, AFFINE)
    members, found = fused.quantization.plan.members, {}
    fused.quantization.watch = lambda member, x: found.setdefault(members[member], []).append(x.clone())
    with torch.no_grad():
        for images in batches():
            fused(images)
    return found


def test_minmax_is_the_mean_over_the_batches() -> None:
    network = alive(small())
    found, values = ranges(network, "minmax"), seen(network)
    assert found.keys() == values.keys() and len(found) > 40
    for name, parts in values.items():
        if name == "input.0":
            continue
        assert found[name][1] == pytest.approx(float(np.mean([float(x.max()) for x in parts])), rel=1e-5)
        lows = [float(x.min()) for x in parts]
        floor = -8.0 if name.endswith(".pre") else -np.inf
        assert found[name][0] == pytest.approx(float(np.mean(np.maximum(lows, floor))), rel=1e-5)


@pytest.mark.parametrize("method", ["percentile", "entropy"])
def test_tails_are_cut_within_what_was_seen(method: str) -> None:
    network = alive(small())
    found, values, cut = ranges(network, method), seen(network), 0
    for name, parts in values.items():
        low, high = found[name]
        if name != "input.0":
            x = torch.cat([p.flatten() for p in parts])
            assert float(x.min()) - 1e-5 <= low < high <= float(x.max()) + 1e-5
            cut += high < float(x.max()) - 1e-5
    assert cut > 5


@pytest.mark.parametrize("method", METHODS)
def test_an_image_has_the_levels_of_its_bytes(method: str) -> None:
    network = alive(small())
    found = ranges(network, method)
    assert found[next(iter(found))] == (0.0, 1.0)


@pytest.mark.parametrize("scheme", [AFFINE, SYMMETRIC])
@pytest.mark.parametrize("method", METHODS)
def test_a_calibrated_network_is_near_the_float_one(method: str, scheme: QuantScheme) -> None:
    network = alive(small(), calm=True)
    rounded = fuse(network)
    quantize(rounded, scheme, ranges(network, method, scheme))
    with torch.no_grad():
        want, got = fuse(network)(batches(1)[0]), rounded(batches(1)[0])
    for a, b in zip(want, got):
        assert 0 < (a - b).pow(2).mean() < 0.01 * a.var()


# ---- from a checkpoint and a data set ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"), images=7)


@pytest.fixture
def model() -> Iterator[Model]:
    network = alive(small(), calm=True)
    yield Model(network.blocks, network.state_dict(), NAMES, imgsz=64)


def test_calibration_adds_ranges_and_changes_nothing_else(model: Model, data: Path) -> None:
    before = {k: v.clone() for k, v in model.state.items()}
    made = calibrated(model, CalibrationOptions(str(data)), AFFINE, CPU)
    assert replace(made, quantization=None) == replace(model, quantization=None)
    assert all(torch.equal(v, model.state[k]) for k, v in before.items())
    assert made.network().quantization.observed and made.quantization.scheme == AFFINE


def test_batches_do_not_matter_to_percentiles(model: Model, data: Path) -> None:
    one, other = (
        calibrated(model, CalibrationOptions(str(data), "percentile", batch_size=n), AFFINE, CPU).quantization.ranges for n in (2, 7)
    )
    for name, pair in one.items():
        assert pair == pytest.approx(other[name], rel=0.01, abs=0.01)


def test_as_many_images_as_asked_for_drawn_by_the_seed(model: Model, data: Path, capsys) -> None:
    def found(**options: object) -> dict:
        return dict(calibrated(model, CalibrationOptions(str(data), "minmax", **options), AFFINE, CPU).quantization.ranges)

    assert found(images=2) == found(images=2) != found(images=2, seed=1)
    capsys.readouterr()
    assert found(images=7) == found(images=100)
    said = capsys.readouterr().out
    assert "has 7 training images, and all of them are used" in said and "ranges from 7 images" in said


def test_other_classes_are_told(model: Model, data: Path, capsys) -> None:
    calibrated(replace(model, names=("a",)), CalibrationOptions(str(data), images=1), QuantScheme(), CPU)
    assert "has 3 classes, and the model 1; only its images are looked at" in capsys.readouterr().out


def test_images_may_have_another_shape(model: Model, data: Path, capsys) -> None:
    calibrated(model, CalibrationOptions(str(data), imgsz=(33, 96)), AFFINE, CPU)
    assert "at 48x96 px, minmax" in capsys.readouterr().out


def test_what_cannot_be_calibrated_is_told(model: Model, data: Path, tmp_path: Path) -> None:
    from models.yaml_reader import from_spec

    options = CalibrationOptions(str(data))
    with pytest.raises(InputError, match="m.pt: is quantised already, and cannot be quantised twice"):
        calibrated(calibrated(model, options, AFFINE, CPU), options, AFFINE, CPU, "m.pt")
    classifier = alive(from_spec(SMALL_CLASSIFIER, "classifier", 3))
    with pytest.raises(InputError, match="is a classifier"):
        calibrated(Model(classifier.blocks, classifier.state_dict(), NAMES), options, AFFINE, CPU)
    broken = {k: v.clone() for k, v in model.state.items()}
    broken["model.2.cv1.conv.weight"][0] = float("nan")
    with pytest.raises(InputError, match=r"model\.2\.cv1\S* gives values that are no numbers"):
        calibrated(replace(model, state=broken), options, AFFINE, CPU)
    with pytest.raises(InputError, match="model.99: the model has no convolution under that path"):
        calibrated(model, options, QuantScheme(ignore=("model.99",)), CPU)
    with pytest.raises(InputError, match="--calibration entropi: known are minmax, percentile, entropy; did you mean entropy"):
        CalibrationOptions(str(data), "entropi")
    with pytest.raises(InputError, match="--calibration-images 0: give at least 1"):
        CalibrationOptions(str(data), images=0)
