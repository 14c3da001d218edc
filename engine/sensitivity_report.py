"""What a sensitivity run leaves: `sensitivity.json`, which `--config` takes, the heat map, and a table in the log."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from engine.measured_log import MeasuredLog
from engine.reporting import write_json
from pruning.layerwise import PrunableLayer, config_list, tolerated
from utils.heatmap import plot_sensitivity
from utils.log import LOGGER

if TYPE_CHECKING:
    from engine.sensitivity import SensitivityOptions

SHOWN = 10  # most and least sensitive layers in the log


def write_results(options: SensitivityOptions, imgsz: int, layers: Sequence[PrunableLayer], log: MeasuredLog) -> None:
    """Write json and picture into the log's folder, and tell the table and what to do next."""
    folder, base = log.path.parent, log.header["base"]
    rows = [_row(layer, options, log) for layer in layers]
    content = {
        **asdict(options), "normalize": options.scoring.normalization, "imgsz": imgsz, **log.header["content"],
        "full": log.header["full"], "base": base, "layers": rows, "config_list": config_list(layers, [row["share"] for row in rows]),
    }  # fmt: skip
    for key in ("device", "workers"):
        del content[key]
    write_json(folder / "sensitivity.json", content)
    drops = [[cell["drop"] for cell in row["cells"]] for row in rows]
    names, shares = [_label(row) for row in rows], [row["share"] for row in rows]
    plot_sensitivity(names, options.ratios, drops, shares, base["map50"], folder / "sensitivity.png")
    LOGGER.info(table(rows, options.ratios))
    LOGGER.info(f"results: {folder / 'sensitivity.json'}\npicture: {folder / 'sensitivity.png'}")
    if not any(row["share"] for row in rows):
        LOGGER.info(f"no layer can lose a channel within --drop {options.drop:g}; --resume {folder} --drop with more writes another config")
    else:
        LOGGER.info(f"next: {_next_command(options, imgsz, str(folder / 'sensitivity.json'))}")


def _row(layer: PrunableLayer, options: SensitivityOptions, log: MeasuredLog) -> dict[str, Any]:
    """A layer in the json. `share`: the ratio up to which it alone costs no more than `drop`, 0 where that is no channel."""
    base = log.header["base"]
    cells = [
        {"ratio": r, **log.cells[layer.name, r], "drop": round(base["map50"] - log.cells[layer.name, r]["map50"], 9)}
        for r in options.ratios
    ]
    share = tolerated(options.ratios, [cell["drop"] for cell in cells], options.drop)
    share = share if share * layer.width >= 1 else 0.0
    return {"name": layer.name, "members": list(layer.members), "channels": layer.width, "share": share, "cells": cells}


def layer_list(layers: Sequence[PrunableLayer]) -> str:
    """A line per layer: its channels, and the convolutions that a shortcut ties to it."""
    lines = [f"{'layer':<22}{'channels':>9}  tied to it"]
    return "\n".join([*lines, *(f"{x.name:<22}{x.width:>9}  {', '.join(x.members[1:])}".rstrip() for x in layers)])


def table(rows: Sequence[dict[str, Any]], ratios: Sequence[float]) -> str:
    """The layers that lose most and least, by their mean loss over the ratios; all of them where they are few."""
    ranked = sorted(rows, key=lambda row: -sum(cell["drop"] for cell in row["cells"]))
    few = len(ranked) <= 2 * SHOWN
    lines = [f"{'mAP@.5 lost at':<26}{'channels':>9}" + "".join(f"{r:>8.0%}" for r in ratios) + f"{'share':>8}"]
    lines += [_line(row) for row in (ranked if few else ranked[:SHOWN])]
    if not few:
        lines += [f"... {len(ranked) - 2 * SHOWN} layers between (all are in sensitivity.json) ...", *map(_line, ranked[-SHOWN:])]
    return "\n".join(lines)


def _label(row: dict[str, Any]) -> str:
    """The layer's name, and how many others are tied to it."""
    more = len(row["members"]) - 1
    return row["name"] + (f" (+{more})" if more else "")


def _line(row: dict[str, Any]) -> str:
    return f"{_label(row):<26}{row['channels']:>9}" + "".join(f"{cell['drop']:>8.3f}" for cell in row["cells"]) + f"{row['share']:>8.1%}"


def _next_command(o: SensitivityOptions, imgsz: int, config: str) -> str:
    """Prune as was measured: the same judging, the layers' shares from the json (what was excluded is in none of its entries)."""
    words = [
        "python slim_prune.py --weights",
        o.weights,
        *(["--cfg", o.cfg] if o.cfg else []),
        *(["--dialect", o.dialect] if o.dialect != "auto" else []),
    ]
    words += ["--data", o.data, f"--img {imgsz}"]
    words += [f"--config {config} --criterion {o.criterion}", *([f"--normalize {o.normalize}"] if o.normalize else [])]
    words += [f"--equalize {o.equalize}"] if o.equalize != "union" else []
    words += [f"--recalibrate {o.recalibrate}"] if o.recalibrate else []
    return " ".join(words)
