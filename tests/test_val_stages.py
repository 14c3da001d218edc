"""What evaluation does faster or beside the network gives what the plain way gives: candidates, views, the thread behind."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from engine.behind import one_behind
from engine.evaluate import EvaluateOptions, evaluate
from engine.tta import AUGMENTED, PLAIN, View, candidates
from models.network import Network, fuse
from tests.helpers import alive, small, write_dataset
from utils import nms as nms_module
from utils.boxes import xywh_to_xyxy
from utils.data_config import read_data
from utils.dataset import DatasetOptions, DetectionDataset, EpochLoader, make_loader
from utils.decode import decode, decode_candidates
from utils.device import Precision, ReusedImages
from utils.labels import scan_labels
from utils.metrics import ConfusionMatrix
from utils.nms import non_max_suppression


@pytest.fixture(scope="module")
def network() -> Network:
    return alive(small(), seed=3)


@pytest.fixture(scope="module")
def maps(network: Network) -> list[torch.Tensor]:
    with torch.no_grad():
        return network(torch.rand(3, 3, 64, 96, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("threshold", [0.0, 0.001, 0.25, 0.7, 0.999999, 1.0])
def test_candidates_are_the_rows_of_decode_above_the_threshold(network: Network, maps: list[torch.Tensor], threshold: float) -> None:
    whole = decode(maps, network.levels)
    few = decode_candidates(maps, network.levels, threshold)
    assert len(few) == 3
    for rows, all_rows in zip(few, whole):
        rows = rows[rows[:, 4] > threshold]
        torch.testing.assert_close(rows, all_rows[all_rows[:, 4] > threshold], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_candidates_of_half_precision_maps_are_decoded_in_float32(network: Network, maps: list[torch.Tensor], dtype: torch.dtype) -> None:
    half = [m.to(dtype) for m in maps]
    whole = decode(half, network.levels)
    few = decode_candidates(half, network.levels, 0.4)
    for rows, all_rows in zip(few, whole):
        assert rows.dtype == torch.float32
        torch.testing.assert_close(rows[rows[:, 4] > 0.4], all_rows[all_rows[:, 4] > 0.4], rtol=1e-6, atol=1e-5)


def test_the_same_detections_with_and_without_candidates(network: Network, maps: list[torch.Tensor]) -> None:
    whole = non_max_suppression(decode(maps, network.levels), 0.3, 0.6, multi_label=True)
    few = non_max_suppression(decode_candidates(maps, network.levels, 0.3), 0.3, 0.6, multi_label=True)
    assert sum(len(d) for d in whole) > 100
    for a, b in zip(few, whole):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("spread", [5.0, 200.0])
def test_a_prefix_of_the_candidates_gives_the_first_survivors_of_all(spread: float, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    rows = torch.rand(1, 3000, 7, generator=generator)
    rows[..., :2] = rows[..., :2] * spread + 100
    rows[..., 2:4] = rows[..., 2:4] * 20 + 10
    short = non_max_suppression(rows, 0.01, 0.5, multi_label=True, max_det=7)[0]
    monkeypatch.setattr(nms_module, "PREFIX", 10**6)
    whole = non_max_suppression(rows, 0.01, 0.5, multi_label=True, max_det=7)[0]
    assert 2 < len(whole) <= 7 and torch.equal(short, whole)


# ---- test-time augmentation -----------------------------------------------------------------------------------------------------


def test_the_views_are_padded_to_the_stride_with_grey() -> None:
    images = torch.rand(2, 3, 64, 96)
    scaled = View(0.67).of(images, 32)
    assert scaled.shape == (2, 3, 64, 96)  # 42.88 and 64.32, raised to multiples of 32
    assert (scaled[:, :, 42:] == torch.tensor(0.447)).all() and (scaled[:, :, :, 64:] == torch.tensor(0.447)).all()
    assert (scaled[:, :, :42, :64] != torch.tensor(0.447)).all()
    assert View(0.83, True).of(torch.rand(1, 3, 640, 640), 32).shape == (1, 3, 544, 544)
    assert PLAIN[0].of(images, 32) is images
    assert torch.equal(View(flip=True).of(images, 32)[..., 0], images[..., -1])


@pytest.mark.parametrize("view", [View(0.83, True), View(0.67), View(1.0, True), View(0.5)])
def test_a_box_comes_back_to_where_it_was(view: View) -> None:
    """A bright square's box in the view maps to its box in the image."""
    image = torch.zeros(1, 3, 128, 192)
    image[..., 32:64, 96:160] = 1.0  # x 96..160, y 32..64
    seen = view.of(image, 32)[0, 0] > 0.5
    y, x = seen.nonzero().unbind(1)
    left, right, top, bottom = x.min(), x.max() + 1, y.min(), y.max() + 1
    row = torch.stack([(left + right) / 2, (top + bottom) / 2, right - left, bottom - top, torch.tensor(0.9), torch.tensor(0.8)]).float()
    box = xywh_to_xyxy(view.back(row[None], 192)[:, :4])[0]
    assert box.tolist() == pytest.approx([96, 32, 160, 64], abs=1 / view.scale + 0.5)
    assert view.back(row[None], 192)[0, 4:].tolist() == pytest.approx([0.9, 0.8])


def test_views_leave_out_the_level_that_is_wrong_for_them(network: Network) -> None:
    images = torch.rand(1, 3, 64, 64)
    maps = [network(view.of(images, network.max_stride)) for view in AUGMENTED]
    rows = candidates(maps, AUGMENTED, network.levels, 64, 0.0)[0]
    counts = [[m.shape[2] * m.shape[3] * 3 for m in level] for level in maps]
    assert len(rows) == counts[0][0] + sum(counts[1]) + counts[2][1]
    fine = decode(maps[0], network.levels)[0][: counts[0][0]]
    torch.testing.assert_close(rows[: len(fine)], fine, rtol=1e-6, atol=1e-5)


