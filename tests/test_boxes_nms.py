"""Box geometry, complete IoU, and suppression against a direct reference."""

import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from utils import nms as nms_module
from utils.boxes import (
    box_iou,
    ciou,
    clip_boxes,
    denormalise,
    label_text,
    normalise,
    scale_boxes,
    xywh_to_xyxy,
    xyxy_to_xywh,
)
from utils.nms import CLASS_OFFSET, nms, non_max_suppression


def random_boxes(rng: np.random.Generator, n: int, kind: str = "float") -> np.ndarray:
    """Return (n, 4) float32 xyxy boxes that overlap a lot; "grid" makes exact IoU ties, "flat" boxes without area."""
    if kind == "grid":
        corner, size = rng.integers(0, 12, (n, 2)), rng.integers(1, 12, (n, 2))
    elif kind == "flat":
        corner, size = rng.integers(0, 20, (n, 2)), rng.integers(-2, 4, (n, 2))
    else:
        corner, size = rng.uniform(0, 120, (n, 2)), rng.uniform(2, 100, (n, 2))
    boxes = np.concatenate([corner, corner + size], 1).astype(np.float32)
    if kind == "shifted":
        boxes += np.float32(CLASS_OFFSET) * rng.integers(60, 80, (n, 1)).astype(np.float32)
    return boxes


# Formats


@pytest.mark.parametrize("convert", [torch.from_numpy, np.asarray])
def test_formats_round_trip(convert):
    boxes = convert(random_boxes(np.random.default_rng(0), 50))
    assert np.allclose(xywh_to_xyxy(xyxy_to_xywh(boxes)), boxes, atol=1e-4)
    assert np.allclose(denormalise(normalise(boxes, (480, 640)), (480, 640)), boxes, atol=1e-4)
    assert type(xyxy_to_xywh(boxes)) is type(boxes)
    assert xyxy_to_xywh(boxes).dtype == boxes.dtype


def test_formats_by_value():
    box = torch.tensor([[10.0, 20.0, 50.0, 40.0]])
    assert xyxy_to_xywh(box).tolist() == [[30, 30, 40, 20]]
    assert normalise(box, (100, 200)).numpy() == pytest.approx(np.array([[0.05, 0.2, 0.25, 0.4]]))
    assert clip_boxes(torch.tensor([[-5.0, -1.0, 300.0, 120.0]]), (100, 200)).tolist() == [[0, 0, 200, 100]]
    assert xyxy_to_xywh(torch.empty(0, 4)).shape == (0, 4)


@pytest.mark.parametrize("convert", [torch.from_numpy, np.asarray])
def test_scale_boxes_undoes_a_letterbox_and_clips(convert):
    original, gain, pad = random_boxes(np.random.default_rng(1), 20), 0.5, (7.5, 3.0)
    letterboxed = original * gain + np.float32([*pad, *pad])
    restored = scale_boxes(convert(letterboxed), gain, pad, (100, 150))
    assert np.allclose(restored, original.clip(0, [150, 100, 150, 100]), atol=1e-3)
    assert (original[:, 2] > 150).any() and (original[:, 3] > 100).any()


# Overlap


def test_box_iou_by_value_and_in_both_libraries():
    a = np.float32([[0, 0, 10, 10], [20, 20, 30, 30], [5, 5, 5, 5]])
    b = np.float32([[0, 0, 10, 10], [5, 0, 15, 10]])
    assert box_iou(a, b) == pytest.approx(np.array([[1, 1 / 3], [0, 0], [0, 0]]), abs=1e-6)
    assert np.array_equal(box_iou(torch.from_numpy(a), torch.from_numpy(b)).numpy(), box_iou(a, b))
    assert box_iou(a[2:], a[2:]) == 0
    assert box_iou(a[:0], b).shape == (0, 2) and box_iou(a, b[:0]).shape == (3, 0)


