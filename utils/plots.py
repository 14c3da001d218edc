"""Pictures of data, training, metrics and pruning; each `plot_*` saves one file and returns nothing.

Matplotlib is imported where it is used, and drawn through `Figure`, so no display, backend or pyplot state is involved (but for
seaborn's pair plot).
Boxes are drawn with OpenCV, whose fonts know ASCII only: other characters of a class name appear as `?`.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np

from utils.errors import InputError
from utils.metrics import APResult, smooth
from utils.planes import to_bgr

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Names = Sequence[str] | Mapping[int, str]

BLUE, ORANGE, GREY, LIGHT, INK = "#1f5fa8", "#e07b27", "#8a8f98", "#c9d6e8", "#1b1f2a"
OVERLAID_LABELS = 1000  # more boxes on top of each other show nothing more
LEGEND_CLASSES = 20  # with more classes the curves are drawn in grey, without a legend
DPI = 150
DRAWN_CONF = 0.25  # `plot_images` leaves out predictions below this confidence


# Colours and boxes


def class_colour(i: int) -> tuple[int, int, int]:
    """Return the BGR colour of class `i`: hues a golden angle apart, so that neighbouring classes differ."""
    hue = (i * 0.618034 + 0.58) % 1.0
    value, saturation = (235, 205, 175)[i // 8 % 3], (215, 165, 240)[i // 4 % 3]
    pixel = cv2.cvtColor(np.uint8([[[int(hue * 180), saturation, value]]]), cv2.COLOR_HSV2BGR)
    return tuple(int(channel) for channel in pixel[0, 0])


def draw_boxes(
    image: np.ndarray,
    detections: np.ndarray,
    names: Names,
    line_thickness: int = 3,
    hide_labels: bool = False,
    hide_conf: bool = False,
) -> np.ndarray:
    """Return a copy of `image` (H, W, 3) BGR uint8 with `detections` (n, 6) drawn: xyxy pixels, confidence, class.

    The best detection, given first, is drawn last and so lies on top; labels lie on top of all boxes.
    """
    image = np.ascontiguousarray(image).copy()
    detections = np.asarray(detections, float).reshape(-1, 6)[::-1]
    corners = detections[:, :4].round().astype(int).tolist()
    classes = detections[:, 5].astype(int).tolist()
    for (left, top, right, bottom), cls in zip(corners, classes):
        cv2.rectangle(image, (left, top), (right, bottom), class_colour(cls), line_thickness)
    if not hide_labels:
        for (left, top, *_), cls, conf in zip(corners, classes, detections[:, 4]):
            label = _name(names, cls) if hide_conf else f"{_name(names, cls)} {conf:.2f}"
            _draw_label(image, (left, top), class_colour(cls), line_thickness, label)
    return image


def _draw_label(image: np.ndarray, corner: tuple[int, int], colour: tuple[int, int, int], line: int, label: str) -> None:
    """Write `label` on a plate above the box's top-left `corner`, or below it where the image ends."""
    font, scale, weight = cv2.FONT_HERSHEY_SIMPLEX, max(line / 3.5, 0.35), max(line - 1, 1)
    (width, height), baseline = cv2.getTextSize(label, font, scale, weight)
    margin = max(line, 2)
    plate_width, plate_height = width + 2 * margin, height + baseline + margin
    left = max(min(corner[0] - line // 2, image.shape[1] - plate_width), 0)
    top = corner[1] - plate_height if corner[1] >= plate_height else max(corner[1], 0)
    cv2.rectangle(image, (left, top), (left + plate_width, top + plate_height), colour, cv2.FILLED)
    luminance = 0.114 * colour[0] + 0.587 * colour[1] + 0.299 * colour[2]
    ink = (0, 0, 0) if luminance > 140 else (255, 255, 255)
    cv2.putText(image, label, (left + margin, top + height + margin), font, scale, ink, weight, cv2.LINE_AA)


def plot_images(
    images: np.ndarray,
    boxes: Sequence[np.ndarray],
    names: Names,
    path: str | Path,
    paths: Sequence[str | Path] | None = None,
    max_images: int = 16,
    max_side: int = 1920,
) -> None:
    """Save a mosaic of `images` (B, 3, H, W) RGB or (B, 1, H, W) grey uint8 with their boxes, at most `max_side` pixels long.

    `boxes` holds per image an (n, 5) array of class, x1, y1, x2, y2 in pixels, or (n, 6) with a confidence, of which
    those above 0.25 are drawn. `paths` are the images' files, whose names are written on them.
    """
    images = np.asarray(images)[:max_images]
    columns = int(np.ceil(len(images) ** 0.5))
    rows = -(-len(images) // columns)
    height, width = images.shape[2:]
    gain = min(max_side / (rows * height), max_side / (columns * width), 1)
    height, width = int(height * gain), int(width * gain)

    mosaic = np.full((rows * height, columns * width, 3), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * height, i % columns * width
        tile = cv2.resize(to_bgr(image), (width, height), interpolation=cv2.INTER_AREA)
        tile = _draw_tile(tile, np.asarray(boxes[i], float), gain, names, Path(paths[i]).name if paths else "")
        mosaic[top : top + height, left : left + width] = tile
    _write(path, mosaic)


def _draw_tile(tile: np.ndarray, boxes: np.ndarray, gain: float, names: Names, title: str) -> np.ndarray:
    """Draw boxes (n, 5 or 6), given in pixels before `gain`, a title and a frame on one BGR tile of the mosaic."""
    if not len(boxes):
        boxes = np.empty((0, 5))
    predicted = boxes.shape[1] == 6
    conf = boxes[:, 5] if predicted else np.ones(len(boxes))
    detections = np.column_stack([boxes[:, 1:5] * gain, conf, boxes[:, 0]])[conf > DRAWN_CONF]
    line = 1 if min(tile.shape[:2]) < 400 else 2
    tile = draw_boxes(tile, detections, names, line, hide_conf=not predicted)
    if title:
        _draw_label(tile, (0, tile.shape[0] - 1), (70, 70, 70), line, title)
    cv2.rectangle(tile, (0, 0), (tile.shape[1] - 1, tile.shape[0] - 1), (255, 255, 255), 1)
    return tile


def _write(path: str | Path, image: np.ndarray) -> None:
    if not cv2.imwrite(str(path), image):
        raise InputError(f"{path}: cannot write this picture")


# Metrics


def plot_pr_curve(result: APResult, names: Names, path: str | Path) -> None:
    """Save the precision-recall curves at IoU 0.50 of every class and of their mean."""
    figure = _figure((9, 6))
    axes = figure.subplots()
    labels = [f"{_name(names, cls)} {ap:.3f}" for cls, ap in zip(result.classes, result.ap[:, 0])]
    _class_curves(axes, result.px, result.pr_curve, result.classes, labels)
    if len(result.classes):
        mean = result.pr_curve.mean(0)
        axes.plot(result.px, mean, color=INK, linewidth=3, label=f"all classes {result.map50:.3f} mAP@0.5")
    _finish_curves(figure, axes, "Precision-recall curve (IoU 0.50)", "Recall", "Precision", path)


def plot_confidence_curve(result: APResult, names: Names, which: str, path: str | Path) -> None:
    """Save the curves of `which` ("F1", "P" or "R") over the confidence, of every class and of their smoothed mean."""
    titles = {"F1": ("F1", result.f1_curve), "P": ("Precision", result.p_curve), "R": ("Recall", result.r_curve)}
    title, curves = titles[which]
    figure = _figure((9, 6))
    axes = figure.subplots()
    _class_curves(axes, result.px, curves, result.classes, [_name(names, cls) for cls in result.classes])
    if len(result.classes):
        mean = smooth(curves.mean(0))
        best = int(mean.argmax())
        label = f"all classes {mean[best]:.2f} at {result.px[best]:.3f}"
        axes.plot(result.px, mean, color=INK, linewidth=3, label=label)
        axes.plot(result.px[best], mean[best], "o", color=INK, markeredgecolor="white", zorder=5, clip_on=False)
    _finish_curves(figure, axes, f"{title}-confidence curve", "Confidence", title, path)


def _class_curves(axes: Axes, px: np.ndarray, curves: np.ndarray, classes: np.ndarray, labels: Sequence[str]) -> None:
    for cls, curve, label in zip(classes, curves, labels):
        if len(classes) <= LEGEND_CLASSES:
            axes.plot(px, curve, color=_rgb(int(cls)), linewidth=1.2, label=label)
        else:
            axes.plot(px, curve, color=GREY, linewidth=0.8, alpha=0.5)


def _finish_curves(figure: Figure, axes: Axes, title: str, x: str, y: str, path: str | Path) -> None:
    axes.set(xlim=(0, 1), ylim=(0, 1.02))
    _tidy(axes, title, x, y)
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles[-1:] + handles[:-1], labels[-1:] + labels[:-1], loc="outside right upper", frameon=False)
    _save(figure, path)


def plot_confusion_matrix(matrix: np.ndarray, names: Names, path: str | Path) -> None:
    """Save `matrix` (nc + 1, nc + 1) with columns summing to 1: rows predicted, columns true, the last background."""
    size = len(matrix)
    share = matrix / np.maximum(matrix.sum(0, keepdims=True), 1)
    side = min(max(6, 3 + 0.45 * size), 16)
    figure = _figure((side + 1, side))
    axes = figure.subplots()
    picture = axes.imshow(np.where(share > 0, share, np.nan), cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(picture, ax=axes, fraction=0.04, pad=0.02, label="share of the true class")
    if size <= 31:
        for row, column in np.argwhere(share >= 0.005):
            ink = "white" if share[row, column] > 0.55 else "black"
            number = f"{share[row, column]:.2f}"
            axes.text(column, row, number, ha="center", va="center", color=ink, fontsize=9 if size <= 22 else 7)
    _tidy(axes, "Confusion matrix", "True", "Predicted")
    axes.grid(False)
    labels = [_name(names, i) for i in range(size - 1)] + ["background"]
    font = 10 if size <= 31 else max(4, 560 / size)
    if size <= 120:
        axes.set_xticks(range(size), labels, rotation=90, fontsize=font)
        axes.set_yticks(range(size), labels, fontsize=font)
    _save(figure, path)


# Training


def plot_results(csv_path: str | Path, png_path: str | Path) -> None:
    """Save one panel per column of a `results.csv` over its epochs; the learning rates `x/lr*` share one.

    Values that are no numbers leave gaps. Raises `InputError` if the file has no rows.
    """
    columns = _read_columns(Path(csv_path))
    epochs = columns.pop("epoch", np.arange(len(next(iter(columns.values()), []))))
    rates = [name for name in columns if name.startswith("x/lr")]
    panels = [[name] for name in columns if name not in rates] + ([rates] if rates else [])

    width = min(len(panels), 5 if len(panels) > 12 else 4)
    height = -(-len(panels) // width)
    figure = _figure((3.4 * width, 2.7 * height))
    grid = figure.subplots(height, width, squeeze=False).ravel()
    for axes, panel in zip(grid, panels):
        if panel == rates:
            _plot_rates(axes, epochs, [columns[name] for name in rates], rates)
        else:
            _plot_column(axes, epochs, columns[panel[0]])
        _tidy(axes, "learning rate" if panel == rates else panel[0], "epoch", "")
        axes.xaxis.get_major_locator().set_params(integer=True)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    _save(figure, png_path)


def _plot_column(axes: Axes, epochs: np.ndarray, values: np.ndarray) -> None:
    smoothed = len(epochs) >= 10 and np.isfinite(values).all()
    axes.plot(epochs, values, color=BLUE, alpha=0.45 if smoothed else 1, marker=".", markersize=4)
    if smoothed:
        axes.plot(epochs, smooth(values, 0.15), color=BLUE, linewidth=2)


def _plot_rates(axes: Axes, epochs: np.ndarray, rates: Sequence[np.ndarray], names: Sequence[str]) -> None:
    # The rates coincide after the warm-up: thinner lines on top of thicker ones keep all of them visible.
    for i, (rate, name) in enumerate(zip(rates, names)):
        colour, width = (LIGHT, ORANGE, INK)[i % 3], max(6 - 2.3 * i, 1)
        axes.plot(epochs, rate, color=colour, linewidth=width, marker="." if len(epochs) == 1 else "", label=name)
    axes.legend(frameon=False, fontsize=8)


def _read_columns(path: Path) -> dict[str, np.ndarray]:
    """Return the columns of a comma-separated file whose names and values may be padded with blanks."""
    try:
        with path.open(newline="") as file:
            header, *rows = list(csv.reader(file)) or [[]]
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{path}: no results to plot ({error})") from None
    names = [name.strip() for name in header]
    if not rows or not set(names) - {"", "epoch"}:
        raise InputError(f"{path}: no results to plot; expected a header and one row per epoch, separated by commas")
    return {name: np.array([_number(row, i) for row in rows]) for i, name in enumerate(names) if name}


def _number(row: Sequence[str], i: int) -> float:
    try:
        return float(row[i])
    except (ValueError, IndexError):
        return float("nan")


def plot_labels(labels: np.ndarray, names: Names, path: str | Path) -> None:
    """Save an overview of all `labels` (n, 5) of a data set: class, centre x, centre y, width, height, normalised."""
    figure = _figure((14, 9))
    panels = figure.subplot_mosaic([["classes"] * 3, ["boxes", "centres", "sizes"]])
    _class_histogram(panels["classes"], labels[:, 0].astype(int), names)
    panels["boxes"].imshow(_box_overlay(labels[:OVERLAID_LABELS], 600), extent=(0, 1, 1, 0))
    panels["boxes"].set(xticks=[], yticks=[])
    title = f"Boxes, centred (first {OVERLAID_LABELS})" if len(labels) > OVERLAID_LABELS else "Boxes, centred"
    _tidy(panels["boxes"], title, "image width", "image height")
    _density(figure, panels["centres"], labels[:, 1:3])
    _tidy(panels["centres"], "Centres", "x", "y")
    panels["centres"].invert_yaxis()  # as in the image, y points down
    _density(figure, panels["sizes"], labels[:, 3:5])
    _tidy(panels["sizes"], "Sizes", "width", "height")
    _save(figure, path)


def plot_labels_correlogram(labels: np.ndarray, path: str | Path, most: int = 5000) -> None:
    """Save pairwise histograms of centre and size of `labels` (n, 5), shares of the image's sides; at most `most` of them, evenly picked."""
    import matplotlib
    import pandas
    import seaborn

    matplotlib.use("Agg")  # seaborn draws through pyplot
    picked = labels[np.linspace(0, len(labels) - 1, min(len(labels), most)).astype(int), 1:] if len(labels) else labels[:, 1:]
    frame = pandas.DataFrame(picked, columns=["x", "y", "width", "height"])
    grid = seaborn.pairplot(
        frame, corner=True, diag_kind="hist", kind="hist", diag_kws={"bins": 40}, plot_kws={"bins": 40, "pmax": 0.9}, height=1.8
    )
    grid.figure.savefig(path, dpi=150)
    matplotlib.pyplot.close(grid.figure)


def _density(figure: Figure, axes: Axes, points: np.ndarray) -> None:
    """Draw how many `points` (n, 2) in the unit square fall into each of 50 x 50 cells."""
    from matplotlib.colors import PowerNorm

    counts = np.histogram2d(points[:, 0], points[:, 1], bins=50, range=((0, 1), (0, 1)))[0].T
    # Few cells hold most labels: a power below 1 keeps the others visible.
    norm = PowerNorm(0.4, vmin=0, vmax=max(counts.max(), 1))
    shown = np.where(counts > 0, counts, np.nan)
    picture = axes.imshow(shown, origin="lower", extent=(0, 1, 0, 1), cmap="viridis", norm=norm)
    figure.colorbar(picture, ax=axes, fraction=0.046, pad=0.03, label="labels")


def _class_histogram(axes: Axes, classes: np.ndarray, names: Names) -> None:
    size = max(len(names), int(classes.max(initial=-1)) + 1)
    counts = np.bincount(classes, minlength=size)
    axes.bar(range(size), counts, color=[_rgb(i) for i in range(size)], width=0.85)
    _tidy(axes, f"Classes ({len(classes)} labels)", "", "labels")
    axes.grid(False, axis="x")
    axes.set_xlim(-0.75, size - 0.25)
    if size <= 120:
        font, rotation = 10 if size <= 40 else max(4, 700 / size), 0 if size <= 8 else 90
        axes.set_xticks(range(size), [_name(names, i) for i in range(size)], rotation=rotation, fontsize=font)


def _box_overlay(labels: np.ndarray, side: int) -> np.ndarray:
    """Return a white (side, side, 3) RGB picture with every label's box drawn around its centre."""
    canvas = np.full((side, side, 3), 255, np.uint8)
    for cls, _, _, width, height in labels:
        low = (round(side / 2 * (1 - width)), round(side / 2 * (1 - height)))
        high = (round(side / 2 * (1 + width)), round(side / 2 * (1 + height)))
        cv2.rectangle(canvas, low, high, class_colour(int(cls))[::-1], 1)
    return canvas


# Pruning


def plot_gamma_history(history: Sequence[np.ndarray], near_zero_share: Sequence[float], path: str | Path) -> None:
    """Save how |gamma| (one 1-d array per epoch) is distributed over the epochs, and its share that is near zero."""
    from matplotlib.colors import LogNorm

    top = _gamma_top(history)
    edges = np.linspace(0, top, 81)
    share = np.zeros((max(len(history), 1), len(edges) - 1))
    for row, gamma in zip(share, history):
        row[:] = np.histogram(gamma, edges)[0] / max(len(gamma), 1)

    figure = _figure((9, 7))
    density, line = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    extent = (-0.5, len(share) - 0.5, 0, top)
    shown = np.where(share > 0, share, np.nan).T
    norm = LogNorm(1e-4, 1)
    picture = density.imshow(shown, origin="lower", aspect="auto", extent=extent, cmap="viridis", norm=norm)
    figure.colorbar(picture, ax=density, pad=0.02, label="share of channels")
    _tidy(density, "Batch-norm scales during sparsity training", "", "|gamma|")
    density.grid(False)
    line.plot(range(len(near_zero_share)), np.multiply(near_zero_share, 100), color=ORANGE, linewidth=2, marker=".")
    line.set(ylim=(0, 100), xlim=extent[:2])
    line.xaxis.get_major_locator().set_params(integer=True)
    _tidy(line, "", "epoch", "near zero (%)")
    figure.align_ylabels()
    _save(figure, path)


def plot_gamma_before_after(before: np.ndarray, after: np.ndarray, threshold: float | None, path: str | Path) -> None:
    """Save the distributions of two sets of |gamma| (1-d each), with the pruning `threshold` if there is one."""
    top = _gamma_top([before, after])
    edges = np.linspace(0, top, 101)
    figure = _figure((9, 5))
    axes = figure.subplots()
    for gamma, colour, name in ((before, GREY, "before"), (after, BLUE, "after")):
        label = f"{name} ({len(gamma)} channels)"
        axes.hist(gamma, edges, color=colour, alpha=0.55, label=label)
    if threshold is not None:
        axes.axvline(threshold, color=ORANGE, linestyle="--", label=f"threshold {threshold:.3g}")
    axes.set_yscale("log")
    axes.set_xlim(0, top)
    _tidy(axes, "Batch-norm scales before and after", "|gamma|", "channels")
    axes.legend(frameon=False)
    _save(figure, path)


def _gamma_top(gammas: Sequence[np.ndarray]) -> float:
    """Return where to end an axis of |gamma|: a trained network's outliers, 0.1% of it, would squeeze the rest."""
    return max((float(np.quantile(gamma, 0.999)) for gamma in gammas if len(gamma)), default=0.0) * 1.05 or 1.0


def plot_widths(names: Sequence[str], before: Sequence[int], after: Sequence[int], path: str | Path) -> None:
    """Save each layer's number of channels before and after pruning, as bars in columns of up to 60 layers."""
    columns = max(-(-len(names) // 60), 1)
    rows = -(-len(names) // columns)
    figure = _figure((4 + 4 * columns, 1.6 + 0.21 * rows))
    grid = figure.subplots(1, columns, squeeze=False)[0]
    for column, axes in enumerate(grid):
        part = slice(column * rows, (column + 1) * rows)
        _width_bars(axes, names[part], before[part], after[part], max(before, default=1))
    figure.suptitle(f"Channels per layer: {sum(before)} before, {sum(after)} after pruning", fontsize=13)
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    _save(figure, path)


def _width_bars(axes: Axes, names: Sequence[str], before: Sequence[int], after: Sequence[int], widest: int) -> None:
    positions = np.arange(len(names))
    axes.barh(positions, before, height=0.8, color=LIGHT, label="before")
    axes.barh(positions, after, height=0.8, color=BLUE, label="after")
    for position, old, new in zip(positions, before, after):
        text = f"{new}" if new == old else f"{new} of {old}"
        axes.text(max(old, new) + widest * 0.01, position, text, va="center", fontsize=7.5)
    axes.set_yticks(positions, names, fontsize=8)
    axes.set(ylim=(len(names) - 0.4, -0.6), xlim=(0, widest * 1.15))
    _tidy(axes, "", "channels", "")
    axes.grid(False, axis="y")


# Shared


def _name(names: Names, i: int) -> str:
    """Return the name of class `i`, or its number where it has none."""
    i = int(i)
    if isinstance(names, Mapping):
        return str(names.get(i, i))
    return str(names[i]) if 0 <= i < len(names) else str(i)


def _rgb(i: int) -> str:
    blue, green, red = class_colour(i)
    return f"#{red:02x}{green:02x}{blue:02x}"


def _figure(inches: tuple[float, float]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=inches, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    return figure


def _tidy(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, path: str | Path) -> None:
    figure.savefig(path, dpi=DPI)


new_figure, tidy = _figure, _tidy  # for pictures that live in files of their own
