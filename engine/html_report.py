"""`report.html` of a pruning run: what was cut, what it cost, what to do next; one file that needs no network and no script.

It says what `report.json` holds, in an order for people: the decision in a sentence, the stages, the next commands, detections side by
side, classes, widths, gammas, the check, every option. A part whose figures a report does not have is left out. The first sentences are
made in `engine/verdict.py`, the parts about classes and layers in `engine/html_details.py`, elements and style in `utils/html.py`.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from engine.html_details import bottlenecks, classes, gammas, widths
from engine.samples import Sample
from engine.verdict import STAGES, change, decision, final_stage, latency_size, tone, verdict
from utils.files import write_text
from utils.html import Raw, el, markup, number, page, picture, table

Report = Mapping[str, Any]


@dataclass(frozen=True)
class Command:
    """A command line to type next, and what it does."""

    text: str
    what: str


@dataclass(frozen=True, eq=False)
class HtmlReport:
    """What a page is made from.

    report: the content of `report.json`.  names: the classes.  gammas_*: per layer |gamma|, (channels,).  samples, commands: as they appear.
    """

    title: str
    report: Report
    names: tuple[str, ...] = ()
    gammas_before: Mapping[str, np.ndarray] = field(default_factory=dict)
    gammas_after: Mapping[str, np.ndarray] = field(default_factory=dict)
    samples: Sequence[Sample] = ()
    commands: Sequence[Command] = ()


def write_html(path: Path, content: HtmlReport) -> None:
    """Write the page atomically."""
    write_text(path, html(content))


def next_commands(weights: str | Path, cfg: str | Path, data: str, imgsz: int, teacher: str) -> list[Command]:
    """The four things that people do with a pruned pair: fine-tune it with distillation from the unpruned `teacher` if there is one, measure,
    detect, export."""

    def command(*words: object) -> str:
        return shlex.join(["python", *map(str, words)])

    size = ("--img", imgsz)
    tuned = ("--distill", "--t_weight", teacher) if teacher else ()
    why = "Fine-tune it, with the unpruned network as teacher; this brings back what the cut took." if teacher else "Train it."
    return [
        Command(
            command("finetune_pruned.py", "--cfg", cfg, "--weights", weights, "--data", data, *size, *tuned),
            why,
        ),
        Command(command("val.py", "--weights", weights, "--data", data, *size), "Measure it again, by YOLOv5's protocol."),
        Command(
            command("prune_detect.py", "--weights", weights, "--source", "IMAGES", *size),
            "Detect in images or videos of yours: a file, a folder, a glob or a camera's number in place of IMAGES.",
        ),
        Command(command("export.py", "--weights", weights, *size, "--include", "onnx"), "Export it for other programs."),
    ]


def html(content: HtmlReport) -> str:
    """The page as text."""
    report = content.report
    sections = [
        ("figures", "Before and after", _figures(report)),
        ("next", "How to go on", _commands(content)),
        ("detections", "Detections side by side", _samples(content.samples)),
        ("classes", "mAP by class", classes(report, len(content.names))),
        ("bottlenecks", "Bottlenecks", bottlenecks(report)),
        ("widths", "Channels by layer", widths(report, content.gammas_before, content.gammas_after)),
        ("gammas", "Batch norm scales", gammas(report, content.gammas_before, content.gammas_after)),
        ("check", "How it was checked", _check(report)),
        ("options", "Every option", _options(report)),
    ]
    present = [(anchor, title, body) for anchor, title, body in sections if body]
    links = el("nav", [markup(el("a", title, href=f"#{anchor}"), " ") for anchor, title, _ in present], aria_label="Parts of this report")
    return page(
        content.title,
        el("header", el("h1", f"Pruning report: {content.title}"), _decision(report), links),
        [markup("\n", el("section", el("h2", title, id=anchor), body)) for anchor, title, body in present],
    )


# The decision


def _decision(report: Report) -> Raw:
    kind, advice = verdict(report)
    return markup(
        el("p", decision(report), class_="decision"), el("p", advice, class_=f"verdict {kind}") if advice else None, _cards(report)
    )


def _cards(report: Report) -> Raw | None:
    stage = final_stage(report)
    if stage is None:
        return None
    before, after, size = report["before"], report[stage], latency_size(report)
    cards = []
    for row in _rows(size):
        old, new = row.of(before), row.of(after)
        if old is None or new is None or not row.card:
            continue
        moved = el("span", change(old, new, row.absolute), class_=tone(old, new, row.higher))
        cards.append(
            el(
                "div",
                el("dt", row.title),
                el("dd", number(new, row.text(new)), class_="now"),
                el("dd", "of ", number(old, row.text(old)), el("br"), moved, class_="was"),
            )
        )
    return el("dl", cards, class_="cards")


# The table of all stages


@dataclass(frozen=True)
class _Row:
    """One figure of a stage: where it is, how it is written. `higher`: more is better; `absolute`: its change is a difference, not a share."""

    title: str
    keys: tuple[str, ...]
    form: str
    higher: bool = False
    absolute: bool = False
    scale: float = 1.0
    card: bool = False

    def of(self, stage: Mapping[str, Any]) -> float | None:
        value: Any = stage
        for key in self.keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        return None if value is None else value

    def text(self, value: float) -> str:
        return format(value / self.scale if self.scale != 1 else value, self.form)


def _rows(size: str | None, other_sizes: Sequence[str] = ()) -> list[_Row]:
    rows = [
        _Row("mAP@.5", ("map50",), ".4f", True, True, card=True),
        _Row("mAP@.5:.95", ("map",), ".4f", True, True, card=True),
        _Row("Precision", ("precision",), ".4f", True, True),
        _Row("Recall", ("recall",), ".4f", True, True),
        _Row("GFLOPs", ("flops",), ".4g", scale=1e9, card=True),
        _Row("Parameters", ("params",), ",", card=True),
        _Row("File, MB", ("size_mb",), ".2f", card=True),
    ]
    if size:
        rows.append(_Row(f"ms at {size} px", ("latency_ms", size), ".2f", card=True))
    return rows + [_Row(f"ms at {other} px", ("latency_ms", other), ".2f") for other in other_sizes]


def _figures(report: Report) -> Raw | None:
    stages = [stage for stage in STAGES if stage in report]
    if not stages:
        return None
    size = latency_size(report)
    sizes = [s for s in report.get("before", {}).get("latency_ms", {}) if s != size]
    before = report.get("before", {})

    def cell(row: _Row, stage: str) -> Raw:
        value, old = row.of(report[stage]), row.of(before)
        if value is None:
            return Raw("–")
        note = None
        if stage != "before" and old is not None and value != old:
            note = el("small", change(old, value, row.absolute), class_=tone(old, value, row.higher))
        return markup(number(value, row.text(value)), note)

    rows = [[row.title, *(cell(row, stage) for stage in stages)] for row in _rows(size, sizes)]
    rows = [row for row in rows if any(c != "–" for c in row[1:])]
    images, instances = before.get("images"), before.get("instances")
    on = f"Measured on {images:,} validation images with {instances:,} objects" if images is not None else "Measured"
    caption = f"{on} at {report.get('imgsz', '?')} px. Changes against the first column."
    meanings = [el("li", el("b", STAGES[stage][0]), f": {STAGES[stage][1]}") for stage in stages]
    return markup(table(["", *(STAGES[stage][0] for stage in stages)], rows, caption), el("ul", meanings, class_="soft"))


# What to type next


def _commands(content: HtmlReport) -> Raw | None:
    if not content.commands:
        return None
    pair = content.report.get("pair")
    where = markup("The pruned network: ", [markup(el("code", name), " ") for name in pair]) if pair else None
    each = [markup(el("p", c.what, class_="soft"), el("pre", el("code", c.text))) for c in content.commands]
    return markup(el("p", where) if where else None, *each)


# Pictures


def _samples(samples: Sequence[Sample]) -> Raw | None:
    if not samples:
        return None

    def side(sample: Sample, which: str) -> Raw:
        image, text = (sample.before, sample.before_text) if which == "before" else (sample.after, sample.after_text)
        alt = f"{sample.name}, detections {which} pruning" + (f": {text}" if text else "")
        caption = el("figcaption", el("b", which.capitalize()), f": {text}" if text else None)
        return el("figure", picture(image, alt), caption)

    intro = (
        "Of the validation images that were looked at, those on which the two networks differ most. Before: the network as it was; after: "
        "the one that was written, without any training. Boxes with a confidence of at least 0.25."
    )
    pairs = [el("div", el("h3", s.name), el("div", side(s, "before"), side(s, "after")), class_="pair") for s in samples]
    return markup(el("p", intro, class_="soft"), pairs)


# How it was checked


def _check(report: Report) -> Raw | None:
    oracle = report.get("oracle")
    if not oracle:
        return None
    difference, bound, images = (oracle.get(key) for key in ("difference", "bound", "images"))
    figures = markup(
        "On ", number(images, f"{images}"), " validation images the largest difference of the logits is ", number(difference, f"{difference:.2e}"),
        ", the bound for float32 is ", number(bound, f"{bound:.2e}"),
    )  # fmt: skip
    what, one = ("bottlenecks", "branch's output") if report.get("removed") else ("channels", "channel's activation")
    changed = oracle.get("changed")
    cut = markup("; the cut itself moved them by up to ", number(changed, f"{changed:.3g}"), ".") if changed is not None else "."
    return markup(
        el(
            "p",
            f"Removing {what} must equal silencing them: the network at full width, with every removed {one} multiplied by "
            "zero, gives what the small one gives. ",
            figures,
            cut,
            el("b", " Equal.", class_="good") if difference <= bound else el("b", " Not equal!", class_="bad"),
        )
    )


# Every option

_SHOWN_ELSEWHERE = {*STAGES, "layers", "bottlenecks", "oracle", "commands"}
_MEANINGS = {
    "weights": "the checkpoint that was pruned",
    "data": "the data set that measured it",
    "pair": "what was written",
    "imgsz": "size of the measurements, pixels",
    "policy.percent": "share of the pooled scores to remove",
    "policy.shortcuts": "how the members of a shortcut group decide",
    "policy.equalize": "how the members of a channel space decide",
    "policy.layer_keep": "share of every layer's channels that stays",
    "policy.divisor": "kept filters are a multiple of this",
    "policy.min_filters": "no layer keeps fewer filters than this",
    "selection.threshold": "the largest score that was marked",
    "selection.safe_percent": "share at which the first layer would be empty",
    "selection.planned": "scores marked",
    "selection.pool": "scores ranked",
    "criterion": "what a channel's score is",
    "normalize": "how scores of different layers are made comparable",
    "equalize": "how the members of a channel space decide",
    "recalibrate": "training batches that re-estimated the batch norms",
    "exclude": "left alone by request",
    "shortcuts": "number of bottlenecks to remove",
    "removed": "the bottlenecks that are gone",
}


def _options(report: Report) -> Raw | None:
    rows = [
        [markup(el("code", key), el("small", _MEANINGS[key], class_="soft") if key in _MEANINGS else None), _value(value)]
        for key, value in _flat({k: v for k, v in report.items() if k not in _SHOWN_ELSEWHERE})
    ]
    return table(["Option", "Value"], rows, "What report.json holds besides figures.", "words") if rows else None


def _flat(content: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested keys as `policy.percent`, in order."""
    pairs: list[tuple[str, Any]] = []
    for key, value in content.items():
        name = f"{prefix}{key}"
        pairs += _flat(value, name + ".") if isinstance(value, Mapping) else [(name, value)]
    return pairs


def _value(value: Any) -> Raw | str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, (int, float)):
        return number(value, f"{value:.6g}" if isinstance(value, float) else f"{value}")
    if isinstance(value, (list, tuple)):
        return markup([el("div", _value(item)) for item in value]) if value else "–"
    if isinstance(value, Mapping):
        return markup([el("div", f"{key}: ", _value(item)) for key, item in value.items()]) if value else "–"
    return str(value) or "–"
