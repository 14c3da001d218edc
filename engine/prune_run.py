"""A pruning run: any checkpoint in, a cfg + weights pair and a report out.

`prepare` loads and checks what every pruning script needs, the script makes a `Cut`, `finish` proves it, measures it and writes it. `run` is the
path of the scripts that prune channels, which differ in their policy alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from engine.cut import Cut, channel_cut, cost_line
from engine.html_report import HtmlReport, next_commands, write_html
from engine.latency_budget import select_for_latency
from engine.latency_model import LayerTimes, network_ms
from engine.prune_bench import Bench, check_oracle, make_bench, stage_table
from engine.recalibrate import recalibrate, training_batches
from engine.reporting import write_json
from engine.samples import sample_pairs
from engine.scoring import CalibrationData, Scoring, score_model
from models.blocks import Blocks, image_multiple
from models.cfg import write_cfg
from models.checkpoint import Model, load_model, require_detector, require_float, save_model, with_batch_norms
from models.network import fuse
from pruning.budget import Budgeted, Target, cost_of, select_for, shown
from pruning.criteria import Scores, gamma_scores
from pruning.plan import LayerPlan, read_plan
from pruning.policy import PrunePolicy, Selector, keep_reason
from pruning.spaces import KeepReason, Spaces, find_spaces
from utils import plots
from utils.device import select_device
from utils.errors import InputError
from utils.files import check_place, make_folder, run_folder, write_text
from utils.flags import multiple
from utils.log import LOGGER


@dataclass(frozen=True)
class PruneOptions:
    """What every pruning run is started with. `prefix` begins the names of the files it writes; `imgsz` None: the size the checkpoint was
    trained at; `recalibrate`: on how many training batches batch norm statistics are re-estimated after the cut; `dry_run`: decide and
    tell, measure and write nothing."""

    weights: str
    data: str
    prefix: str
    cfg: str = ""
    imgsz: int | None = None
    batch_size: int = 16
    device: str = ""
    workers: int = 8
    exclude: tuple[str, ...] = ()
    recalibrate: int = 0
    dry_run: bool = False
    project: str = "runs/prune"
    name: str = "exp"
    exist_ok: bool = False
    dialect: str = "auto"

    def __post_init__(self) -> None:
        if self.recalibrate < 0:
            raise InputError(f"--recalibrate {self.recalibrate}: a number of batches, at least 0")


@dataclass(frozen=True)
class ChannelOptions:
    """How channels are judged and how many go: by the policy's percentage, by the file `config`, or down to a `target`."""

    policy: PrunePolicy
    scoring: Scoring = Scoring()
    config: str = ""
    target: Target | None = None


@dataclass(frozen=True)
class Job:
    """A loaded checkpoint and how it is run. `bench` is None in a dry run, which looks at no images. `teacher`: the checkpoint that the
    pruned one can be fine-tuned with; empty where there is none."""

    options: PruneOptions
    model: Model
    device: torch.device
    imgsz: int
    bench: Bench | None
    teacher: str = ""

    @property
    def calibration(self) -> CalibrationData:
        """Where training images come from."""
        o = self.options
        return CalibrationData(o.data, self.imgsz, o.batch_size, self.device, o.workers)


def prepare(options: PruneOptions) -> Job:
    """Load the checkpoint and the validation data; raise `InputError` for whatever does not fit."""
    model = require_detector(load_model(options.weights, options.cfg or None, options.dialect), options.weights)
    return job_for(options, with_batch_norms(require_float(model, options.weights), options.weights), str(options.weights))


def job_for(options: PruneOptions, model: Model, teacher: str) -> Job:
    """The job of a detector that is loaded already."""
    device = select_device(options.device)
    imgsz = multiple(options.imgsz or model.imgsz, image_multiple(model.blocks))
    bench = None
    if not options.dry_run:
        check_place(options.project)
        bench = make_bench(model, options.weights, options.data, imgsz, options.batch_size, device, options.workers)
    return Job(options, model, device, imgsz, bench, teacher)


def run(options: PruneOptions, channels: ChannelOptions) -> Path | None:
    """Prune channels; return the run folder (None in a dry run)."""
    job = prepare(options)
    return finish(job, select_cut(job, channels))


