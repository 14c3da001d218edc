"""A training session: from options to a finished run folder. What the three training scripts share; the loop itself is `engine/loop.py`."""

from __future__ import annotations

from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import torch
import yaml
from torch.optim import Optimizer

from engine.autobatch import largest_batch
from engine.classify import CLASSIFICATION
from engine.evaluate import EvaluateOptions, evaluate
from engine.image_weights import ImageWeights
from engine.loop import Loop, LoopOptions
from engine.objectives import DetectionObjective, DistillationObjective, DistillOptions, read_teacher
from engine.observers import BatchPictures, Checkpoints, CsvLog, EarlyStopping, Progress, TensorBoard, board_pictures
from engine.optim import build_optimizer
from engine.options import TrainOptions
from engine.recipe.modifiers import Recipe
from engine.recipe.phases import is_passing, last_event, quantizes
from engine.recipe.run import (
    Pace,
    RecipeSeams,
    heaviest_phase,
    open_recipe,
    recipe_seams,
    report_recipe,
    saved_recipe,
    tell_quantization,
    warn_of_regrowth,
)
from engine.recipe.writer import to_yaml
from engine.reporting import BatchPlots, metrics_of, plot_evaluation, write_json
from engine.resume import find_last, nothing_lost
from engine.schedule import ScheduleOptions, YoloSchedule, warmup_batches
from engine.seams import Evaluator, Objective, Seams
from engine.sparsity_seams import add_penalty
from engine.task import Goal, Task, TrainData
from models.blocks import Blocks, flops, image_multiple, is_classifier, parameters
from models.cfg import read_cfg_text, write_cfg
from models.checkpoint import (
    Model,
    load_model,
    read_structure,
    require_float,
    stripped,
    transfer,
    with_anchors_of,
    with_batch_norms,
    with_structure,
)
from models.network import Network, fuse, init_detect_biases, init_gammas, replace_anchors, synchronise_norms, with_placeholder_anchors
from models.quantization import quantize
from models.yaml_reader import ordered_anchors
from utils import plots
from utils.anchors import autoanchor, label_sizes
from utils.augment import AugmentOptions
from utils.data_config import read_data
from utils.dataset import DatasetOptions, DetectionDataset, EpochLoader, make_loader
from utils.device import Precision, evaluation_workers, select_device, training_precision, worker_count
from utils.errors import InputError
from utils.files import make_folder, remove_temporaries, run_folder, write_text
from utils.flags import multiple
from utils.hyp import read_hyp
from utils.labels import scan_labels
from utils.log import LOGGER
from utils.loss import DetectionLoss, LossOptions
from utils.world import World, join

# The columns of an evaluation in results.csv and TensorBoard: YOLOv5's names, in the order of `Evaluation.metrics()` and `losses`.
METRICS = ("metrics/precision", "metrics/recall", "metrics/mAP_0.5", "metrics/mAP_0.5:0.95", "val/box_loss", "val/obj_loss", "val/cls_loss")


def train(options: TrainOptions) -> Path:
    """Train as `options` say, in a new run folder; return the folder. Raises `InputError` before anything is written where an input is wrong."""
    options, recipe = open_recipe(options)
    with join() as world:
        folder = world.from_main(run_folder(options.project, options.name, options.exist_ok))
        return _train(options, recipe, folder, None, world)


def resume(path: str | Path, device: str = "", workers: int | None = None) -> Path:
    """Continue the run whose folder or `last.pt` is `path` (empty: the newest run under runs/) after its last finished epoch.

    A run that was cut off after its last epoch is completed.
    """
    last = find_last(path)
    model = load_model(last)
    if model.training is None:
        what = "is finished (its training state is stripped)" if model.options else "is no run of this project"
        raise InputError(f"--resume: {last} {what}; start a new run with --weights {last}")
    options = TrainOptions.from_saved(model.options)
    options = replace(options, device=device or options.device, workers=options.workers if workers is None else workers)
    if model.training.get("stopped") or model.epoch + 1 >= options.epochs:
        LOGGER.info("every epoch is trained; the run was cut off at its end, which is completed now")
    with join() as world:
        return _train(options, saved_recipe(options), last.parent.parent, model, world)


