"""What to draw of several networks: accuracy against a cost, the pareto front marked, labels that do not lie on each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from utils.plots import BLUE, DPI, GREY, INK, LIGHT, new_figure, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels


@dataclass(frozen=True)
class Panel:
    """One picture: `cost` and `value` per network, None where it is not known."""

    title: str
    x: str
    cost: Sequence[float | None]


def pareto_front(costs: Sequence[float], values: Sequence[float]) -> list[int]:
    """Indices, by rising cost, of the points that no other point beats: none costs at most as much and is worth more, or less and as much.

    >>> pareto_front([1, 2, 3, 2], [5, 7, 6, 6])
    [0, 1]
    """
    front: list[int] = []
    for i in sorted(range(len(costs)), key=lambda i: (costs[i], -values[i], i)):
        if not front or values[i] > values[front[-1]]:
            front.append(i)
    return front


def plot_comparison(labels: Sequence[str], values: Sequence[float], panels: Sequence[Panel], y: str, path: str | Path) -> None:
    """Save one scatter per panel with at least one known cost; points on the front are blue and joined by a line of steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    shown = [p for p in panels if any(c is not None for c in p.cost)]
    figure = new_figure((7.2 * max(len(shown), 1), 5.4))
    FigureCanvasAgg(figure)  # measures the labels
    grid = figure.subplots(1, max(len(shown), 1), squeeze=False)[0]
    kept = [[i for i, c in enumerate(p.cost) if c is not None] for p in shown]
    for axes, panel, known in zip(grid, shown, kept):
        _scatter(axes, [panel.cost[i] for i in known], [values[i] for i in known])
        tidy(axes, panel.title, panel.x, y)
    figure.canvas.draw()  # fixes the layout: labels are placed in pixels
    for axes, panel, known in zip(grid, shown, kept):
        _label(axes, [panel.cost[i] for i in known], [values[i] for i in known], [labels[i] for i in known])
    figure.savefig(path, dpi=DPI)


def _scatter(axes: Axes, costs: Sequence[float], values: Sequence[float]) -> None:
    front = pareto_front(costs, values)
    axes.step([costs[i] for i in front], [values[i] for i in front], where="post", color=LIGHT, linewidth=2, zorder=1)
    rest = [i for i in range(len(costs)) if i not in front]
    if rest:
        axes.scatter(
            [costs[i] for i in rest], [values[i] for i in rest], s=46, color=GREY, zorder=3, label="another is better at no more cost"
        )
    axes.scatter([costs[i] for i in front], [values[i] for i in front], s=64, color=BLUE, zorder=3, label="none is better at its cost")
    low, high = min(values), max(values)
    margin = max(high - low, 0.02) * 0.16
    axes.set_ylim(low - margin, high + margin)
    axes.set_xlim(0, max(costs) * 1.18 or 1)
    axes.legend(frameon=False, fontsize=8, loc="lower right" if len(costs) > 1 else "best")


def _label(axes: Axes, costs: Sequence[float], values: Sequence[float], labels: Sequence[str]) -> None:
    """Write the labels where they cover the least, joined to their points by thin lines where it might not be clear whose they are."""
    renderer = axes.figure.canvas.get_renderer()
    points = axes.transData.transform(np.column_stack([costs, values]))
    legend = tuple(axes.get_legend().get_window_extent(renderer).extents)
    sizes = []
    for text in labels:
        written = axes.text(0, 0, text, fontsize=8.5)
        extent = written.get_window_extent(renderer)
        sizes.append((extent.width, extent.height))
        written.remove()
    boxes = place_labels(points, sizes, tuple(axes.get_window_extent(renderer).extents), [legend, *_treads(points, costs, values)])
    for point, cost, value, text, box in zip(points, costs, values, labels, boxes):
        offset = (np.array(box[:2]) - point) * 72 / axes.figure.dpi
        line = (
            {"arrowstyle": "-", "color": INK, "alpha": 0.5, "linewidth": 0.8, "shrinkA": 0, "shrinkB": 3} if far(point, box) > 12 else None
        )
        axes.annotate(text, (cost, value), offset, textcoords="offset points", fontsize=8.5, color=INK, arrowprops=line, zorder=4)


def _treads(points: np.ndarray, costs: Sequence[float], values: Sequence[float]) -> list[Box]:
    """The boxes, in pixels, that the line of steps through the front covers: along from one point, then up to the next."""
    steps = points[pareto_front(costs, values)]
    along = [(a[0], a[1] - 2, b[0], a[1] + 2) for a, b in zip(steps, steps[1:])]
    return along + [(b[0] - 2, a[1], b[0] + 2, b[1]) for a, b in zip(steps, steps[1:])]


def place_labels(points: np.ndarray, sizes: Sequence[tuple[float, float]], frame: Box, taken: Sequence[Box] = ()) -> list[Box]:
    """A box for the label of each of `points` (n, 2), `sizes` its width and height, all in pixels: inside `frame` and clear of all points, of the
    boxes in `taken` and of each other, as far as there is room. Near places come first; the first labels choose first."""
    occupied = [(x - 6, y - 6, x + 6, y + 6) for x, y in points] + list(taken)
    boxes = []
    for own, size in zip(points, sizes):
        others = [p for p in points if not np.array_equal(p, own)]
        costs = [(_cost(box, own, others, occupied, frame), radius, box) for radius, box in _places(*own, *size)]
        boxes.append(box := min(costs, key=lambda c: c[:2])[2])
        occupied.append(box)
    return boxes


def far(point: np.ndarray, box: Box) -> float:
    """Distance of a point (2,) from a box, 0 inside."""
    return float(np.hypot(max(box[0] - point[0], 0, point[0] - box[2]), max(box[1] - point[1], 0, point[1] - box[3])))


def _places(x: float, y: float, width: float, height: float) -> Iterator[tuple[int, Box]]:
    """(radius, box) of the places around a point, nearest first."""
    for radius in (9, 18, 30, 46, 66, 90, 120, 150):
        for angle in np.radians(np.arange(0, 360, 30 if radius < 46 else 15)):
            left = x + radius * np.cos(angle) - width * (1 - np.cos(angle)) / 2
            bottom = y + radius * np.sin(angle) - height * (1 - np.sin(angle)) / 2
            yield radius, (left, bottom, left + width, bottom + height)


def _cost(box: Box, own: np.ndarray, others: Sequence[np.ndarray], occupied: Sequence[Box], frame: Box) -> tuple[int, int]:
    """Pixels of a label that lie on something or outside `frame`, and how many other points it might be taken to name."""
    outside = (box[2] - box[0]) * (box[3] - box[1]) - overlap(box, frame)
    strangers = sum(far(p, box) < far(own, box) + 12 for p in others)
    return round(sum(overlap(box, other) for other in occupied) + 3 * outside), strangers


def overlap(a: Box, b: Box) -> float:
    """Area that two boxes share."""
    return max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)
