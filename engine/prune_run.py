"""A pruning run: any checkpoint and a policy in, a cfg + weights pair and a report out. The four scripts differ in their policy alone."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.evaluate import EvaluateOptions, evaluate
from engine.latency import latency_ms
from engine.reporting import metrics_of, write_json
from models.blocks import Blocks
from models.cfg import write_cfg
from models.checkpoint import Model, load_model, save_model, with_batch_norms
from models.network import Network, fuse
from pruning.masked import largest_difference, masked_network, zero_gamma
from pruning.policy import PrunePolicy, Selection, gamma_scores, keep_reason, select_masks
from pruning.spaces import Spaces, find_spaces
from pruning.surgery import fold_constants, prune
from utils import plots
from utils.data_config import read_data
from utils.dataset import DatasetOptions, DetectionDataset, EpochLoader, make_loader
from utils.device import Precision, evaluation_workers, select_device
from utils.errors import InputError
from utils.files import make_folder, megabytes, run_folder, write_text
from utils.flags import multiple
from utils.labels import scan_labels
from utils.log import LOGGER


@dataclass(frozen=True)
class PruneOptions:
    """A pruning run. `prefix` begins the names of the files it writes; `imgsz` None: the size the checkpoint was trained at."""

    weights: str
    data: str
    policy: PrunePolicy
    prefix: str
    cfg: str = ""
    imgsz: int | None = None
    batch_size: int = 16
    device: str = ""
    workers: int = 8
    exclude: tuple[str, ...] = ()
    project: str = "runs/prune"
    name: str = "exp"
    exist_ok: bool = False


@dataclass(frozen=True)
class LayerWidth:
    """One convolution in the report; `kept` says why it could not be pruned, or is empty."""

    name: str
    before: int
    after: int
    kept: str


@dataclass
class _Bench:
    """What measures every stage alike."""

    loader: EpochLoader
    precision: Precision
    imgsz: int
    single_cls: bool
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)

    def measure(self, stage: str, network: Network, blocks: Blocks) -> None:
        """Evaluate `network`; `blocks` are its unfused ones, whose parameters and FLOPs are reported."""
        network = network.to(self.precision.device, memory_format=torch.channels_last)
        evaluation = evaluate(network, self.loader, self.precision, EvaluateOptions(single_cls=self.single_cls))
        self.stages[stage] = metrics_of(evaluation, blocks, self.imgsz)
        m = self.stages[stage]
        LOGGER.info(f"{stage:>12}: mAP@.5 {m['map50']:.4f}  mAP@.5:.95 {m['map']:.4f}")


def run(options: PruneOptions) -> Path:
    """Prune; return the run folder. Nothing is written before the masked network was shown to equal the pruned one."""
    model = with_batch_norms(load_model(options.weights, options.cfg or None), options.weights)
    device = select_device(options.device)
    blocks, state = model.blocks, model.state
    bench = _bench(options, model, device)
    spaces = _excluding(find_spaces(blocks), blocks, options.exclude)
    selection = select_masks(spaces, gamma_scores(blocks, state), options.policy)

    layers = layer_widths(blocks, spaces, selection, options.policy)
    LOGGER.info(_layer_table(layers))
    LOGGER.info(_plan(selection, options.policy, layers))
    folded = fold_constants(blocks, state, spaces, selection.mask)
    pruned_blocks, pruned_state = prune(blocks, folded, spaces, selection.mask)
    pruned = replace(model, blocks=pruned_blocks, state=pruned_state, training=None, epoch=-1, best_fitness=0.0, imgsz=bench.imgsz)
    masked = masked_network(blocks, folded, spaces, selection.mask)
    oracle = _check_oracle(masked, pruned.network(), model.network(), bench)

    bench.measure("before", fuse(model.network()), blocks)
    bench.measure("gamma_zero", fuse(replace(model, state=zero_gamma(blocks, state, spaces, selection.mask)).network()), blocks)
    bench.measure("masked", masked, blocks)
    bench.measure("pruned", fuse(pruned.network()), pruned_blocks)
    _measure_cost(bench, model, pruned)
    LOGGER.info(_stage_table(bench))
    return _save(options, model, pruned, selection, layers, bench, oracle)


def _bench(options: PruneOptions, model: Model, device: torch.device) -> _Bench:
    config = read_data(options.data, ("val",))
    single = len(model.names) == 1
    if len(config.names) != len(model.names) and not single:
        raise InputError(
            f"{options.data} has {len(config.names)} classes, {options.weights} has {len(model.names)}; use the data it was trained on"
        )
    network = model.network()
    imgsz = multiple(options.imgsz or model.imgsz, network.max_stride)
    labels = scan_labels(config.val, config.nc)
    dataset = DetectionDataset(
        labels,
        DatasetOptions(
            imgsz,
            rect=True,
            pad=0.5,
            stride=network.max_stride,
            batch_size=options.batch_size,
            single_cls=single,
            channels=network.channels,
        ),
    )
    return _Bench(make_loader(dataset, evaluation_workers(options.workers, device)), Precision(device), imgsz, single)


def _excluding(spaces: Spaces, blocks: Blocks, patterns: tuple[str, ...]) -> Spaces:
    for pattern in patterns:
        if all(a.keep == b.keep for a, b in zip(spaces.spaces, spaces.excluding(blocks, (pattern,)).spaces)):
            raise InputError(f"--exclude {pattern}: matches no prunable convolution; names look like model.4.cv1 or model.4.m.*")
    return spaces.excluding(blocks, patterns) if patterns else spaces


def layer_widths(blocks: Blocks, spaces: Spaces, selection: Selection, policy: PrunePolicy) -> list[LayerWidth]:
    """Width before and after of every convolution, with the reason where all of it had to stay."""
    reasons: dict[int, set[str]] = {}
    for space in spaces.spaces:
        reason = keep_reason(space, policy)
        for producer in space.producers:
            reasons.setdefault(producer, set()).add(reason.value if reason else "")
    return [
        LayerWidth(b.name, b.channels, int(selection.of(spaces, i).sum()), "; ".join(sorted(r for r in reasons[i] if r)))
        for i, b in enumerate(blocks)
        if b.kind == "convolutional"
    ]


def _layer_table(layers: list[LayerWidth]) -> str:
    lines = [f"{'layer':<22}{'channels':>10}{'kept':>8}{'':>7}  why it stays whole"]
    lines += [f"{x.name:<22}{x.before:>10}{x.after:>8}{x.after / x.before:>7.0%}  {x.kept}" for x in layers]
    return "\n".join(lines)


def _plan(selection: Selection, policy: PrunePolicy, layers: list[LayerWidth]) -> str:
    before, after = sum(x.before for x in layers), sum(x.after for x in layers)
    lines = [
        f"safe upper limit: {selection.safe_percent:.3f} of the {selection.pool} scores can go before a layer loses all its channels",
        f"planned: {selection.planned} of {selection.pool} scores ({policy.percent:g}), the largest of them {selection.threshold:.4g}; "
        f"achieved: {before - after} of {before} filters ({1 - after / before:.1%}) after groups, floors and rounding",
    ]
    if policy.percent > selection.safe_percent:
        lines.append(f"{policy.percent:g} is above the safe limit: layers that would be empty keep their best channels")
    return "\n".join(lines)


def _check_oracle(masked: Network, pruned: Network, original: Network, bench: _Bench) -> dict[str, float]:
    """The equality that pruning stands on, on real images: masked = pruned, while both differ from the original."""
    batch = next(iter(bench.loader.epoch(0)))
    images = Precision(torch.device("cpu")).images(batch.images[:8])
    difference, bound = largest_difference(masked, pruned, images)
    changed, _ = largest_difference(original, pruned, images)
    LOGGER.info(
        f"masked = pruned on {len(images)} images: max |difference| of the logits {difference:.2e} (bound {bound:.2e}); "
        f"the cut changed them by up to {changed:.3g}"
    )
    if not math.isfinite(changed):
        raise InputError("--weights: the network gives numbers that are not finite on your images; this checkpoint is broken")
    if not difference <= bound:
        raise RuntimeError(f"surgery is wrong: the pruned network differs from the masked one by {difference}, more than {bound}")
    return {"difference": difference, "bound": bound, "changed": changed, "images": len(images)}


def _measure_cost(bench: _Bench, model: Model, pruned: Model) -> None:
    """File size (both stripped) and latency (both fused float32, in turns) at the training size and at 640 px."""
    with TemporaryDirectory() as folder:
        for stage, m in (("before", model), ("pruned", pruned)):
            path = Path(folder) / f"{stage}.pt"
            save_model(path, replace(m, training=None))
            bench.stages[stage]["size_mb"] = megabytes(path)
    for key in ("gamma_zero", "masked"):  # both run at full width
        bench.stages[key]["size_mb"] = bench.stages["before"]["size_mb"]
    device = bench.precision.device
    networks = {k: fuse(m.network()).to(device, memory_format=torch.channels_last) for k, m in (("before", model), ("pruned", pruned))}
    measured = {size: latency_ms(networks, size, device) for size in dict.fromkeys((bench.imgsz, 640))}
    for stage, row in bench.stages.items():
        source = "pruned" if stage == "pruned" else "before"
        row["latency_ms"] = {str(size): values[source] for size, values in measured.items()}


def _stage_table(bench: _Bench) -> str:
    sizes = list(dict.fromkeys((bench.imgsz, 640)))
    head = f"{'':<12}{'mAP@.5':>9}{'mAP@.5:.95':>12}{'parameters':>13}{'GFLOPs':>9}{'file MB':>9}" + "".join(
        f"{f'ms @{s}':>10}" for s in sizes
    )
    lines = [head]
    for stage, m in bench.stages.items():
        lines.append(
            f"{stage:<12}{m['map50']:>9.4f}{m['map']:>12.4f}{m['params']:>13,}{m['flops'] / 1e9:>9.4g}{m['size_mb']:>9.2f}"
            + "".join(f"{m['latency_ms'][str(s)]:>10.2f}" for s in sizes)
        )
    before, after = bench.stages["before"], bench.stages["pruned"]
    lines.append(
        f"removed: {1 - after['params'] / before['params']:.1%} of the parameters, {1 - after['flops'] / before['flops']:.1%} of the FLOPs; "
        + ", ".join(f"{before['latency_ms'][str(s)] / after['latency_ms'][str(s)]:.2f}x as fast at {s} px" for s in sizes)
    )
    return "\n".join(lines)


def _save(
    options: PruneOptions,
    model: Model,
    pruned: Model,
    selection: Selection,
    layers: list[LayerWidth],
    bench: _Bench,
    oracle: dict[str, float],
) -> Path:
    folder = make_folder(run_folder(options.project, options.name, options.exist_ok))
    stem = options.prefix + Path(options.cfg or options.weights).stem
    cfg, weights = folder / f"{stem}.cfg", folder / f"{stem}.pt"
    write_text(cfg, write_cfg(pruned.blocks))
    save_model(weights, pruned)
    report = {
        "weights": str(options.weights), "pair": [str(cfg), str(weights)], "policy": asdict(options.policy), "imgsz": bench.imgsz,
        **bench.stages, "selection": {k: getattr(selection, k) for k in ("threshold", "safe_percent", "planned", "pool")},
        "oracle": oracle, "layers": [asdict(x) for x in layers],
    }  # fmt: skip
    write_json(folder / "report.json", report)
    plots.plot_widths([x.name for x in layers], [x.before for x in layers], [x.after for x in layers], folder / "widths.png")
    plots.plot_gamma_before_after(
        _all_gammas(model.blocks, model.state), _all_gammas(pruned.blocks, pruned.state), selection.threshold, folder / "gammas.png"
    )
    LOGGER.info(f"pair: {cfg}\n      {weights}\nreport and pictures: {folder}")
    LOGGER.info(
        f"next: python finetune_pruned.py --weights {weights} --data {options.data} --img {bench.imgsz} --distill --t_weight {options.weights}"
    )
    return folder


def _all_gammas(blocks: Blocks, state: dict[str, Tensor]) -> np.ndarray:
    return np.concatenate(list(gamma_scores(blocks, state).values()))