def reference_ciou(a: torch.Tensor, b: torch.Tensor, alpha: float | None = None) -> torch.Tensor:
    """Return the complete IoU of two xywh boxes (4,) in double precision, straight from its definition."""
    left, right = max(a[0] - a[2] / 2, b[0] - b[2] / 2), min(a[0] + a[2] / 2, b[0] + b[2] / 2)
    top, bottom = max(a[1] - a[3] / 2, b[1] - b[3] / 2), min(a[1] + a[3] / 2, b[1] + b[3] / 2)
    zero = torch.zeros((), dtype=a.dtype)
    intersection = max(right - left, zero) * max(bottom - top, zero)
    iou = intersection / (a[2] * a[3] + b[2] * b[3] - intersection)
    hull_w = max(a[0] + a[2] / 2, b[0] + b[2] / 2) - min(a[0] - a[2] / 2, b[0] - b[2] / 2)
    hull_h = max(a[1] + a[3] / 2, b[1] + b[3] / 2) - min(a[1] - a[3] / 2, b[1] - b[3] / 2)
    distance = ((a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2) / (hull_w**2 + hull_h**2)
    v = 4 / math.pi**2 * (torch.atan(b[2] / b[3]) - torch.atan(a[2] / a[3])) ** 2
    alpha = (v / (v - iou + 1)).item() if alpha is None else alpha
    return iou - distance - alpha * v


def test_ciou_and_its_gradient_equal_the_definition_with_a_constant_alpha():
    rng = np.random.default_rng(2)
    a, b = (torch.from_numpy(np.hstack([rng.uniform(0, 4, (40, 2)), rng.uniform(0.5, 4, (40, 2))])) for _ in range(2))
    a.requires_grad_()
    result = ciou(a, b)
    gradient = torch.autograd.grad(result.sum(), a)[0]
    reference = torch.stack([reference_ciou(x, y) for x, y in zip(a, b)])
    expected = torch.autograd.grad(reference.sum(), a)[0]
    assert torch.allclose(result, reference, atol=1e-6)
    assert torch.allclose(gradient, expected, atol=1e-5)


def test_ciou_of_identical_boxes_is_one_and_of_distant_ones_negative():
    boxes = torch.tensor([[3.0, 4.0, 2.0, 5.0], [1000.3, 7.7, 0.01, 0.02], [0.5, 0.5, 1e-2, 80.0]])
    assert ciou(boxes, boxes)[[0, 2]].tolist() == pytest.approx([1, 1], abs=1e-6)
    assert 0.99 < ciou(boxes, boxes)[1] <= 1
    assert ciou(boxes[:1], boxes[1:2]) < 0
    assert ciou(boxes[:0], boxes[:0]).shape == (0,)


def test_ciou_gradient_is_finite_for_degenerate_boxes():
    sizes = [0.0, 1e-12, 1e-4, 1.0, 1e4]
    boxes = torch.tensor([[x, x, w, h] for x in (0.0, 1000.3) for w in sizes for h in sizes])
    n = len(boxes)
    a = boxes.repeat_interleave(n, 0).requires_grad_()
    result = ciou(a, boxes.repeat(n, 1))
    result.sum().backward()
    assert torch.isfinite(result).all() and torch.isfinite(a.grad).all()
    assert result.max() <= 1


# Suppression


def reference_nms(boxes: np.ndarray, scores: np.ndarray, threshold: float) -> list[int]:
    """Return the indices of the survivors, box by box: float32 IoU, compared with the threshold in double precision."""
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    waiting, kept = list(np.argsort(-scores, kind="stable")), []
    while waiting:
        i = waiting.pop(0)
        kept.append(int(i))
        remaining = []
        for j in waiting:
            width = max(min(boxes[i, 2], boxes[j, 2]) - max(boxes[i, 0], boxes[j, 0]), np.float32(0))
            height = max(min(boxes[i, 3], boxes[j, 3]) - max(boxes[i, 1], boxes[j, 1]), np.float32(0))
            with np.errstate(all="ignore"):
                iou = width * height / (area[i] + area[j] - width * height)
            if not np.float64(iou) > threshold:
                remaining.append(j)
        waiting = remaining
    return kept


@pytest.fixture
def without_torchvision(monkeypatch):
    monkeypatch.setattr(nms_module, "_torchvision_nms", lambda: None)


@pytest.mark.parametrize("kind", ["float", "grid", "flat", "shifted"])
def test_nms_equals_the_reference(kind, without_torchvision):
    rng = np.random.default_rng(3)
    for trial in range(60):
        n = int(rng.integers(0, 40))
        boxes, scores = random_boxes(rng, n, kind), rng.random(n).astype(np.float32)
        if trial % 2:
            scores = np.round(scores * 4) / 4
        threshold = (0.45, 0.5, 0.6, 0.65)[trial % 4]
        kept = nms(torch.from_numpy(boxes), torch.from_numpy(scores), threshold)
        assert kept.dtype == torch.int64
        assert kept.tolist() == reference_nms(boxes, scores, threshold)


def test_nms_decides_an_iou_on_the_threshold_as_torchvision_does(without_torchvision):
    # In float32 6/10 rounds up and exceeds 0.6 in double precision; 9/20 rounds down and does not exceed 0.45.
    scores = torch.tensor([0.9, 0.8])
    assert nms(torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 6]]), scores, 0.6).tolist() == [0]
    assert nms(torch.tensor([[0.0, 0, 10, 20], [0, 0, 10, 9]]), scores, 0.45).tolist() == [0, 1]
    assert nms(torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 5]]), scores, 0.5).tolist() == [0, 1]


def test_nms_over_several_blocks_and_with_a_limit(without_torchvision, monkeypatch):
    rng = np.random.default_rng(4)
    boxes, scores = torch.from_numpy(random_boxes(rng, 700)), torch.from_numpy(rng.random(700).astype(np.float32))
    kept = nms(boxes, scores, 0.6)
    for block in (1, 7, 1000):
        monkeypatch.setattr(nms_module, "BLOCK", block)
        assert nms(boxes, scores, 0.6).tolist() == kept.tolist()
    assert nms(boxes, scores, 0.6, limit=5).tolist() == kept[:5].tolist()
    assert len(kept) > 20


