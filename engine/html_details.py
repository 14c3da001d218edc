"""The parts of a pruning report that list things one by one: mAP by class, channels by layer, and the batch norm scales."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from engine.verdict import STAGES, change, final_stage
from utils.charts import Bar, gamma_top, histogram, legend, spark, width_bars
from utils.html import Raw, el, markup, number, table

Report = Mapping[str, Any]
Gammas = Mapping[str, np.ndarray]
_SAME = 0.0005  # of mAP: less is written as no change


def classes(report: Report, count: int) -> Raw | None:
    """mAP of every class that has objects, the largest loss of mAP@.5 first. `count`: of all classes."""
    stage = final_stage(report)
    if stage is None:
        return None
    rows = zip(report["before"].get("per_class") or (), report[stage].get("per_class") or ())  # the same labels, hence the same classes
    shared = sorted((pair for pair in rows if pair[0]["name"] == pair[1]["name"]), key=_moved)  # stable: ties in the order of the classes
    if not shared:
        return None
    moved = np.array([_moved(pair) for pair in shared])
    unseen = count - len(shared)
    words = [
        f"The largest loss of mAP@.5 comes first: {(moved < -_SAME).sum()} of {len(shared)} classes lost, {(moved > _SAME).sum()} gained."
    ]
    if unseen > 0:
        words.append(f"{unseen} more {'class has' if unseen == 1 else 'classes have'} no object in the validation images.")
    if min(old["labels"] for old, _ in shared) < 10:
        words.append("A class with few objects moves by chance.")
    head = ["Class", "Objects", "mAP@.5 before", "after", "change", "mAP@.5:.95 before", "after", "change"]
    most = max(float(np.abs(moved).max()), 0.05)  # smaller changes than this are noise, and stay small bars
    cells = [_class_row(old, new, most) for old, new in shared]
    return markup(
        el("p", " ".join(words), class_="soft"),
        table(head, cells, f"mAP by class, before and after; after is the network {STAGES[stage][0]}."),
    )


def _moved(pair: tuple[Mapping[str, Any], Mapping[str, Any]]) -> float:
    """By how much mAP@.5 rose between two rows of `per_class`."""
    return pair[1]["map50"] - pair[0]["map50"]


def _class_row(old: Mapping[str, Any], new: Mapping[str, Any], most: float) -> list[Raw | str]:
    """Cells of a class; the bar of a change of `most` is the longest."""
    cells: list[Raw | str] = [str(old["name"]), number(old["labels"], f"{old['labels']:,}")]
    for key in ("map50", "map"):
        a, b = old[key], new[key]
        tone = "good" if b - a > _SAME else "bad" if b - a < -_SAME else None
        bar = el("i", class_="up" if b > a else None, style=f"width:{50 * min(abs(b - a) / most, 1):.1f}%")
        swing = el("span", bar, class_="swing", aria_hidden="true") if key == "map50" else None
        cells += [number(a, f"{a:.3f}"), number(b, f"{b:.3f}"), markup(el("span", change(a, b, True), class_=tone), swing)]
    return cells


def bottlenecks(report: Report) -> Raw | None:
    """Of a layer pruning: every bottleneck with a shortcut, what it was judged by and what became of it."""
    rows = [
        [
            el("code", b["name"]), number(b["gamma"], f"{b['gamma']:.4f}"), number(b["parameters"], f"{b['parameters']:,}"),
            el("b", "removed") if b["removed"] else b["note"] or "stays",
        ]
        for b in report.get("bottlenecks") or ()
    ]  # fmt: skip
    if not rows:
        return None
    words = (
        "A bottleneck goes by the mean |gamma| of its last convolution, the lowest first. In its place stays its input, plus the constant that "
        "the branch gives without it, folded into what reads the sum."
    )
    caption = "Every bottleneck with a shortcut, in the order of the network."
    return markup(el("p", words, class_="soft"), table(["Bottleneck", "mean |gamma|", "Parameters", "What became of it"], rows, caption))


def widths(report: Report, before: Gammas, after: Gammas) -> Raw | None:
    """A bar per convolution, and folded away a table with the reasons and each layer's scales."""
    layers: Sequence[Mapping[str, Any]] = report.get("layers") or ()
    if not layers:
        return None
    was, now = (sum(x[end] for x in layers) for end in ("before", "after"))
    whole = [x for x in layers if x.get("kept")]
    words = markup(number(now, f"{now:,}"), " of ", number(was, f"{was:,}"), f" filters of {len(layers)} convolutions are left.")
    if whole:
        verb = "layer stays" if len(whole) == 1 else "layers stay"
        words = markup(words, f" {len(whole)} {verb} whole for a reason; the table says which.")
    bars = width_bars([Bar(x["name"], x["before"], x["after"], bool(x.get("kept"))) for x in layers])
    key = legend(a="left", b="removed", **({"w": "kept whole for a reason"} if whole else {}))
    return markup(el("p", words, class_="soft"), key, bars, _layer_table(layers, before, after))


