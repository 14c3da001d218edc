"""What to draw of several networks: accuracy against a cost, the pareto front marked, labels that do not lie on each other."""

from __future__ import annotations

from collections.abc import Sequence
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
    axes.scatter([costs[i] for i in rest], [values[i] for i in rest], s=46, color=GREY, zorder=3, label="another is better at no more cost")
    axes.scatter([costs[i] for i in front], [values[i] for i in front], s=64, color=BLUE, zorder=3, label="none is better at its cost")
    low, high = min(values), max(values)
    margin = max(high - low, 0.02) * 0.16
    axes.set_ylim(low - margin, high + margin)
    axes.set_xlim(0, max(costs) * 1.18 or 1)
    axes.legend(frameon=False, fontsize=8, loc="lower right" if len(costs) > 1 else "best")


def _label(axes: Axes, costs: Sequence[float], values: Sequence[float], labels: Sequence[str]) -> None:
    """Write each label where it covers the least: the nearest free place around its point, joined to it by a thin line where that is far."""
    renderer = axes.figure.canvas.get_renderer()
    scale = axes.figure.dpi / 72
    points = axes.transData.transform(np.column_stack([costs, values]))
    legend = axes.get_legend().get_window_extent(renderer)
    taken: list[Box] = [(x - 5, y - 5, x + 5, y + 5) for x, y in points * 1.0] + [tuple(legend.extents)]
    frame = axes.get_window_extent(renderer).extents
    for (x, y), cost, value, text in zip(points, costs, values, labels):
        label = axes.text(0, 0, text, fontsize=8.5, color=INK)
        size = label.get_window_extent(renderer)
        label.remove()
        dx, dy, box = _free_place(x, y, size.width, size.height, taken, tuple(frame))
        taken.append(box)
        far = abs(dy + size.height / 2) > 14 or max(dx, -dx - size.width) > 14 or _stranger(points, (x, y), box)
        line = {"arrowstyle": "-", "color": GREY, "linewidth": 0.8, "shrinkA": 0, "shrinkB": 3} if far else None
        axes.annotate(
            text, (cost, value), (dx / scale, dy / scale), textcoords="offset points", fontsize=8.5, color=INK, arrowprops=line, zorder=4
        )


def _stranger(points: np.ndarray, own: tuple[float, float], box: Box) -> bool:
    """Whether another of `points` (n, 2) lies about as near to a label's box as its own point, so that a reader could take it for that."""

    def distance(p: np.ndarray | tuple[float, float]) -> float:
        return float(np.hypot(max(box[0] - p[0], 0, p[0] - box[2]), max(box[1] - p[1], 0, p[1] - box[3])))

    return any(distance(p) < distance(own) + 14 for p in points if tuple(p) != tuple(own))


def _free_place(x: float, y: float, width: float, height: float, taken: Sequence[Box], frame: Box) -> tuple[float, float, Box]:
    """Offset (dx, dy) of a label's lower left corner from its point, and its box: the place with the least overlap, nearer ones first."""
    best: tuple[float, float, float, Box] | None = None
    for radius in (9, 18, 30, 46, 66, 90):
        for angle in np.arange(0, 360, 30):
            cos, sin = np.cos(np.radians(angle)), np.sin(np.radians(angle))
            dx = radius * cos - width * (1 - cos) / 2
            dy = radius * sin - height * (1 - sin) / 2
            box = (x + dx, y + dy, x + dx + width, y + dy + height)
            cost = sum(overlap(box, other) for other in taken) + 3 * (width * height - overlap(box, frame))
            if best is None or cost < best[0] - 0.5:
                best = (cost, dx, dy, box)
        if best[0] <= 0.5:
            break
    return best[1], best[2], best[3]


def overlap(a: Box, b: Box) -> float:
    """Area that two boxes share."""
    return max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)