def select_cut(job: Job, channels: ChannelOptions) -> Cut:
    """Judge the channels, select by policy, config or budget, and cut."""
    blocks, policy = job.model.blocks, channels.policy
    spaces = excluding(find_spaces(blocks), blocks, job.options.exclude)
    if channels.config:
        plan = read_plan(channels.config, blocks)
        spaces, policy = spaces.keeping(plan.excluded, KeepReason.EXCLUDED), replace(policy, plan=plan)
    scores = score_model(job.model, channels.scoring, job.calibration)
    if policy.plan:
        _check_plan(policy.plan, spaces, scores, policy, blocks, channels.config)
    selector = Selector(spaces, scores, policy)
    told, report = [], {}
    if channels.target is None:
        selection = selector.select()
    else:
        found, more = _within(job, selector, channels.target)
        selection, policy = found.selection, policy.scaled(found.amount)
        told, report = [_budget_line(channels.target, found, more)], {"budget": _budget_report(channels.target, found) | more}
    cut = channel_cut(job.model, spaces, scores, policy, selection)
    scoring = channels.scoring
    judged = f"criterion {scoring.criterion}, normalised by {scoring.normalization}; groups decide by {policy.equalize}"
    chosen = {"criterion": scoring.criterion, "normalize": scoring.normalization, "equalize": policy.equalize, "config": channels.config}
    threshold = cut.threshold if (scoring.criterion, scoring.normalization) == ("gamma", "none") else None
    return replace(cut, lines=(*cut.lines, judged, *told), threshold=threshold, report={**chosen, **cut.report, **report})


def excluding(spaces: Spaces, blocks: Blocks, patterns: tuple[str, ...]) -> Spaces:
    """Keep whole what `--exclude` names; raise `InputError` for a pattern that matches nothing prunable."""
    for pattern in patterns:
        if all(a.keep == b.keep for a, b in zip(spaces.spaces, spaces.excluding(blocks, (pattern,)).spaces)):
            raise InputError(f"--exclude {pattern}: matches no prunable convolution; names look like model.4.cv1 or model.4.m.*")
    return spaces.excluding(blocks, patterns) if patterns else spaces


def _check_plan(plan: LayerPlan, spaces: Spaces, scores: Scores, policy: PrunePolicy, blocks: Blocks, source: str) -> None:
    """An entry all of whose layers must stay whole asks for what cannot be."""
    for number, quota in enumerate(plan.quotas):
        own = {i for i, q in plan.assigned.items() if q == number}
        reasons = (
            {s: keep_reason(s, scores, policy) for s in spaces.spaces if own & {*s.producers, *(b for b, _ in s.members)}} if own else {}
        )
        if reasons and all(reasons.values()):
            why = sorted({reason.value for reason in reasons.values()})
            why += ["--equalize union prunes groups too"] * (KeepReason.SHORTCUT in reasons.values())
            names = ", ".join(blocks[i].name for i in sorted(own)[:3])
            raise InputError(f"--config {source} entry {quota.entry}: every layer that it names stays whole ({names}: {'; '.join(why)})")


def _within(job: Job, selector: Selector, target: Target) -> tuple[Budgeted, dict[str, float]]:
    """What the search found; for latencies also what was `predicted`, the full network's `before`, and the number of searches."""
    blocks = job.model.blocks
    if target.what != "latency":
        cost = cost_of(target.what, job.imgsz)
        return select_for(blocks, selector, cost, target.of(cost(blocks))), {}
    table = LayerTimes.measure(blocks, job.imgsz, job.device)
    before = table.predict(blocks)  # calibrated: its measured time
    result = select_for_latency(
        blocks, selector, table.predict, lambda narrow: network_ms(narrow, job.imgsz, job.device), target.of(before)
    )
    return result.found, {"before": before, "predicted": result.predicted, "searches": result.rounds}


def _budget_line(target: Target, found: Budgeted, more: Mapping[str, float]) -> str:
    off = found.cost / found.wanted - 1
    line = f"budget: {shown(target.what, found.cost)} of {shown(target.what, found.wanted)} wanted ({off:+.2%})"
    if more:
        line = f"{line}, measured; the layers predicted {more['predicted']:.2f} ms; the full network takes {more['before']:.2f} ms"
    return f"{line}; this is the nearest reachable: {found.reason}" if found.reason else line