def _layer_table(layers: Sequence[Mapping[str, Any]], before: Gammas, after: Gammas) -> Raw:
    top = gamma_top(list(before.values()))
    with_gammas = any(x["name"] in before for x in layers)

    def row(layer: Mapping[str, Any]) -> list[Raw | str]:
        name, old, new = layer["name"], layer["before"], layer["after"]
        cells: list[Raw | str] = [el("code", name), number(old, f"{old}"), number(new, f"{new}"), f"{new / old:.0%}" if old else "–"]
        if with_gammas:
            none = np.empty(0)
            values, left = before.get(name, none), after.get(name, none)
            cells.append(spark(values, left, top, f"{name}: |gamma| from 0 to {top:.3g}, before and after") if len(values) else "")
        return [*cells, str(layer.get("kept") or "")]

    head = ["Layer", "Filters", "left", "share", *(["|gamma|"] if with_gammas else []), "Why it stays whole"]
    note = f" |gamma| is drawn from 0 to {top:.3g}; heights are square roots of counts." if with_gammas else ""
    inner = table(head, map(row, layers), f"Every convolution in the order of the network.{note}", "layers")
    return el("details", el("summary", "Every layer in numbers, and why some stay whole"), inner)


def gammas(report: Report, before: Gammas, after: Gammas) -> Raw | None:
    """Two histograms on the same axes, and the largest score that was marked where the criterion is the scale."""
    if not before or not after:
        return None
    old, new = (np.concatenate([np.ravel(g) for g in side.values()]) for side in (before, after))
    top = gamma_top([old, new])
    selection = report.get("selection") or {}
    by_gamma = report.get("criterion", "gamma") == "gamma" and report.get("normalize", "none") == "none"
    threshold = selection.get("threshold") if by_gamma else None
    most = int(np.histogram(old, 60, (0, top))[0].max())
    charts = []
    for kind, values, words in (("b", old, "before"), ("a", new, "after")):
        caption = f"{words.capitalize()}: {len(values):,} channels"
        title = f"Histogram of |gamma| {words} pruning, {len(values):,} channels, median {np.median(values) if len(values) else 0:.3g}"
        charts.append(el("figure", el("figcaption", caption), histogram(values, top, most, kind, title, threshold)))
    words = (
        "The scale that each batch norm gives its channel; what training drove to 0 can go at little cost. A channel below the line may stay "
        "for its group, for a floor or for rounding."
        if threshold
        else "The scale that each batch norm gives its channel. They were not what the channels were chosen by."
        if not by_gamma
        else "The scale that each batch norm gives its channel; what training drove to 0 can go at little cost."
    )
    key = legend(t=["largest score that was marked: ", number(threshold, f"{threshold:.3g}")]) if threshold else None
    return markup(el("p", words, class_="soft"), key, el("div", charts, class_="charts"))
