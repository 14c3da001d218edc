"""Backbone pruning: from a detector or a classifier, by filters, a uniform share of each backbone layer; into a detector where one is named.

A detector's neck keeps its tensors and is sliced to fit: the masks of the backbone's channel spaces reach the convolutions that read them, as in
any other pruning here. The NNI-based repository before us made the convolutions at the neck's entry anew, at random.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.classify import accuracy_metrics, evaluate_classes, validation_images, validation_loader
from engine.cut import Cut, channel_cut, cost_line
from engine.latency import latency_ms
from engine.prune_bench import check_oracle, file_mb
from engine.prune_run import PruneOptions, excluding, finish, job_for
from engine.recalibrate import recalibrate
from engine.reporting import write_json
from models.blocks import Blocks, image_multiple, is_classifier
from models.cfg import write_cfg
from models.checkpoint import Model, load_model, read_structure, require_detector, require_float, save_model, with_batch_norms
from models.network import Network, fuse, init_detect_biases
from pruning.backbone import backbone_end, backbone_plan, graft, grafted_state, method_criterion, wider_or_narrower
from pruning.criteria import scores_of
from pruning.policy import PrunePolicy, select_masks
from pruning.spaces import KeepReason, find_spaces
from utils import plots
from utils.data_config import read_data
from utils.dataset import DatasetOptions, EpochLoader, make_loader
from utils.device import Precision, evaluation_workers, select_device
from utils.errors import InputError
from utils.files import check_place, existing, make_folder, run_folder, write_text
from utils.flags import multiple
from utils.image_folder import ClassificationDataset, read_image_folders, scan_folder
from utils.log import LOGGER


@dataclass(frozen=True)
class BackboneOptions:
    """`method`: L1, L2 or FPGM; `sparsity`: of each backbone layer's channels. Of a classifier in `run.weights`: `into`, a trained detector that
    takes its backbone, or `run.cfg`, the structure of a fresh one; with neither it stays a classifier. `layers`: of the backbone, None: its own."""

    run: PruneOptions
    method: str = "L1"
    sparsity: float = 0.25
    into: str = ""
    layers: int | None = None
    min_filters: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise InputError(f"--sparsity {self.sparsity}: must be at least 0 and below 1; try 0.25")
        if self.into and self.run.cfg:
            raise InputError("--into names a trained detector and --cfg a fresh one; give one of them")
        method_criterion(self.method)


def prune_backbone(options: BackboneOptions) -> Path | None:
    """Prune as the options say; return the run folder (None in a dry run). Raises `InputError` before anything is written."""
    o = options.run
    if options.into:
        existing(options.into, "--into")
    model = load_model(o.weights) if options.into else _load(o)
    model = with_batch_norms(require_float(model, o.weights), o.weights)
    if is_classifier(model.blocks) and not options.into and not o.cfg:
        return _finish_classifier(o, model, backbone_cut(model, options))
    if options.into:
        target = require_float(require_detector(load_model(options.into), options.into), options.into)
        model, teacher = combined(model, with_batch_norms(target, options.into), options, fresh=False), options.into
        o = replace(o, weights=options.into)
    elif is_classifier(model.blocks):
        model, teacher = combined(model, _fresh(o), options, fresh=True), ""
    else:
        teacher = str(o.weights)
    return finish(job_for(o, model, teacher), backbone_cut(model, options))


def _load(o: PruneOptions) -> Model:
    """The checkpoint. `--cfg` overrides the structure of a detector; beside a classifier it is that of the detector to come."""
    model = load_model(o.weights) if Path(o.weights).suffix != ".weights" else None
    if model is not None and (not o.cfg or is_classifier(model.blocks)):
        return model
    return load_model(o.weights, o.cfg or None, o.dialect)


def _fresh(o: PruneOptions) -> Model:
    """An untrained detector for the classes of the data."""
    config = read_data(o.data, ())
    blocks = read_structure(o.cfg, config.nc, o.dialect)
    if is_classifier(blocks):
        raise InputError(f"--cfg {o.cfg}: is a classifier; name a detector, such as models/yolov5s.yaml")
    return Model(blocks, {}, config.names)


def combined(backbone: Model, detector: Model, options: BackboneOptions, fresh: bool) -> Model:
    """`detector` with the backbone of `backbone`. A `fresh` one is as wide as the backbone leaves it, and random behind it.

    Raises `InputError` where the two do not fit: other wiring, or, where the neck is trained, other widths.
    """
    into = options.run.cfg if fresh else options.into
    what = f"{options.run.weights} does not fit into {into}"
    end = backbone_end(detector.blocks, options.layers, into)
    blocks = graft(detector.blocks, end, backbone.blocks, backbone_end(backbone.blocks, options.layers, options.run.weights), what)
    network = Network(blocks)
    if fresh:
        init_detect_biases(network)
        LOGGER.info(
            f"{into}: a fresh detector; neck and head are random and have to be trained, the backbone is that of {options.run.weights}"
        )
        trained = network.state_dict()
    else:
        if differ := wider_or_narrower(detector.blocks, blocks, end):
            raise InputError(
                f"{what}: {differ}; it was pruned before, and which of the trained neck's inputs went is not known. Prune and map in one step, "
                "from the unpruned backbone, or map into a fresh detector: --cfg models/yolov5s.yaml"
            )
        LOGGER.info(f"{into}: its neck and head keep their trained tensors, the backbone's are those of {options.run.weights}")
        trained = detector.state
    state = grafted_state(network, trained, backbone.state, end)
    return replace(detector, blocks=blocks, state=state, imgsz=options.run.imgsz or detector.imgsz, training=None, epoch=-1)


def backbone_cut(model: Model, options: BackboneOptions) -> Cut:
    """The cut of the backbone's channels; the neck's filters stay, and lose the inputs that go."""
    blocks, criterion = model.blocks, method_criterion(options.method)
    end = backbone_end(blocks, options.layers, str(options.run.weights))
    plan = backbone_plan(blocks, end, options.sparsity)
    spaces = find_spaces(blocks).keeping(range(end, len(blocks)), KeepReason.NOT_BACKBONE)
    spaces = excluding(spaces, blocks, options.run.exclude)
    policy = PrunePolicy(0.0, "union", min_filters=options.min_filters, plan=plan)
    scores = scores_of(blocks, model.state, criterion)
    cut = channel_cut(model, spaces, scores, policy, select_masks(spaces, scores, policy))
    line = f"backbone: layers before {blocks[end].name}, {options.sparsity:g} of each one's channels by {options.method.upper()}"
    line += "; a group that a shortcut ties keeps what one of its members keeps"
    if not is_classifier(blocks):
        line += "; neck and head keep their filters and are sliced to fit"
    report = {"method": options.method.upper(), "criterion": criterion, "sparsity": options.sparsity, **cut.report}
    return replace(cut, lines=(*cut.lines, line), threshold=None, report=report)


# ---- classifiers ---------------------------------------------------------------------------------------------------------------


@dataclass
class _Bench:
    """The validation images of a classifier and the figures of each stage."""

    loader: EpochLoader
    precision: Precision
    imgsz: int
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)

    def measure(self, stage: str, network: Network, blocks: Blocks) -> None:
        network = network.to(self.precision.device, memory_format=torch.channels_last)
        found = evaluate_classes(network, self.loader, self.precision)
        self.stages[stage] = accuracy_metrics(found, blocks, self.imgsz)
        m = self.stages[stage]
        LOGGER.info(f"{stage:>12}: top1 {m['accuracy_top1']:.4f}  top5 {m['accuracy_top5']:.4f}")

    def measure_cost(self, before: Model, pruned: Model) -> None:
        models = {"before": before, "pruned": pruned}
        networks = {k: fuse(m.network()).to(self.precision.device, memory_format=torch.channels_last) for k, m in models.items()}
        latency = latency_ms(networks, self.imgsz, self.precision.device)
        for stage, model in models.items():
            self.stages[stage] |= {"size_mb": file_mb(model), "latency_ms": {str(self.imgsz): latency[stage]}}


def _finish_classifier(o: PruneOptions, model: Model, cut: Cut) -> Path | None:
    """As `prune_run.finish`: tell, prove, measure, write."""
    device = select_device(o.device)
    imgsz = multiple(o.imgsz or model.imgsz, image_multiple(model.blocks))
    for line in (*cut.lines, cost_line(model.blocks, cut.blocks, imgsz)):
        LOGGER.info(line)
    if o.dry_run:
        LOGGER.info("dry run: nothing was measured or written")
        return None
    check_place(o.project)
    labels = validation_images(o.data, "val", model.names, o.weights)
    workers = evaluation_workers(o.workers, device)
    bench = _Bench(validation_loader(labels, imgsz, o.batch_size, model.blocks[0].channels, workers), Precision(device), imgsz)
    pruned = replace(model, blocks=cut.blocks, state=dict(cut.state), training=None, epoch=-1, best_fitness=0.0, imgsz=imgsz)
    oracle = check_oracle(cut.masked, pruned.network(), model.network(), bench)
    bench.measure("before", fuse(model.network()), model.blocks)
    bench.measure("masked", cut.masked, model.blocks)
    bench.measure("pruned", fuse(pruned.network()), cut.blocks)
    if o.recalibrate:
        pruned = _recalibrated(o, pruned, imgsz, device)
        bench.measure("recalibrated", fuse(pruned.network()), cut.blocks)
    bench.measure_cost(model, pruned)
    return _save_classifier(o, cut, pruned, bench, oracle)


def _recalibrated(o: PruneOptions, pruned: Model, imgsz: int, device: torch.device) -> Model:
    network = pruned.network().to(device, memory_format=torch.channels_last)
    folders = read_image_folders(o.data)
    options = DatasetOptions(imgsz, batch_size=o.batch_size, channels=network.channels)
    dataset = ClassificationDataset(scan_folder(folders.folder("train"), folders.names), options)
    loader, precision = make_loader(dataset, evaluation_workers(o.workers, device), shuffle=True), Precision(device)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        every = (batch for epoch in range(o.recalibrate) for batch in loader.epoch(epoch))
        for batch in islice(every, o.recalibrate):
            yield precision.images(batch.images), batch.targets

    recalibrate(network, batches())
    return replace(pruned, state={k: v.cpu() for k, v in network.state_dict().items()})


def _save_classifier(o: PruneOptions, cut: Cut, pruned: Model, bench: _Bench, oracle: dict[str, float]) -> Path:
    folder = make_folder(run_folder(o.project, o.name, o.exist_ok))
    stem = o.prefix + Path(o.weights).stem
    cfg, weights = folder / f"{stem}.cfg", folder / f"{stem}.pt"
    write_text(cfg, write_cfg(pruned.blocks))
    save_model(weights, pruned)
    report = {
        "weights": str(o.weights), "data": str(o.data), "pair": [str(cfg), str(weights)], "imgsz": bench.imgsz, "exclude": list(o.exclude),
        "recalibrate": o.recalibrate, **cut.report, **bench.stages, "oracle": oracle, "layers": [vars(x) for x in cut.layers],
    }  # fmt: skip
    write_json(folder / "report.json", report)
    plots.plot_widths([x.name for x in cut.layers], [x.before for x in cut.layers], [x.after for x in cut.layers], folder / "widths.png")
    LOGGER.info(f"pair: {cfg}\n      {weights}\nreport and picture: {folder}")
    LOGGER.info(f"next: python finetune_pruned.py --weights {weights} --data {o.data} --img {bench.imgsz}")
    return folder
