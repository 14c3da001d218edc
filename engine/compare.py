"""Several runs in one table and picture: accuracy against FLOPs and latency. Which run began from which is found where their files say so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from engine.latency import latency_ms
from engine.reporting import write_json
from engine.run_reader import RunFigures, locate, read_run
from engine.verdict import change
from models.blocks import Blocks
from models.checkpoint import load_model
from models.network import fuse
from utils.device import select_device
from utils.errors import InputError
from utils.files import make_folder, run_folder, write_text
from utils.html import Child, el, markup, number, page, picture_file, table
from utils.log import LOGGER
from utils.pareto import Panel, pareto_front, plot_comparison

DEFAULT_SIZE = 640  # latency is measured at this size where a run does not say its own


@dataclass(frozen=True)
class CompareOptions:
    """`latency`: measure all checkpoints in turns; otherwise the runs' own figures are shown where they have any. `before`: a row for the
    network that a pruning run began with, where no run given stands for it."""

    runs: tuple[str, ...]
    names: tuple[str, ...] = ()
    latency: bool = True
    before: bool = True
    device: str = ""
    project: str = "runs/compare"
    name: str = "exp"
    exist_ok: bool = False


@dataclass(frozen=True)
class Row:
    """One line of the table. `origin`: the label of the run it began from, or its weights. `ms`: at `ms_size` pixels; `ms_together`: measured here,
    in turns with the others."""

    run: RunFigures
    origin: str
    ms: float | None
    ms_size: int | None
    ms_together: bool


def compare(options: CompareOptions) -> Path:
    """Write `compare.json`, `compare.md`, `compare.png` and `compare.html`, print the table; return the folder."""
    if options.names and len(options.names) != len(options.runs):
        raise InputError(f"--names: {len(options.names)} names for {len(options.runs)} runs; give one for each, in the same order")
    runs = _gather(options)
    origins = [_origin(run, runs) for run in runs]
    measured = _measure(runs, select_device(options.device)) if options.latency else {}
    rows = [Row(run, origin, *_latency(run, measured.get(i))) for i, (run, origin) in enumerate(zip(runs, origins))]
    warnings = mismatches(runs)
    folder = make_folder(run_folder(options.project, options.name, options.exist_ok))
    head, body = cells(rows)
    notes = [*warnings, *_notes(rows)]
    LOGGER.info(_aligned(head, body))
    for note in notes:
        LOGGER.info(note)
    write_json(folder / "compare.json", {"rows": _plain(rows), "notes": notes})
    write_text(folder / "compare.md", _markdown(head, body, notes))
    _draw(rows, folder / "compare.png")
    write_text(folder / "compare.html", _html(rows, head, body, notes, folder / "compare.png"))
    LOGGER.info(f"results saved to {folder}; to look at: {folder / 'compare.html'}")
    return folder


# Which rows, and where they come from


def _gather(options: CompareOptions) -> list[RunFigures]:
    """The runs in the order given; before a pruning run the network it began with, unless it is among them."""
    pairs = [read_run(path) for path in options.runs]
    labels = options.names or _labels([run.folder for run, _ in pairs])
    given = [replace(run, label=label) for (run, _), label in zip(pairs, labels)]
    known = {run.checkpoint for run in given if run.checkpoint}
    rows: list[RunFigures] = []
    for run, (_, before) in zip(given, pairs):
        own = before and before.checkpoint or before and before.label
        if options.before and before and own not in known:
            known.add(own)
            rows.append(before)
        rows.append(run)
    return rows


def _labels(folders: Sequence[Path]) -> list[str]:
    """The folders' names, with as many of the folders above as tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    depth = 1
    while len({p[-depth:] for p in parts}) < len(set(parts)):
        depth += 1
    return ["/".join(p[-depth:]) for p in parts]


def _origin(run: RunFigures, runs: Sequence[RunFigures]) -> str:
    """Whose weights a run began with: the label of the row that has them, else the weights as they were written down."""
    found = locate(run.source, run.folder)
    for other in runs:
        if (
            other is not run
            and found
            and (found == other.checkpoint or (other.kind != "before" and other.folder.resolve() in found.parents))
        ):
            return other.label
    return run.source


