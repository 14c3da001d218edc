"""Iterative backbone pruning: rounds of pruning and fine-tuning in one run folder, which a killed run goes on from.

`RUN/rounds.json` holds the options; `RUN/round{r}/prune` and `RUN/round{r}/train` are a pruning run and a training run like any other, and say by
themselves whether they are finished: the one by its report, the other by the stripped `last.pt`.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from engine.backbone_run import BackboneOptions, prune_backbone
from engine.options import TrainOptions
from engine.prune_run import PruneOptions
from engine.reporting import write_json
from engine.session import resume, train
from models.checkpoint import load_model
from utils.errors import InputError
from utils.files import existing, make_folder, run_folder
from utils.hyp import read_hyp
from utils.log import LOGGER


@dataclass(frozen=True)
class RoundOptions:
    """`backbone`: the first round's pruning; the others prune what the round before trained. `epochs`: of each round's fine-tuning.
    `training`: everything else about it; its data, weights, epochs and folder are set here."""

    backbone: BackboneOptions
    epochs: tuple[int, ...]
    training: TrainOptions

    def __post_init__(self) -> None:
        if not self.epochs or min(self.epochs) < 1:
            raise InputError(f"--epochs-per-round {' '.join(map(str, self.epochs))}: each round needs at least one epoch")
        if self.backbone.run.dry_run:
            raise InputError("--dry-run shows one pruning; leave --rounds out with it")


def epochs_of(rounds: int, given: tuple[int, ...]) -> tuple[int, ...]:
    """The epochs of each of `rounds` rounds; one number stands for all."""
    if rounds < 1:
        raise InputError(f"--rounds {rounds}: must be at least 1")
    if len(given) not in (1, rounds):
        raise InputError(f"--epochs-per-round: {len(given)} numbers for {rounds} rounds; give one for all, or one each")
    return given * rounds if len(given) == 1 else given


def run_rounds(options: RoundOptions) -> Path:
    """Prune and fine-tune round by round, in a new run folder; return it."""
    o = options.backbone.run
    read_hyp(options.training.hyp)
    folder = make_folder(run_folder(o.project, o.name, o.exist_ok))
    write_json(folder / "rounds.json", {"options": asdict(options), "rounds": []})
    try:
        _pruned(folder / "round1", o.weights, options, first=True)
    except InputError:  # as a single pruning does, leave nothing behind
        (folder / "rounds.json").unlink()
        with suppress(OSError):
            folder.rmdir()
        raise
    return _go_on(folder, options)


def resume_rounds(path: str | Path) -> Path:
    """Go on with the run whose folder is `path` from where it was cut off."""
    folder = Path(path)
    file = existing(folder / "rounds.json" if folder.is_dir() else folder, "--resume")
    try:
        options = _options(json.loads(file.read_text(encoding="utf-8"))["options"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"--resume {file}: is no rounds.json of this script ({error})") from None
    return _go_on(file.parent, options)


def _options(saved: dict[str, Any]) -> RoundOptions:
    backbone = saved["backbone"]
    run = PruneOptions(**{**backbone["run"], "exclude": tuple(backbone["run"]["exclude"])})
    training = TrainOptions.from_saved(saved["training"])
    return RoundOptions(BackboneOptions(**{**backbone, "run": run}), tuple(saved["epochs"]), training)


def _go_on(folder: Path, options: RoundOptions) -> Path:
    weights = options.backbone.run.weights
    rows: list[dict[str, Any]] = []
    for number, epochs in enumerate(options.epochs, start=1):
        LOGGER.info(f"round {number} of {len(options.epochs)}")
        place = folder / f"round{number}"
        pruned = _pruned(place, weights, options, first=number == 1)
        weights = str(_trained(place, pruned, epochs, options))
        rows.append(_row(place, number))
        write_json(folder / "rounds.json", {"options": asdict(options), "rounds": rows})
    LOGGER.info(_table(rows))
    LOGGER.info(f"weights: {weights}\nresults saved to {folder}")
    return folder


def _pruned(place: Path, weights: str, options: RoundOptions, first: bool) -> str:
    """The round's pruned weights, made now where they are not there whole."""
    report = place / "prune" / "report.json"
    if not report.exists():
        b = options.backbone
        run = replace(b.run, weights=weights, project=str(place), name="prune", exist_ok=True)
        # Only the first round maps a backbone into a detector; after it there is one.
        prune_backbone(replace(b, run=run) if first else replace(b, run=replace(run, cfg=""), into=""))
    return json.loads(report.read_text(encoding="utf-8"))["pair"][1]


def _trained(place: Path, pruned: str, epochs: int, options: RoundOptions) -> Path:
    """The round's fine-tuned weights, trained now as far as they are not."""
    folder = place / "train" / "weights"
    last = folder / "last.pt"
    state = load_model(last).training if last.exists() else None
    if not last.exists():
        o = options.training
        train(
            replace(
                o,
                data=options.backbone.run.data,
                weights=pruned,
                strict=True,
                epochs=epochs,
                project=str(place),
                name="train",
                exist_ok=True,
            )
        )
    elif state is not None:
        resume(last, options.training.device, options.training.workers)
    return folder / "best.pt" if (folder / "best.pt").exists() else last


def _row(place: Path, number: int) -> dict[str, Any]:
    report = json.loads((place / "prune" / "report.json").read_text(encoding="utf-8"))
    tuned = json.loads((place / "train" / "metrics.json").read_text(encoding="utf-8"))
    key = "accuracy_top1" if "accuracy_top1" in tuned else "map50"
    cut = report.get("recalibrated", report["pruned"])
    return {
        "round": number, "measure": key, "before": report["before"][key], "pruned": cut[key], "tuned": tuned[key],
        "params": tuned["params"], "flops": tuned["flops"],
    }  # fmt: skip


def _table(rows: list[dict[str, Any]]) -> str:
    name = {"map50": "mAP@.5", "accuracy_top1": "top-1"}[rows[0]["measure"]]
    lines = [f"{'round':>5}{name + ' before':>16}{'pruned':>10}{'fine-tuned':>12}{'parameters':>13}{'GFLOPs':>9}"]
    lines += [
        f"{r['round']:>5}{r['before']:>16.4f}{r['pruned']:>10.4f}{r['tuned']:>12.4f}{r['params']:>13,}{r['flops'] / 1e9:>9.4g}"
        for r in rows
    ]
    return "\n".join(lines)