def test_one_view_of_scale_1_equals_plain_inference(network: Network, maps: list[torch.Tensor]) -> None:
    plain = decode(maps, network.levels)
    for rows, expected in zip(candidates([maps], PLAIN, network.levels, 96, 0.0), plain):
        torch.testing.assert_close(rows, expected, rtol=1e-6, atol=1e-5)


# ---- one behind ------------------------------------------------------------------------------------------------------------------


def test_work_behind_runs_in_order_in_one_thread() -> None:
    seen: list[tuple[int, int]] = []
    threads = torch.get_num_threads()
    with one_behind() as submit:
        for i in range(20):
            submit(lambda i: seen.append((i, threading.get_ident())), i)
    assert [i for i, _ in seen] == list(range(20))
    assert {ident for _, ident in seen} - {threading.get_ident()} and len({ident for _, ident in seen}) == 1
    assert torch.get_num_threads() == threads


def test_an_error_behind_comes_out() -> None:
    def fail() -> None:
        raise ValueError("from behind")

    with pytest.raises(ValueError, match="from behind"), one_behind() as submit:
        submit(fail)
        submit(fail)
    with pytest.raises(ValueError, match="from behind"), one_behind() as submit:
        submit(fail)


# ---- the whole -------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loader(tmp_path_factory: pytest.TempPathFactory) -> EpochLoader:
    config = read_data(write_dataset(tmp_path_factory.mktemp("data"), images=7), ("val",))
    labels = scan_labels(config.val, config.nc)
    return make_loader(DetectionDataset(labels, DatasetOptions(64, rect=True, pad=0.5, batch_size=3)))


def test_sinks_see_every_image_once_in_order_and_the_figures_repeat(network: Network, loader: EpochLoader) -> None:
    images, batches = [], []
    options = EvaluateOptions(progress=False)
    first = evaluate(
        network, loader, Precision(torch.device("cpu")), options,
        on_image=lambda path, shape, found: images.append(path.name), on_batch=lambda index, batch, found: batches.append(index),
    )  # fmt: skip
    assert len(images) == first.images == 7 and sorted(set(images)) == sorted(images) and batches == [0, 1, 2]
    again = evaluate(network, loader, Precision(torch.device("cpu")), options)
    assert again.metrics() == first.metrics() and np.array_equal(again.confusion.matrix, first.confusion.matrix)
    assert all(value > 0 for value in first.speed_ms.values())


def test_an_augmented_evaluation_sees_more(network: Network, loader: EpochLoader) -> None:
    counts = {}
    for augment in (False, True):
        found: list[int] = []
        options = EvaluateOptions(0.3, max_det=10**4, augment=augment, progress=False)
        evaluate(
            fuse(network), loader, Precision(torch.device("cpu")), options, on_image=lambda path, shape, rows, n=found: n.append(len(rows))
        )
        counts[augment] = sum(found)
    assert counts[True] > counts[False] > 0


def test_the_confusion_matrix_equals_its_rule_item_by_item() -> None:
    rng = np.random.default_rng(5)
    confusion, expected = ConfusionMatrix(3), np.zeros((4, 4), int)
    for _ in range(80):
        m, n = int(rng.integers(0, 6)), int(rng.integers(0, 12))
        corner, size = rng.uniform(0, 60, (m, 2)), rng.uniform(20, 60, (m, 2))
        labels = np.column_stack([rng.integers(0, 3, m), corner, corner + size])
        source = rng.integers(0, m, n) if m else np.zeros(n, int)
        boxes = (labels[source, 1:] if m else np.tile([0.0, 0, 30, 30], (n, 1))) + rng.normal(0, 6, (n, 4))
        found = np.column_stack([boxes, rng.random(n), rng.integers(0, 3, n)])
        confusion.add(found, labels)
        expected += _counted(found, labels)
    assert expected[:3, :3].sum() > 50 and expected[3].sum() > 10 and expected[:, 3].sum() > 10
    assert np.array_equal(confusion.matrix, expected)


def _counted(found: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The rule spelt out: pairs of IoU > 0.45, each detection's best label, then each label's best detection; the rest is background."""
    matrix = np.zeros((4, 4), int)
    found = [d for d in found if d[4] > 0.25]

    def iou(d: np.ndarray, label: np.ndarray) -> float:
        a, b = d[:4], label[1:]
        shared = max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)
        return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)

    chosen: dict[int, tuple[float, int]] = {}
    for i, d in enumerate(found):
        best = max(((iou(d, label), j) for j, label in enumerate(labels)), default=(0.0, -1))
        if best[0] > 0.45 and best[0] > chosen.get(best[1], (0.0, -1))[0]:
            chosen[best[1]] = (best[0], i)
    for j, label in enumerate(labels):
        predicted = int(found[chosen[j][1]][5]) if j in chosen else 3
        matrix[predicted, int(label[0])] += 1
    if chosen:
        paired = {i for _, i in chosen.values()}
        for i, d in enumerate(found):
            if i not in paired:
                matrix[int(d[5]), 3] += 1
    return matrix


def test_images_converted_into_reused_memory_are_the_same() -> None:
    precision = Precision(torch.device("cpu"))
    convert = ReusedImages(precision)
    for shape in ((2, 3, 64, 96), (4, 3, 96, 64), (1, 1, 32, 32), (2, 3, 64, 64)):
        images = torch.randint(0, 256, shape, dtype=torch.uint8)
        got = convert(images)
        assert torch.equal(got, precision.images(images)) and got.is_contiguous(memory_format=torch.channels_last)
