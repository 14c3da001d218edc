"""Pictures are written with a plausible size and, where boxes are drawn, with the right pixels changed."""

import ast

import cv2
import numpy as np
import pytest

from utils import plots
from utils.errors import InputError
from utils.metrics import ap_per_class

NAMES = ["person", "hard hat", "vest"]


def picture(path) -> np.ndarray:
    """Read a saved picture and assert that it shows something."""
    assert path.stat().st_size > 3000
    image = cv2.imread(str(path))
    assert min(image.shape[:2]) >= 120 and image.std() > 5
    return image


@pytest.fixture(autouse=True)
def coarse_pictures(monkeypatch):
    monkeypatch.setattr(plots, "DPI", 60)  # the same pictures, sooner


@pytest.fixture
def result():
    rng = np.random.default_rng(0)
    return ap_per_class(rng.random((90, 10)) < 0.6, rng.random(90), rng.integers(0, 3, 90), rng.integers(0, 3, 60))


@pytest.fixture
def nothing():
    return ap_per_class(np.zeros((0, 10), bool), np.zeros(0), np.zeros(0), np.zeros(0))


def test_importing_plots_does_not_import_matplotlib():
    with open(plots.__file__) as file:
        statements = ast.parse(file.read()).body
    modules = [name.name for node in statements if isinstance(node, ast.Import) for name in node.names]
    modules += [node.module for node in statements if isinstance(node, ast.ImportFrom)]
    assert "cv2" in modules
    assert not {module.split(".")[0] for module in modules} & {"matplotlib", "pandas", "seaborn"}


# Boxes


def test_class_colours_are_stable_and_distinct():
    colours = [plots.class_colour(i) for i in range(20)]
    assert len(set(colours)) == 20
    assert colours == [plots.class_colour(i) for i in range(20)]
    assert all(isinstance(channel, int) and 0 <= channel <= 255 for colour in colours for channel in colour)


def test_draw_boxes_changes_the_pixels_of_the_box_only():
    image = np.full((200, 300, 3), 114, np.uint8)
    detections = np.array([[50, 60, 150, 160, 0.9, 1]])
    drawn = plots.draw_boxes(image, detections, NAMES, line_thickness=3, hide_labels=True)
    assert (image == 114).all()
    for row, column in ((60, 100), (160, 100), (110, 50), (110, 150)):
        assert tuple(drawn[row, column]) == plots.class_colour(1)
    assert (drawn[70:150, 60:140] == 114).all()
    changed = np.argwhere((drawn != 114).any(2))
    assert changed.min(0).tolist() >= [57, 47] and changed.max(0).tolist() <= [163, 153]


def test_draw_boxes_writes_labels_above_the_box_or_inside_the_image():
    image = np.full((200, 300, 3), 114, np.uint8)
    box = np.array([[50, 60, 150, 160, 0.9, 1]])
    labelled = plots.draw_boxes(image, box, NAMES)
    assert (labelled[40:55, 50:90] != 114).any()
    assert (plots.draw_boxes(image, box, NAMES, hide_conf=True) != labelled).any()
    at_the_corner = plots.draw_boxes(image, np.array([[290.0, -20, 330, 90, 0.9, 2]]), dict(enumerate(NAMES)))
    assert (at_the_corner[2:15, 200:280] != 114).any()


def test_draw_boxes_puts_the_best_detection_on_top_and_takes_unknown_classes():
    image = np.zeros((100, 100, 3), np.uint8)
    same_box = np.array([[20, 20, 80, 80, 0.9, 0], [20, 20, 80, 80, 0.5, 1]])
    assert tuple(plots.draw_boxes(image, same_box, NAMES, hide_labels=True)[80, 50]) == plots.class_colour(0)
    assert plots.draw_boxes(image, np.array([[20, 40, 80, 80, 0.9, 77]]), NAMES).any()
    assert not plots.draw_boxes(image, np.empty((0, 6)), NAMES).any()


def test_plot_images_draws_each_image_in_its_tile(tmp_path):
    images = np.zeros((3, 3, 300, 400), np.uint8)
    images[0, 0] = 200  # red
    labels = np.array([[0, 100.0, 100, 300, 200]])
    predictions = np.array([[0, 100.0, 100, 300, 200, 0.9], [1, 20, 250, 60, 280, 0.1]])
    path = tmp_path / "batch.png"
    plots.plot_images(images, [np.empty((0, 5)), labels, predictions], NAMES, path, ["a/1.jpg", "a/2.jpg", "a/3.jpg"])
    mosaic = picture(path)
    assert mosaic.shape == (600, 800, 3)
    assert mosaic[150, 200].tolist() == [0, 0, 200]
    assert tuple(mosaic[200, 400 + 200]) == plots.class_colour(0)
    assert tuple(mosaic[300 + 200, 200]) == plots.class_colour(0)
    assert not mosaic[300 + 250 : 300 + 280, 90:95].any()  # an unlikely prediction is left out
    assert (mosaic[310:590, 410:790] == 255).all()


def test_plot_images_limits_count_and_size(tmp_path):
    path = tmp_path / "batch.jpg"
    plots.plot_images(np.full((20, 3, 64, 96), 90, np.uint8), [np.zeros((0,))] * 20, NAMES, path, max_side=192)
    assert cv2.imread(str(path)).shape == (128, 192, 3)

    path, box = tmp_path / "halved.png", np.array([[0, 40, 40, 160, 160]])
    plots.plot_images(np.zeros((1, 3, 200, 200), np.uint8), [box], NAMES, path, max_side=100)
    halved = cv2.imread(str(path))
    assert halved.shape == (100, 100, 3)
    assert tuple(halved[80, 50]) == plots.class_colour(0) and not halved[40:60, 40:60].any()


