"""Matching, average precision and the confusion matrix against their definitions, item by item."""

import numpy as np
import pytest

from utils.metrics import IOU_THRESHOLDS, ConfusionMatrix, ap_per_class, average_precision, fitness, match, smooth


def iou_of(a, b) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def random_image(rng: np.random.Generator, nc: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Return detections (n, 6), best first, and labels (m, 5) of one crowded image; either may be empty."""
    m, n = int(rng.integers(0, 7)), int(rng.integers(0, 20))
    corner, size = rng.uniform(0, 60, (m, 2)), rng.uniform(20, 60, (m, 2))
    labels = np.column_stack([rng.integers(0, nc, m), corner, corner + size])
    if m:
        source = rng.integers(0, m, n)
        boxes = labels[source, 1:] + rng.normal(0, 4, (n, 4))
        classes = np.where(rng.random(n) < 0.8, labels[source, 0], rng.integers(0, nc, n))
    else:
        boxes, classes = np.tile([0.0, 0.0, 30.0, 30.0], (n, 1)), rng.integers(0, nc, n)
    return np.column_stack([boxes, np.sort(rng.random(n))[::-1], classes]), labels


# Matching


def reference_match(detections: np.ndarray, labels: np.ndarray) -> np.ndarray:
    correct = np.zeros((len(detections), 10), bool)
    for column, threshold in enumerate(np.linspace(0.5, 0.95, 10)):
        taken = set()
        for row, detection in enumerate(detections):  # best score first
            overlaps = [(iou_of(detection[:4], label[1:]), -i) for i, label in enumerate(labels) if label[0] == detection[5]]
            if overlaps and max(overlaps)[0] >= threshold and max(overlaps)[1] not in taken:
                taken.add(max(overlaps)[1])
                correct[row, column] = True
    return correct


def test_match_equals_the_reference_on_crowded_images():
    rng = np.random.default_rng(0)
    found = 0
    for _ in range(60):
        detections, labels = random_image(rng)
        correct = match(detections, labels, IOU_THRESHOLDS)
        assert correct.shape == (len(detections), 10) and correct.dtype == bool
        assert np.array_equal(correct, reference_match(detections, labels))
        found += correct.sum()
    assert found > 500


def test_match_prefers_the_score_to_the_overlap_and_gives_no_second_choice():
    labels = np.array([[0, 0, 0, 10, 10], [0, 0, 0, 10, 6]])
    detections = np.array([[0, 0, 10, 9, 0.9, 0], [0, 0, 10, 10, 0.8, 0], [0, 0, 10, 10, 0.7, 1]])
    # Both detections of class 0 overlap the first label most; the second would reach 0.6 with the other label.
    correct = match(detections, labels, np.array([0.5, 0.95]))
    assert correct.tolist() == [[True, False], [False, True], [False, False]]


def test_match_sorts_by_score_itself():
    rng = np.random.default_rng(1)
    detections, labels = random_image(rng)
    shuffled = rng.permutation(len(detections))
    assert np.array_equal(match(detections[shuffled], labels), match(detections, labels)[shuffled])


def test_match_counts_an_iou_on_the_threshold():
    label, detection = np.array([[0, 0, 0, 10, 10]]), np.array([[0, 0, 10, 7, 0.9, 0]])
    assert match(detection, label, np.linspace(0.5, 0.95, 10)).sum() == 5


@pytest.mark.parametrize(("n", "m"), [(0, 0), (0, 3), (3, 0)])
def test_match_with_nothing_to_match(n, m):
    assert match(np.ones((n, 6)), np.ones((m, 5))).tolist() == [[False] * 10] * n


# Average precision


def interpolate(x: float, xs: list[float], ys: list[float]) -> float:
    """Return the piecewise linear value at `x`; where abscissae repeat, that of the last."""
    if x < xs[0]:
        return ys[0]
    i = max(k for k in range(len(xs)) if xs[k] <= x)
    if i == len(xs) - 1:
        return ys[-1]
    return ys[i] + (ys[i + 1] - ys[i]) * (x - xs[i]) / (xs[i + 1] - xs[i])


def reference_curve(hits: list[bool], labels: int) -> tuple[list[float], list[float]]:
    recall, precision = [], []
    for i in range(len(hits)):
        recall.append(sum(hits[: i + 1]) / labels)
        precision.append(sum(hits[: i + 1]) / (i + 1))
    return recall, precision


def reference_ap(hits: list[bool], labels: int) -> float:
    recall, precision = reference_curve(hits, labels)
    recall, precision = [0, *recall, 1], [1, *precision, 0]
    envelope = [max(precision[i:]) for i in range(len(precision))]
    heights = [interpolate(i / 100, recall, envelope) for i in range(101)]
    return sum((a + b) / 2 * 0.01 for a, b in zip(heights, heights[1:]))


@pytest.fixture(scope="module")
def data_set():
    rng = np.random.default_rng(2)
    images = [random_image(rng) for _ in range(30)]
    detections = np.concatenate([detections for detections, _ in images])
    correct = np.concatenate([match(detections, labels) for detections, labels in images])
    return correct, detections[:, 4], detections[:, 5], np.concatenate([labels[:, 0] for _, labels in images])


def test_ap_and_curves_equal_the_reference(data_set):
    correct, conf, pred_cls, target_cls = data_set
    result = ap_per_class(*data_set)
    assert result.classes.tolist() == [0, 1, 2]
    by_score = np.argsort(-conf)
    for i, cls in enumerate(result.classes):
        rows = [row for row in by_score if pred_cls[row] == cls]
        labels = int((target_cls == cls).sum())
        assert (result.labels[i], result.predictions[i]) == (labels, len(rows))
        for t in range(10):
            assert result.ap[i, t] == pytest.approx(reference_ap([correct[r, t] for r in rows], labels), abs=1e-9)

        recall, precision = reference_curve([correct[r, 0] for r in rows], labels)
        scores = [conf[r] for r in rows]
        for k in range(0, 1000, 37):
            x = k / 999
            if x > scores[0]:
                expected = (0, 1)
            else:
                expected = tuple(interpolate(-x, [-s for s in scores], ys) for ys in (recall, precision))
            assert (result.r_curve[i, k], result.p_curve[i, k]) == pytest.approx(expected, abs=1e-9)
    assert 0.2 < result.map < result.map50 < 0.95


def test_precision_and_recall_stand_at_the_maximum_of_the_smoothed_mean_f1(data_set):
    result = ap_per_class(*data_set)
    f1 = 2 * result.p_curve * result.r_curve / np.maximum(result.p_curve + result.r_curve, 1e-12)
    mean = f1.mean(0)
    smoothed = [np.mean([mean[min(max(j, 0), 999)] for j in range(i - 50, i + 51)]) for i in range(1000)]
    best = int(np.argmax(smoothed))
    assert result.confidence == pytest.approx(best / 999)
    assert result.precision == pytest.approx(result.p_curve[:, best])
    assert result.recall == pytest.approx(result.r_curve[:, best])
    assert result.f1 == pytest.approx(f1[:, best])
    assert (result.mp, result.mr) == pytest.approx((result.precision.mean(), result.recall.mean()))
    assert (result.map50, result.map) == pytest.approx((result.ap[:, 0].mean(), result.ap.mean()))


def test_perfect_detections_reach_0_995():
    # The added point (1, 0) costs the last of the 100 trapezoids half its area.
    result = ap_per_class(np.ones((4, 10), bool), np.linspace(0.9, 0.6, 4), np.zeros(4), np.zeros(4))
    assert result.ap == pytest.approx(0.995)
    assert average_precision(np.array([0.5, 1.0]), np.array([1.0, 1.0])) == pytest.approx(0.995)


def test_the_order_of_detections_does_not_matter(data_set):
    correct, conf, pred_cls, target_cls = data_set
    shuffled = np.random.default_rng(3).permutation(len(conf))
    assert ap_per_class(correct[shuffled], conf[shuffled], pred_cls[shuffled], target_cls).map == pytest.approx(ap_per_class(*data_set).map)


def test_classes_without_detections_count_zero_and_without_labels_not_at_all():
    correct = np.ones((4, 10), bool)
    result = ap_per_class(correct, np.linspace(0.9, 0.6, 4), np.array([0, 0, 5, 5]), np.array([0, 0, 2, 2, 2]))
    assert result.classes.tolist() == [0, 2]
    assert result.labels.tolist() == [2, 3] and result.predictions.tolist() == [2, 0]
    assert result.map == pytest.approx(0.995 / 2)
    assert (result.precision[1], result.recall[1], result.ap[1].sum()) == (0, 0, 0)


def test_empty_data_sets_give_zeros():
    nothing = ap_per_class(np.zeros((0, 10), bool), np.zeros(0), np.zeros(0), np.zeros(0))
    assert (nothing.mp, nothing.mr, nothing.map50, nothing.map) == (0, 0, 0, 0)
    assert nothing.ap.shape == (0, 10) and nothing.p_curve.shape == (0, 1000)
    undetected = ap_per_class(np.zeros((0, 10), bool), np.zeros(0), np.zeros(0), np.array([1, 1]))
    assert (undetected.mp, undetected.map50) == (0, 0) and undetected.labels.tolist() == [2]
    unlabelled = ap_per_class(np.zeros((2, 10), bool), np.ones(2), np.zeros(2), np.zeros(0))
    assert unlabelled.map == 0 and len(unlabelled.classes) == 0


def test_smooth_keeps_length_and_constants():
    assert smooth(np.full(1000, 0.3)) == pytest.approx(0.3)
    step = smooth(np.repeat([0.0, 1.0], 500))
    assert len(step) == 1000
    assert step[[449, 450, 549, 550]] == pytest.approx([0, 1 / 101, 100 / 101, 1])


def test_fitness():
    assert fitness(0.6, 0.4) == pytest.approx(0.42)


# Confusion matrix


def reference_confusion(matrix: np.ndarray, detections: np.ndarray, labels: np.ndarray) -> None:
    """Add one image to `matrix`: best label per detection, then best detection per label."""
    nc = len(matrix) - 1
    detections = [d for d in detections if d[4] > 0.25]
    takers = {i: [] for i in range(len(labels))}
    for row, detection in enumerate(detections):
        overlaps = [iou_of(detection[:4], label[1:]) for label in labels]
        if overlaps and max(overlaps) > 0.45:
            takers[int(np.argmax(overlaps))].append((max(overlaps), -row))
    paired = {-max(candidates)[1]: i for i, candidates in takers.items() if candidates}
    for i, label in enumerate(labels):
        if i not in paired.values():
            matrix[nc, int(label[0])] += 1
    for row, detection in enumerate(detections):
        if row in paired:
            matrix[int(detection[5]), int(labels[paired[row]][0])] += 1
        elif paired:
            matrix[int(detection[5]), nc] += 1


def test_confusion_matrix_equals_the_reference():
    rng = np.random.default_rng(4)
    confusion, expected = ConfusionMatrix(3), np.zeros((4, 4), int)
    for _ in range(60):
        detections, labels = random_image(rng)
        confusion.add(detections, labels)
        reference_confusion(expected, detections, labels)
    assert np.array_equal(confusion.matrix, expected)
    assert (expected[:3, :3].sum(), expected[3].sum(), expected[:, 3].sum()) > (50, 5, 50)


def test_confusion_matrix_counts_false_detections_only_beside_a_pair():
    label = np.array([[1, 0, 0, 10, 10]])
    hit, miss = [0, 0, 10, 10, 0.9, 0], [50, 50, 60, 60, 0.8, 2]
    confusion = ConfusionMatrix(3)
    confusion.add(np.array([miss]), label)
    assert confusion.matrix.sum() == confusion.matrix[3, 1] == 1
    confusion.add(np.array([hit, miss]), label)
    assert confusion.matrix[0, 1] == 1 and confusion.matrix[2, 3] == 1 and confusion.matrix.sum() == 3
    confusion.add(np.array([hit, miss]), np.empty((0, 5)))
    assert confusion.matrix.sum() == 3
    confusion.add(np.empty((0, 6)), label)
    assert confusion.matrix[3, 1] == 2