def _train(options: TrainOptions, recipe: Recipe | None, folder: Path, resumed: Model | None, world: World) -> Path:
    device = select_device(options.device, world)
    _check_world(options, device, world)
    hyp = (
        resumed.hyp
        if resumed
        else read_hyp(options.hyp) | ({"label_smoothing": options.label_smoothing} if options.label_smoothing else {})
    )
    torch.manual_seed(options.seed + 1)
    start = resumed or _start(options)
    blocks, state = start.blocks, None if resumed else start.state
    task = CLASSIFICATION if is_classifier(blocks) else DETECTION
    with world.main_first():
        data = task.read(options, max(32, image_multiple(blocks)), world)
    if not resumed:
        blocks = task.fit(blocks, data, hyp, options)
    network = _network(blocks, state, options, hyp)
    if options.sync_bn:
        synchronise_norms(network)
    network.to(device, memory_format=torch.channels_last)
    if start.quantization is not None and not (resumed and quantizes(recipe)):  # a resumed recipe quantises as it did
        quantize(network, start.quantization.scheme, start.quantization.ranges)
        if not resumed:
            LOGGER.info(f"{options.weights} is quantised: it is trained so, from its own ranges on, and stays so")
    precision = training_precision(device, options.amp and network.quantization is None)
    if options.batch_size == -1:
        heaviest, beside = heaviest_phase(recipe, network, precision)
        each = min(world.gather(largest_batch(heaviest, data.imgsz, beside)))
        options = replace(options, batch_size=world.size * each)
    if recipe:
        tell_quantization(recipe, network, data.imgsz, options.batch_size // world.size, precision)
    loop, checkpoints = _assemble(task, network, data, hyp, options, recipe, precision, folder, world)
    if resumed:
        loop.load_state_dict(resumed.training, resumed.state, resumed.epoch)
    else:
        warn_of_regrowth(loop, options.weights)
    with nothing_lost(checkpoints, options):
        if world.is_main:
            _prepare_folder(folder, options, recipe, hyp)
            if not resumed or not (folder / "labels.jpg").exists():
                task.pictures(folder, data)
        LOGGER.info(
            f"training {len(data.train)} images, validating {len(data.val)}, {data.imgsz} px, {precision_text(precision)}"
            + (f", {world.size} processes" if world.size > 1 else "")
            + f"; results go to {folder}"
        )
        loop.run()
        return _finish(task, loop, checkpoints, data, options, folder) if world.is_main else folder


def _check_world(options: TrainOptions, device: torch.device, world: World) -> None:
    if options.sync_bn and device.type != "cuda":
        raise InputError("--sync-bn: synchronised batch norms need CUDA, and this run is on the CPU; leave the flag out")
    if world.size > options.batch_size // (4 if options.quad else 1) > 0:
        raise InputError(
            f"--batch-size {options.batch_size} is over all {world.size} processes, and each needs an image; give at least {world.size}"
        )
    if options.image_weights and (world.size > 1 or options.rect):
        raise InputError("--image-weights draws the images anew each epoch; that goes together with neither torchrun nor --rect")


def precision_text(precision: Precision) -> str:
    """The precision as a log line says it."""
    name = "float32" if precision.autocast_dtype is None else f"{precision.autocast_dtype}".removeprefix("torch.") + " autocast"
    return f"{precision.device}, {name}"


def _start(options: TrainOptions) -> Model:
    """The structure to train, with its own number of classes, and the tensors to start from; from scratch there are none."""
    if options.weights and (options.strict or not options.cfg):
        model = with_batch_norms(load_model(options.weights, options.cfg or None, options.dialect), options.weights)
        return model if options.sr is None else require_float(model, options.weights)
    if options.weights:
        model = with_batch_norms(load_model(options.weights), options.weights)
        blocks = with_anchors_of(model.blocks, read_structure(options.cfg, dialect=options.dialect), options.cfg)
        return with_structure(model, blocks, options.weights, options.cfg)
    if not options.cfg:
        raise InputError("give --weights (a checkpoint to start from), --cfg (a model yaml or cfg to train from scratch), or both")
    return Model(read_structure(options.cfg, dialect=options.dialect), {}, ())


def _read_data(options: TrainOptions, stride: int, world: World) -> TrainData:
    config = read_data(options.data)
    names = ("item",) if options.single_cls else config.names
    imgsz = multiple(options.imgsz, stride)
    if imgsz != options.imgsz:
        LOGGER.info(f"--imgsz {options.imgsz} is raised to {imgsz}, a multiple of {stride}")
    quiet = not world.is_main
    return TrainData(names, scan_labels(config.train, config.nc, quiet=quiet), scan_labels(config.val, config.nc, quiet=quiet), imgsz)


def _for_data(blocks: Blocks, data: TrainData, hyp: dict[str, float], options: TrainOptions) -> Blocks:
    """Set the number of classes to the data's and that of anchors to the hyp file's, and fit the anchors unless `--noautoanchor`."""
    if any(b.exp or b.scale_x_y != 2.0 for b in blocks if b.kind == "yolo"):
        raise InputError(
            f"{options.cfg or options.weights}: its boxes are decoded in Darknet's way, which the training loss does not know; it can be detected "
            "with, evaluated, pruned, exported and used as a teacher; train one with YOLOv5's decoding (--cfg models/yolov5s.yaml)"
        )
    if any(b.classes != data.nc for b in blocks if b.kind == "yolo"):
        blocks = read_cfg_text(write_cfg(blocks), "model", data.nc)
    if hyp["anchors"]:
        blocks = _with_anchor_count(blocks, round(hyp["anchors"]), options)
    if not options.noautoanchor:
        heads = sorted((b for b in blocks if b.kind == "yolo"), key=lambda b: b.level)
        wh = label_sizes(list(data.train.labels), data.train.sizes, data.imgsz, options.seed)
        found = autoanchor(np.array([b.anchors for b in heads]), wh, hyp["anchor_t"], options.seed)
        found = found.astype(np.float32)
        blocks = tuple(ordered_anchors(list(replace_anchors(blocks, [[(float(w), float(h)) for w, h in level] for level in found]))))
    if any(side <= 0 for b in blocks for anchor in b.anchors for side in anchor):
        reason = "--noautoanchor" if options.noautoanchor else f"--data {options.data}: too few labels to fit anchors to"
        raise InputError(f"{reason}, but the model has only placeholders; write the anchors' sizes into the model's yaml")
    return blocks


def _with_anchor_count(blocks: Blocks, count: int, options: TrainOptions) -> Blocks:
    """Have autoanchor fit `count` anchors per level afresh; with `--noautoanchor` the model's own must be as many, and stay."""
    if not options.noautoanchor:
        return with_placeholder_anchors(blocks, count)
    own = next(len(b.anchors) for b in blocks if b.kind == "yolo")
    if own != count:
        raise InputError(
            f"--noautoanchor: {options.hyp} asks for {count} anchors per level, but the model has {own}; leave --noautoanchor out"
        )
    return blocks


def _network(blocks: Blocks, state: dict | None, options: TrainOptions, hyp: dict[str, float]) -> Network:
    network = Network(blocks)
    init_detect_biases(network)
    init_gammas(network, hyp["gamma_init"])
    if state:
        LOGGER.info(f"{transfer(state, network)} from {options.weights}")
    frozen = range(options.freeze[0]) if len(options.freeze) == 1 else options.freeze
    for name, parameter in network.named_parameters():
        if any(name.startswith(f"model.{i}.") for i in frozen):
            parameter.requires_grad_(False)
    LOGGER.info(f"{len(blocks) - 1} blocks, {sum(parameters(blocks)):,} parameters, {sum(flops(blocks)) / 1e9:.3f} GFLOPs at 640 px")
    return network


def _loaders(
    data: TrainData, hyp: dict[str, float], options: TrainOptions, network: Network, precision: Precision, world: World
) -> tuple[EpochLoader, EpochLoader]:
    augment = AugmentOptions.from_hyp(hyp)
    common = DatasetOptions(
        data.imgsz,
        stride=network.max_stride,
        cache=options.cache,
        single_cls=options.single_cls,
        seed=options.seed,
        channels=network.channels,
    )
    training = replace(
        common, augment=augment, rect=options.rect, batch_size=options.batch_size, quad=options.quad, multi_scale=options.multi_scale
    )
    validation = replace(common, rect=True, pad=0.5, batch_size=2 * options.batch_size)
    workers, beside = worker_count(options.workers, world), evaluation_workers(options.workers, precision.device, world)
    pin = torch.cuda.is_available()
    return (
        make_loader(DetectionDataset(data.train, training), workers, shuffle=True, pin_memory=pin, world=world),
        make_loader(DetectionDataset(data.val, validation), beside, pin_memory=pin, world=world),
    )


def _assemble(
    task: Task, network: Network, data: TrainData, hyp: dict, options: TrainOptions, recipe: Recipe | None, precision: Precision, folder: Path,
    world: World,
) -> tuple[Loop, Checkpoints]:  # fmt: skip
    """Build the loop and its seams."""
    loaders = task.loaders(data, hyp, options, network, precision, world)
    goal = task.goal(network, data, hyp, options, precision, loaders, world)
    accumulate = max(round(hyp["nbs"] / options.batch_size), 1)
    decay = hyp["weight_decay"] * options.batch_size * accumulate / hyp["nbs"]
    optimizer = build_optimizer(network, options.optimizer, hyp["lr0"], hyp["momentum"], decay)
    warmup = warmup_batches(hyp["warmup_epochs"], len(loaders[0]), int(hyp["warmup_min_batches"]))
    schedule = YoloSchedule(optimizer, ScheduleOptions(
        options.epochs, hyp["lr0"], hyp["lrf"], hyp["momentum"], warmup, hyp["warmup_momentum"], hyp["warmup_bias_lr"], accumulate, options.cos_lr,
    ))  # fmt: skip
    objective, added = goal.objective, None
    if recipe:
        pace = Pace(options.epochs, len(loaders[0]), accumulate, hyp["momentum"])
        added = recipe_seams(recipe, network, optimizer, schedule, objective, pace, options, precision)
        schedule, objective = added.schedule, added.objective
    seams, checkpoints = _seams(task, network, optimizer, data, hyp, options, folder, len(loaders[0]), objective, recipe, added)
    seams.transitions.extend(goal.transitions)
    if not world.is_main:
        seams.observers.clear()
    loop_options = LoopOptions(options.epochs, evaluate_every_epoch=not options.noval)
    return Loop(
        network, objective, optimizer, schedule, loaders[0], goal.evaluator, precision, loop_options, seams, world
    ), checkpoints  # fmt: skip


def _goal(
    network: Network, data: TrainData, hyp: dict, options: TrainOptions, precision: Precision, loaders: tuple[EpochLoader, EpochLoader], world: World
) -> Goal:  # fmt: skip
    train_loader, val_loader = loaders
    loss_options = LossOptions(**{f.name: hyp[f.name] for f in fields(LossOptions)})
    loss = DetectionLoss(network.anchors, network.strides, data.nc, data.imgsz, loss_options, world, samples=4 if options.quad else 1)
    weights = ImageWeights(train_loader, data.train.labels, data.nc, options.seed) if options.image_weights else None
    evaluator = _evaluator(val_loader, precision, options, loss.alone(), world, weights)
    return Goal(_objective(loss, options, precision, network), evaluator, (weights,) if weights else ())


def _objective(loss: DetectionLoss, options: TrainOptions, precision: Precision, student: Network) -> Objective:
    if not options.teacher:
        return DetectionObjective(loss)
    teacher = read_teacher(options.teacher, options.teacher_cfg, student, precision.device)
    return DistillationObjective(loss, teacher, student.anchors, DistillOptions(weight=options.distill_weight))


def _evaluator(
    loader: EpochLoader, precision: Precision, options: TrainOptions, loss: DetectionLoss, world: World, weights: ImageWeights | None
) -> Evaluator:
    limits = EvaluateOptions(single_cls=options.single_cls, progress=world.is_main)

    def run(network: Network) -> tuple[float, dict[str, float]]:
        evaluation = evaluate(network, loader, precision, limits, loss, world=world)
        if weights:
            weights.observe(evaluation.result)
        return evaluation.fitness, dict(zip(METRICS, (*evaluation.metrics().values(), *evaluation.losses)))

    return run


def _seams(
    task: Task,
    network: Network,
    optimizer: Optimizer,
    data: TrainData,
    hyp: dict,
    options: TrainOptions,
    folder: Path,
    batches: int,
    objective: Objective,
    recipe: Recipe | None,
    added: RecipeSeams | None,
) -> tuple[Seams, Checkpoints]:
    """Observers in order: what has state comes before the checkpoint that saves it."""
    board = TensorBoard(folder)
    checkpoints = Checkpoints(
        folder / "weights", data.names, data.imgsz, hyp, asdict(options), options.save_period, not options.nosave, is_passing
    )
    seams = Seams()
    seams.observers += [
        board,
        Progress(batches, options.epochs, objective.names, data.imgsz),
        BatchPictures(folder, data.names),
        CsvLog(folder / "results.csv", task.metrics),
    ]
    if options.sr is not None:
        add_penalty(seams, network, optimizer, hyp, options, batches, board, folder)
    if added is not None:
        added.join(seams, board)
    seams.observers += [EarlyStopping(options.patience, last_event(recipe) if recipe else 0), checkpoints]
    return seams, checkpoints


def _prepare_folder(folder: Path, options: TrainOptions, recipe: Recipe | None, hyp: dict[str, float]) -> None:
    make_folder(folder / "weights")
    for place in (folder, folder / "weights"):
        remove_temporaries(place)
    saved = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(options).items()}
    write_text(folder / "opt.yaml", yaml.safe_dump(saved, sort_keys=False))
    write_text(folder / "hyp.yaml", yaml.safe_dump(hyp, sort_keys=False))
    if recipe:
        write_text(folder / "recipe.yaml", to_yaml(recipe))