def _budget_report(target: Target, found: Budgeted) -> dict[str, object]:
    return {"what": target.what, "wanted": found.wanted, "reached": found.cost, "amount": found.amount, "reason": found.reason}


def finish(job: Job, cut: Cut) -> Path | None:
    """Tell the decision; then, unless this is a dry run, prove the cut on real images, measure every stage and write pair and report.

    Nothing is written before the masked network was shown to equal the pruned one.
    """
    options, model, bench = job.options, job.model, job.bench
    for line in (*cut.lines, cost_line(model.blocks, cut.blocks, job.imgsz)):
        LOGGER.info(line)
    if bench is None:
        LOGGER.info("dry run: nothing was measured or written")
        return None
    pruned = replace(model, blocks=cut.blocks, state=dict(cut.state), training=None, epoch=-1, best_fitness=0.0, imgsz=job.imgsz)
    oracle = check_oracle(cut.masked, pruned.network(), model.network(), bench)
    bench.measure("before", fuse(model.network()), model.blocks)
    bench.measure("gamma_zero", fuse(replace(model, state=dict(cut.gamma_zero)).network()), model.blocks)
    bench.measure("masked", cut.masked, model.blocks)
    bench.measure("pruned", fuse(pruned.network()), cut.blocks)
    if options.recalibrate:
        pruned = _recalibrated(job, pruned)
        bench.measure("recalibrated", fuse(pruned.network()), cut.blocks)
    bench.measure_cost(model, pruned)
    LOGGER.info(stage_table(bench.stages, job.imgsz))
    return _save(job, cut, pruned, bench, oracle)


def _recalibrated(job: Job, pruned: Model) -> Model:
    o = job.options
    network = pruned.network().to(job.device, memory_format=torch.channels_last)
    batches = training_batches(o.data, network, job.imgsz, o.batch_size, o.recalibrate, job.device, o.workers)
    recalibrate(network, batches)
    return replace(pruned, state={k: v.cpu() for k, v in network.state_dict().items()})


def _save(job: Job, cut: Cut, pruned: Model, bench: Bench, oracle: Mapping[str, float]) -> Path:
    options = job.options
    folder = make_folder(run_folder(options.project, options.name, options.exist_ok))
    stem = options.prefix + Path(options.cfg or options.weights).stem
    cfg, weights = folder / f"{stem}.cfg", folder / f"{stem}.pt"
    write_text(cfg, write_cfg(pruned.blocks))
    save_model(weights, pruned)
    commands = next_commands(weights, cfg, options.data, bench.imgsz, job.teacher)
    report = {
        "weights": str(options.weights), "data": str(options.data), "pair": [str(cfg), str(weights)], "imgsz": bench.imgsz,
        "exclude": list(options.exclude), "recalibrate": options.recalibrate, **cut.report,
        **bench.stages, "oracle": oracle, "layers": [vars(x) for x in cut.layers], "commands": [vars(c) for c in commands],
    }  # fmt: skip
    write_json(folder / "report.json", report)
    plots.plot_widths([x.name for x in cut.layers], [x.before for x in cut.layers], [x.after for x in cut.layers], folder / "widths.png")
    plots.plot_gamma_before_after(_all_gammas(job.model), _all_gammas(pruned), cut.threshold, folder / "gammas.png")
    samples = sample_pairs(job.model.network(), pruned.network(), bench.labels, pruned.names, bench.imgsz, device=job.device)
    gammas = [{m.blocks[i].name: g for i, g in gamma_scores(m.blocks, m.state).items()} for m in (job.model, pruned)]
    write_html(folder / "report.html", HtmlReport(stem, report, pruned.names, *gammas, samples, commands))
    LOGGER.info(f"pair: {cfg}\n      {weights}\nreport and pictures: {folder}; to look at: {folder / 'report.html'}")
    tuned = f" --distill --t_weight {job.teacher}" if job.teacher else ""
    LOGGER.info(f"next: python finetune_pruned.py --weights {weights} --data {options.data} --img {bench.imgsz}{tuned}")
    return folder


def _all_gammas(model: Model) -> np.ndarray:
    return np.concatenate(list(gamma_scores(model.blocks, model.state).values()))
