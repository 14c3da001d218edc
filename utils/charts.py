"""Charts inside a page, drawn as HTML and SVG that take their colours from `page.css`: they follow dark mode and print."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from utils.html import Child, Raw, el, markup, number

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 400, 230, 66, 42, 12  # of a chart, in its own units; at most as many pixels on a phone


@dataclass(frozen=True)
class Bar:
    """One row of a width chart; `whole`: it could not be pruned."""

    name: str
    before: int
    after: int
    whole: bool = False


def width_bars(bars: Sequence[Bar]) -> Raw:
    """A row per layer: its width before, and over it its width after, on one scale for all layers."""
    widest = max((max(bar.before, bar.after) for bar in bars), default=1)

    def row(bar: Bar) -> Raw:
        track = [el("i", style=f"width:{100 * width / widest:.2f}%") for width in (bar.before, bar.after)]
        text = markup(number(bar.before, f"{bar.before}"), " → ", number(bar.after, f"{bar.after}"))
        if bar.before == bar.after:
            text = number(bar.after, f"{bar.after}")
        cells = [el("span", bar.name, title=bar.name), el("span", track, class_="track", aria_hidden="true"), el("span", text)]
        return el("li", cells, class_="whole" if bar.whole else None)

    return el("ol", [row(bar) for bar in bars], class_="bars")


def legend(**parts: Child) -> Raw:
    """What the colours stand for: `b` before, `a` after, `w` kept whole (hatched), `t` the dashed line."""
    return el("div", [el("span", el("i", class_=kind), text) for kind, text in parts.items()], class_="key")


def gamma_top(gammas: Sequence[np.ndarray]) -> float:
    """Where an axis of |gamma| ends: a trained network's outliers, 0.1% of it, would squeeze the rest."""
    return max((float(np.quantile(g, 0.999)) for g in gammas if len(g)), default=0.0) * 1.05 or 1.0


def histogram(values: np.ndarray, top: float, most: int, kind: str, title: str, mark: float | None = None, bins: int = 60) -> Raw:
    """How many of `values` (n,) fall into each of `bins` parts of 0..top, on a logarithmic scale up to `most`; `mark`: a dashed line."""
    counts = np.histogram(values, bins, (0, top))[0]
    decades = max(int(np.ceil(np.log10(max(most, 10)))), 1)
    step = (WIDTH - LEFT) / bins

    def y(count: float) -> float:
        """A count of 1 stands a little above the floor, so that single channels show."""
        return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * (np.log10(count) + 0.15) / (decades + 0.15)

    parts = [el("title", title)]
    for power in range(decades + 1):
        height = y(10**power)
        parts.append(el("line", x1=LEFT, x2=WIDTH, y1=f"{height:.1f}", y2=f"{height:.1f}", class_="grid"))
        parts.append(el("text", f"{10**power:,}", x=LEFT - 6, y=f"{height + 4:.1f}", text_anchor="end"))
    path = "".join(
        f"M{LEFT + i * step:.1f} {HEIGHT - BOTTOM}V{y(n):.1f}h{step - 0.6:.2f}V{HEIGHT - BOTTOM}z" for i, n in enumerate(counts) if n
    )
    parts.append(el("path", d=path, class_=kind))
    for tick in _ticks(top):
        parts.append(el("text", f"{tick:g}", x=f"{LEFT + (WIDTH - LEFT) * tick / top:.1f}", y=HEIGHT - BOTTOM + 16, text_anchor="middle"))
    parts.append(el("text", "|gamma|", x=WIDTH, y=HEIGHT - 4, text_anchor="end"))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(el("text", "channels", x=12, y=middle, transform=f"rotate(-90 12 {middle:g})", text_anchor="middle"))
    if mark is not None and 0 <= mark <= top:
        x = LEFT + (WIDTH - LEFT) * mark / top
        parts.append(el("line", x1=f"{x:.1f}", x2=f"{x:.1f}", y1=TOP - 8, y2=HEIGHT - BOTTOM, class_="t"))
    return el("svg", parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=title, class_="chart")


def _ticks(top: float) -> list[float]:
    """Three to six round numbers from 0 on, none above `top`."""
    power = 10 ** np.floor(np.log10(top))
    step = next(s for s in (0.2 * power, 0.5 * power, power, 2 * power) if top / s <= 6)
    return [round(float(step * i), 10) for i in range(int(top / step) + 1)]


def spark(before: np.ndarray, after: np.ndarray, top: float, title: str, bins: int = 32) -> Raw:
    """A small histogram of a layer's |gamma| before, and over it after."""
    counts = [np.sqrt(np.histogram(values.clip(0, top), bins, (0, top))[0]) for values in (before, after)]
    most = max(float(c.max()) for c in counts) or 1.0
    paths = []
    for kind, heights in zip("ba", counts):
        bars = "".join(f"M{3 * i} 22v-{20 * h / most:.1f}h2.6V22z" for i, h in enumerate(heights) if h)
        paths.append(el("path", d=bars, class_=kind))
    base = el("path", d=f"M0 22h{3 * bins}", class_="grid")
    inner = [el("title", title), *paths, base]
    return el("svg", inner, viewBox=f"0 0 {3 * bins} 23", preserveAspectRatio="none", role="img", aria_label=title, class_="spark")