def _label_pictures(folder: Path, data: TrainData) -> None:
    labels = np.concatenate(data.train.labels)
    plots.plot_labels(labels, data.names, folder / "labels.jpg")
    plots.plot_labels_correlogram(labels, folder / "labels_correlogram.jpg")


def _finish(task: Task, loop: Loop, checkpoints: Checkpoints, data: TrainData, options: TrainOptions, folder: Path) -> Path:
    """Evaluate the checkpoint that counts once more with pictures, strip all, and say where everything is.

    Stripping last.pt comes last: as long as it holds its state of training, `--resume` completes what is missing here.
    """
    # The best epoch of a sparsity training is usually its first, when nothing is sparse yet: what counts there is the last.
    best = checkpoints.best if checkpoints.best.exists() and options.sr is None else checkpoints.last
    task.measure(stripped(load_model(best)), data, options, loop.precision, folder)
    plots.plot_results(folder / "results.csv", folder / "results.png")
    board_pictures(folder)
    others = [path for path in checkpoints.strip_best() if path != best]
    if options.recipe:
        report_recipe(loop, best, others, folder)
    checkpoints.strip_last()
    LOGGER.info(
        f"weights: {checkpoints.last} and {checkpoints.best.name} beside it; the figures above are those of {best.name}\nresults saved to {folder}"
    )
    return folder


def _measure(model: Model, data: TrainData, options: TrainOptions, precision: Precision, folder: Path) -> None:
    network = fuse(model.network()).to(precision.device, memory_format=torch.channels_last)
    validation = DatasetOptions(
        data.imgsz, rect=True, pad=0.5, stride=network.max_stride, batch_size=2 * options.batch_size, single_cls=options.single_cls,
        channels=network.channels,
    )  # fmt: skip
    loader = make_loader(DetectionDataset(data.val, validation))
    evaluation = evaluate(
        network,
        loader,
        Precision(precision.device),
        EvaluateOptions(single_cls=options.single_cls),
        on_batch=BatchPlots(folder, data.names),
    )
    LOGGER.info(evaluation.table(data.names, verbose=data.nc < 50))
    write_json(folder / "metrics.json", metrics_of(evaluation, model.blocks, data.imgsz))
    plot_evaluation(evaluation, data.names, folder)


DETECTION = Task(METRICS, _read_data, _for_data, _loaders, _goal, _label_pictures, _measure)
