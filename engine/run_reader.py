"""What a finished run says about its network: reads the folders that pruning, training and validation leave behind."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from engine.options import TrainOptions
from engine.verdict import final_stage
from utils.data_config import REPOSITORY
from utils.errors import InputError
from utils.files import megabytes

FIGURES = ("map50", "map", "params", "flops")
UNKNOWN = ("params", "flops")  # may be null: val.py does not know them of an exported model
_WANTED = "a run of prune.py and its like (report.json), of train.py and its like, or of val.py (metrics.json)"


@dataclass(frozen=True)
class RunFigures:
    """A network as one run measured it.

    flops: of one image at `imgsz`; they and params are None of an exported model.  latency_ms: size -> milliseconds, as far as the run wrote
    them.  checkpoint: its weights where they are still there.  source: the weights that the run started from.  data, imgsz: None where an
    older run does not say.
    """

    label: str
    folder: Path
    kind: str
    map50: float
    map: float
    params: int | None
    flops: int | None
    images: int | None = None
    instances: int | None = None
    size_mb: float | None = None
    latency_ms: Mapping[str, float] = field(default_factory=dict)
    checkpoint: Path | None = None
    source: str = ""
    data: str | None = None
    imgsz: int | None = None


def read_run(path: str | Path) -> tuple[RunFigures, RunFigures | None]:
    """The network that the run in folder `path` ended with, and of a pruning run the one it began with. A file of a run stands for its folder.

    Raises `InputError` naming the folder where it is no finished run.
    """
    path = Path(path)
    folder = path.parent if path.is_file() else path
    if not folder.is_dir():
        raise InputError(f"RUN: no folder {path}; give {_WANTED}")
    if (folder / "report.json").is_file():
        return _pruned(folder, _read(folder / "report.json"))
    if (folder / "metrics.json").is_file():
        metrics = _read(folder / "metrics.json")
        return (_trained if (folder / "opt.yaml").is_file() else _validated)(folder, metrics), None
    unfinished = " (this training has not finished; train.py --resume completes it)" if (folder / "opt.yaml").is_file() else ""
    raise InputError(f"RUN: {folder} holds neither report.json nor metrics.json{unfinished}; give {_WANTED}")


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds no figures of a run")
    return content


def _figures(path: Path, stage: Mapping[str, Any]) -> dict[str, Any]:
    lacking = [
        key for key in FIGURES if not isinstance(stage.get(key), (int, float)) and not (key in UNKNOWN and stage.get(key, "") is None)
    ]
    if lacking and "accuracy_top1" in stage:
        raise InputError(f"{path}: the figures of a classifier; detectors are compared here, by their mAP")
    if lacking:
        raise InputError(f"{path}: has no {', '.join(lacking)}; it is not what a run writes, or from a version that is too old")
    return {key: stage[key] for key in FIGURES} | {key: stage.get(key) for key in ("images", "instances")}


def _pruned(folder: Path, report: dict[str, Any]) -> tuple[RunFigures, RunFigures | None]:
    path, stage = folder / "report.json", final_stage(report)
    if stage is None:
        raise InputError(f"{path}: has no stages `before` and `pruned`")
    weights = str(report.get("weights", ""))
    pair = report.get("pair") or ["", ""]
    common = {"folder": folder, "data": report.get("data"), "imgsz": report.get("imgsz")}

    def row(stage: str, label: str, kind: str, checkpoint: str, source: str) -> RunFigures:
        s = report[stage]
        found = locate(checkpoint, folder)
        extra = {"size_mb": s.get("size_mb"), "latency_ms": s.get("latency_ms") or {}, "checkpoint": found, "source": source}
        return RunFigures(label=label, kind=kind, **common, **_figures(path, s), **extra)

    after = row(stage, folder.name, "pruned", str(pair[-1]), weights)
    return after, row("before", f"{_short(weights)} (before)", "before", weights, "")


def _short(weights: str) -> str:
    """A name for a checkpoint: the run's where it lies in one, else the file's."""
    path = Path(weights)
    return path.parent.parent.name if path.parent.name == "weights" and path.parent.parent.name else path.stem or "network"


def _trained(folder: Path, metrics: dict[str, Any]) -> RunFigures:
    try:
        saved = yaml.safe_load((folder / "opt.yaml").read_text(encoding="utf-8"))
        options = TrainOptions.from_saved(saved)
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise InputError(f"{folder / 'opt.yaml'}: cannot be read ({str(error).splitlines()[0]})") from None
    names = ("best.pt", "last.pt") if options.sr is None else ("last.pt",)  # the one whose figures the run wrote
    found = next((p for name in names if (p := folder / "weights" / name).is_file()), None)
    kind = "trained sparsely" if options.sr is not None else "fine-tuned" if options.strict else "trained"
    return RunFigures(
        label=folder.name, folder=folder, kind=kind, checkpoint=found, size_mb=megabytes(found) if found else None,
        source=options.weights, data=options.data, imgsz=options.imgsz, **_figures(folder / "metrics.json", metrics),
    )  # fmt: skip


def _validated(folder: Path, metrics: dict[str, Any]) -> RunFigures:
    weights = str(metrics.get("weights") or "")
    found = locate(weights, folder)
    return RunFigures(
        label=folder.name, folder=folder, kind="validated", checkpoint=found, size_mb=megabytes(found) if found else None, source=weights,
        data=metrics.get("data"), imgsz=metrics.get("imgsz"), **_figures(folder / "metrics.json", metrics),
    )  # fmt: skip


def locate(path: str, folder: Path) -> Path | None:
    """The file that a run in `folder` wrote down as `path`: as it stands, from the repository, from a folder above the run (where the run was
    started), or, for a run that was moved, beside its other files; None where it is gone."""
    if not path:
        return None
    above = folder.resolve().parents
    candidates = (Path(path), REPOSITORY / path, *(parent / path for parent in above), folder / Path(path).name)
    return next((c.resolve() for c in candidates if c.is_file()), None)