def test_nms_with_whatever_runs_here_equals_the_fallback(monkeypatch):
    boxes, scores = torch.from_numpy(random_boxes(np.random.default_rng(5), 60)), torch.linspace(1, 0, 60)
    available = nms(boxes, scores, 0.5)
    monkeypatch.setattr(nms_module, "_torchvision_nms", lambda: None)
    assert available.tolist() == nms(boxes, scores, 0.5).tolist()
    assert nms(torch.empty(0, 4), torch.empty(0), 0.5).shape == (0,)


def test_a_broken_torchvision_is_not_used(monkeypatch):
    find = nms_module._torchvision_nms.__wrapped__

    def missing_operator(boxes, scores, threshold):
        raise NotImplementedError("no kernel")

    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "torchvision.ops", SimpleNamespace(nms=missing_operator))
    assert find() is None
    working = SimpleNamespace(nms=lambda boxes, scores, threshold: torch.arange(len(boxes)))
    monkeypatch.setitem(sys.modules, "torchvision.ops", working)
    assert find() is working.nms
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.delitem(sys.modules, "torchvision.ops")
    assert find() is None


# From predictions to detections


def random_prediction(rng: np.random.Generator, images: int, n: int, nc: int) -> torch.Tensor:
    centre, size = rng.uniform(20, 150, (images, n, 2)), rng.uniform(20, 90, (images, n, 2))
    return torch.from_numpy(np.concatenate([centre, size, rng.random((images, n, 1 + nc))], 2).astype(np.float32))


def reference_detections(rows, conf, iou, classes, agnostic, multi_label, max_det) -> np.ndarray:
    """Return the (n, 6) detections of one image (N, 5 + nc), candidate by candidate."""
    candidates = []
    for x, y, w, h, objectness, *probabilities in rows.numpy():
        scores = [objectness * p for p in probabilities]
        labels = range(len(scores)) if multi_label and len(scores) > 1 else [int(np.argmax(scores))]
        if objectness > conf:
            corners = [x - w / 2, y - h / 2, x + w / 2, y + h / 2]
            labels = [c for c in labels if scores[c] > conf and (classes is None or c in classes)]
            candidates += [(*corners, scores[c], c) for c in labels]
    candidates = np.array(candidates, np.float32).reshape(-1, 6)
    boxes = candidates[:, :4] + (0 if agnostic else candidates[:, 5:] * np.float32(CLASS_OFFSET))
    return candidates[reference_nms(boxes, candidates[:, 4], iou)[:max_det]]


@pytest.mark.parametrize("nc", [1, 2, 3])
@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("options", [{}, {"agnostic": True}, {"classes": [0, 2]}, {"max_det": 3}])
def test_non_max_suppression_equals_the_reference(nc, multi_label, options):
    prediction = random_prediction(np.random.default_rng(6), 2, 60, nc)
    copy = prediction.clone()
    settings = {"classes": None, "agnostic": False, "max_det": 300, **options}
    results = non_max_suppression(prediction, 0.3, 0.5, multi_label=multi_label, **settings)
    for rows, result in zip(prediction, results):
        expected = reference_detections(rows, 0.3, 0.5, multi_label=multi_label, **settings)
        assert len(expected) >= 3
        assert result.numpy() == pytest.approx(expected, abs=1e-4)
    assert torch.equal(prediction, copy)


def test_non_max_suppression_without_detections():
    prediction = random_prediction(np.random.default_rng(7), 3, 10, 2)
    prediction[1, :, 4] = 0
    results = non_max_suppression(prediction, 0.1)
    assert [len(result) > 0 for result in results] == [True, False, True]
    assert results[1].shape == (0, 6)
    assert [r.shape for r in non_max_suppression(prediction, 0.1, classes=[7])] == [(0, 6)] * 3
    assert [r.shape for r in non_max_suppression(prediction[:, :0], 0.1, multi_label=True)] == [(0, 6)] * 3


def test_candidates_are_cut_to_the_best_with_ties_in_their_given_order(monkeypatch):
    monkeypatch.setattr(nms_module, "MAX_CANDIDATES", 5)
    prediction = torch.zeros(1, 9, 6)
    prediction[0, :, 0] = torch.arange(9) * 100.0
    prediction[0, :, 2:4] = 10
    prediction[0, :, 4:] = 1
    prediction[0, :, 5] = torch.tensor([0.5, 0.9, 0.5, 0.5, 0.8, 0.5, 0.95, 0.5, 0.5])
    (result,) = non_max_suppression(prediction)
    assert (result[:, 0] + 5).tolist() == [600, 100, 400, 0, 200]


def test_half_precision_predictions_give_float32_detections():
    (result,) = non_max_suppression(random_prediction(np.random.default_rng(8), 1, 20, 2).half())
    assert result.dtype == torch.float32 and len(result)


def test_label_text_is_normalised_with_the_confidence_on_request():
    detections = np.array([[10, 20, 30, 60, 0.5, 3]], np.float32)
    assert label_text(detections, (100, 200), False) == "3 0.1 0.4 0.1 0.4\n"
    assert label_text(detections, (100, 200), True) == "3 0.1 0.4 0.1 0.4 0.5\n"
    assert label_text(detections[:0], (100, 200), True) == ""