def test_plot_images_names_a_path_it_cannot_write(tmp_path):
    with pytest.raises(InputError, match="nowhere"):
        plots.plot_images(np.zeros((1, 3, 64, 64), np.uint8), [np.empty((0, 5))], NAMES, tmp_path / "nowhere" / "a.jpg")


# Metrics


def test_metric_curves(tmp_path, result, nothing):
    plots.plot_pr_curve(result, NAMES, tmp_path / "PR_curve.png")
    plots.plot_confidence_curve(result, NAMES, "F1", tmp_path / "F1_curve.png")
    plots.plot_confidence_curve(nothing, NAMES, "P", tmp_path / "P_curve.png")
    for name in ("PR", "F1", "P"):
        picture(tmp_path / f"{name}_curve.png")
    with pytest.raises(KeyError):
        plots.plot_confidence_curve(result, NAMES, "Q", tmp_path / "Q_curve.png")


@pytest.mark.filterwarnings("error")
def test_confusion_matrix(tmp_path):
    matrix = np.array([[5, 1, 0, 2], [0, 7, 0, 1], [0, 0, 0, 0], [2, 0, 0, 0]])
    plots.plot_confusion_matrix(matrix, NAMES, tmp_path / "confusion_matrix.png")
    picture(tmp_path / "confusion_matrix.png")


# Training


def write_results(path, epochs, extra=()):
    names = ["epoch", "train/box_loss", "metrics/mAP_0.5", *extra, "x/lr0", "x/lr1", "x/lr2"]
    lines = [",".join(f"{name:>20s}" for name in names)]
    for epoch in range(epochs):
        lines.append(",".join(f"{value:>20.5g}" for value in [epoch] + [0.9**epoch] * (len(names) - 1)))
    path.write_text("\n".join(lines) + "\n")


def test_read_columns_strips_padding_and_marks_gaps(tmp_path):
    path = tmp_path / "results.csv"
    write_results(path, 3)
    path.write_text(path.read_text() + "                   3,                 nan,    \n")
    columns = plots._read_columns(path)
    assert list(columns) == ["epoch", "train/box_loss", "metrics/mAP_0.5", "x/lr0", "x/lr1", "x/lr2"]
    assert columns["epoch"].tolist() == [0, 1, 2, 3]
    assert columns["train/box_loss"][:3] == pytest.approx([1, 0.9, 0.81])
    assert np.isnan(columns["metrics/mAP_0.5"][3]) and np.isnan(columns["x/lr2"][3])


@pytest.mark.parametrize("epochs", [1, 12])
def test_plot_results(tmp_path, epochs):
    write_results(tmp_path / "results.csv", epochs, ["train/distill_loss", "sparsity/near_zero"])
    plots.plot_results(tmp_path / "results.csv", tmp_path / "results.png")
    assert picture(tmp_path / "results.png").shape[1] == 60 * 3.4 * 4


@pytest.mark.parametrize("text", [None, "", "               epoch,      train/box_loss\n", "epoch\n1\n"])
def test_plot_results_without_results(tmp_path, text):
    path = tmp_path / "results.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match="results.csv"):
        plots.plot_results(path, tmp_path / "results.png")


@pytest.mark.parametrize("n", [0, 200])
def test_plot_labels(tmp_path, n):
    rng = np.random.default_rng(1)
    labels = np.column_stack([rng.integers(0, 3, n), rng.random((n, 2)), rng.random((n, 2)) / 3])
    plots.plot_labels(labels, NAMES, tmp_path / "labels.jpg")
    picture(tmp_path / "labels.jpg")


def test_box_overlay_draws_the_centred_box():
    canvas = plots._box_overlay(np.array([[1, 0.2, 0.9, 0.5, 0.25]]), 400)
    blue, green, red = plots.class_colour(1)
    assert canvas[200, 100].tolist() == canvas[150, 200].tolist() == [red, green, blue]
    assert (canvas[160:240, 110:290] == 255).all()


# Pruning


def test_gamma_pictures(tmp_path):
    rng = np.random.default_rng(2)
    history = [np.abs(rng.normal(1 - epoch / 10, 0.1, 300)) for epoch in range(8)]
    plots.plot_gamma_history(history, [float((gamma < 0.01).mean()) for gamma in history], tmp_path / "history.png")
    plots.plot_gamma_before_after(history[0], history[-1], 0.2, tmp_path / "gamma.png")
    picture(tmp_path / "history.png")
    picture(tmp_path / "gamma.png")


@pytest.mark.filterwarnings("error")
def test_gamma_pictures_of_constant_or_no_values(tmp_path):
    plots.plot_gamma_history([np.zeros(5)], [1.0], tmp_path / "history.png")
    plots.plot_gamma_before_after(np.ones(5), np.empty(0), None, tmp_path / "gamma.png")
    picture(tmp_path / "history.png")
    picture(tmp_path / "gamma.png")


def test_plot_widths_grows_with_the_number_of_layers(tmp_path):
    sizes = {}
    for layers in (3, 70):
        path = tmp_path / f"{layers}.png"
        plots.plot_widths([f"model.{i}" for i in range(layers)], [64] * layers, [32] * layers, path)
        sizes[layers] = picture(path).shape
    assert sizes[70][0] > sizes[3][0] and sizes[70][1] > sizes[3][1]  # taller, and in two columns