def mismatches(runs: Sequence[RunFigures]) -> list[str]:
    """A line for each reason why the runs' mAPs do not compare: other data, or another size."""
    lines = []
    for what, values in (
        ("data", [(Path(r.data).name if r.data else None, r.images, r.instances) for r in runs]),
        ("image sizes", [r.imgsz for r in runs]),
    ):
        groups: dict[Any, list[str]] = {}
        for run, value in zip(runs, values):
            groups.setdefault(value, []).append(run.label)
        known = {v: names for v, names in groups.items() if v is not None and (not isinstance(v, tuple) or v[1] is not None)}
        if what == "data" and len({v[1:] for v in known}) < 2 and len({v[0] for v in known} - {None}) < 2:
            continue  # a run that does not name its data is told from the others by its counts
        if len(known) > 1:
            each = "; ".join(f"{_named(v)}: {', '.join(names)}" for v, names in known.items())
            lines.append(f"warning: mAPs are not comparable, the runs were measured on different {what} ({each})")
    return lines


def _named(value: Any) -> str:
    if isinstance(value, tuple):
        return f"{value[0] or 'unnamed data'} with {value[1]} images and {value[2]} objects"
    return f"{value} px"


# Latency


def _measure(runs: Sequence[RunFigures], device: torch.device) -> dict[int, tuple[float, int]]:
    """(milliseconds, size) of each run whose checkpoint is there; those of one size are measured in turns, equal structures once, since
    weights do not change the time."""
    kinds: dict[int, dict[Blocks, list[int]]] = {}
    for i, run in enumerate(runs):
        if run.checkpoint and not _exported(run):
            blocks = tuple(replace(block, anchors=()) for block in load_model(run.checkpoint).blocks)
            kinds.setdefault(run.imgsz or DEFAULT_SIZE, {}).setdefault(blocks, []).append(i)
    measured: dict[int, tuple[float, int]] = {}
    for size, structures in kinds.items():
        LOGGER.info(f"measuring the latency of {len(structures)} structures at {size} px, in turns")
        networks = {
            str(members[0]): fuse(load_model(runs[members[0]].checkpoint).network()).to(device, memory_format=torch.channels_last)
            for members in structures.values()
        }
        times = latency_ms(networks, size, device)
        measured |= {i: (times[str(members[0])], size) for members in structures.values() for i in members}
    return measured


def _exported(run: RunFigures) -> bool:
    """Whether val.py ran an exported model, of which torch has no network to measure."""
    return run.params is None


def _latency(run: RunFigures, measured: tuple[float, int] | None) -> tuple[float | None, int | None, bool]:
    """(ms, size, measured together) of a row: what was measured now, else what the run wrote at its own size."""
    if measured:
        return *measured, True
    recorded = run.latency_ms.get(str(run.imgsz))
    return (recorded, run.imgsz, False) if recorded is not None else (None, None, False)


def _notes(rows: Sequence[Row]) -> list[str]:
    notes = []
    apart = [r.run.label for r in rows if r.ms is not None and not r.ms_together]
    if apart:
        notes.append(f"latency of {', '.join(apart)} is from the run itself: figures of different processes differ by chance")
    exported = [r.run.label for r in rows if _exported(r.run)]
    if exported:
        notes.append(
            f"of {', '.join(exported)}, exported models, parameters, FLOPs and latency are not known; benchmarks/latency.py times exports"
        )
    gone = [r.run.label for r in rows if r.run.checkpoint is None and not _exported(r.run)]
    if gone:
        notes.append(f"no latency could be measured for {', '.join(gone)}: the weights are not where the run says")
    return notes


# The table and the picture


def cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """The table as text: header, and per row what it is, its figures, and in brackets how they differ from the first row's."""
    sizes = {r.ms_size for r in rows if r.ms is not None}
    ms = f"ms at {next(iter(sizes))} px" if len(sizes) == 1 else "ms"
    columns = [
        ("mAP@.5", lambda r: r.run.map50, "{:.4f}", True),
        ("mAP@.5:.95", lambda r: r.run.map, "{:.4f}", True),
        ("parameters", lambda r: r.run.params, "{:,}", False),
        ("GFLOPs", lambda r: _cost(r, "flops"), "{:.4g}", False),
        ("MB", lambda r: r.run.size_mb, "{:.2f}", False),
        (ms, lambda r: r.ms, "{:.2f}", False),
    ]
    body = []
    for i, row in enumerate(rows):
        line = [row.run.label, row.run.kind, row.origin]
        for title, value, form, absolute in columns:
            old, new = value(rows[0]), value(row)
            text = "–" if new is None else form.format(new)
            if title == "ms" and new is not None:
                text += f" at {row.ms_size} px"
            if i and old is not None and new is not None and (title != "ms" or row.ms_size == rows[0].ms_size):
                text += f" ({change(old, new, absolute)})"
            line.append(text)
        body.append(line)
    return ["run", "what", "from", *(c[0] for c in columns)], body


def _aligned(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [head, *body]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(f"{cell:<{w}}" if i < 3 else f"{cell:>{w}}" for i, (cell, w) in enumerate(zip(line, widths))).rstrip() for line in lines
    )


def _markdown(head: Sequence[str], body: Sequence[Sequence[str]], notes: Sequence[str]) -> str:
    def line(parts: Sequence[str]) -> str:
        return "| " + " | ".join(part.replace("|", "\\|") for part in parts) + " |"

    rule = "|" + "---|" * 3 + "---:|" * (len(head) - 3)
    return "\n".join([line(head), rule, *map(line, body)]) + "\n" + "".join(f"\n{note}\n" for note in notes)


def _plain(rows: Sequence[Row]) -> list[dict[str, Any]]:
    fronts = {what: _front(rows, what) for what in ("flops", "ms")}
    return [
        {
            **{k: str(v) if isinstance(v, Path) else v for k, v in asdict(r.run).items()}, "from": r.origin, "ms": r.ms, "ms_size": r.ms_size,
            "ms_together": r.ms_together, "on_front": [what for what, front in fronts.items() if i in front],
        }
        for i, r in enumerate(rows)
    ]  # fmt: skip


def _cost(row: Row, what: str) -> float | None:
    if what == "ms" or row.run.flops is None:
        return row.ms if what == "ms" else None
    return row.run.flops / 1e9


def _front(rows: Sequence[Row], what: str) -> list[int]:
    known = [i for i, row in enumerate(rows) if _cost(row, what) is not None]
    return [known[j] for j in pareto_front([_cost(rows[i], what) for i in known], [rows[i].run.map50 for i in known])]


def _draw(rows: Sequence[Row], path: Path) -> None:
    panels = [
        Panel("mAP@.5 against FLOPs", "GFLOPs at the size of the run", [_cost(r, "flops") for r in rows]),
        Panel("mAP@.5 against latency", "ms per image", [_cost(r, "ms") for r in rows]),
    ]
    plot_comparison([r.run.label for r in rows], [r.run.map50 for r in rows], panels, "mAP@.5", path)


def _html(rows: Sequence[Row], head: Sequence[str], body: Sequence[Sequence[str]], notes: Sequence[str], picture: Path) -> str:
    def line(row: Row, texts: Sequence[str]) -> list[Any]:
        values = (row.run.map50, row.run.map, row.run.params, _cost(row, "flops"), row.run.size_mb, row.ms)
        return [*texts[:3], *(_figure(v, text) for v, text in zip(values, texts[3:]))]

    best = max(rows, key=lambda r: r.run.map50)
    alt = f"mAP@.5 of {len(rows)} networks against FLOPs and latency; the best is {best.run.label} with {best.run.map50:.4f}"
    lines = [line(row, texts) for row, texts in zip(rows, body)]
    return page(
        "Comparison of runs",
        el("header", el("h1", f"Comparison of {len(rows)} networks")),
        [el("p", note, class_="warn") for note in notes],
        markup(table(head, lines, "Small print: the change against the first row.", "runs")),
        el("figure", picture_file(picture, alt), el("figcaption", "Blue: no other network is better at its cost.")),
    )


def _figure(value: float | None, text: str) -> Child:
    """A figure with its change, if it has one, in small print below."""
    figure, _, moved = text.partition(" (")
    return text if value is None else markup(number(value, figure), el("small", moved.rstrip(")"), class_="soft") if moved else None)
