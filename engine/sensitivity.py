"""What each layer can lose: mAP@.5 against the ratio pruned, one layer at a time, before anything is decided.

Every layer is pruned alone at every ratio, and the narrowed network is evaluated: it gives what the masked one gives (checked before the run, with
all layers cut at once) and is never slower. Each result is appended to `measured.jsonl` as it comes, so a killed run goes on where it was.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from engine.evaluate import EvaluateOptions, evaluate
from engine.measured_log import MeasuredLog
from engine.prune_bench import Bench, check_oracle, make_bench
from engine.prune_run import excluding
from engine.recalibrate import recalibrate, training_batches
from engine.scoring import CalibrationData, Scoring, score_model
from engine.sensitivity_report import layer_list, write_results
from models.blocks import flops, image_multiple, parameters
from models.checkpoint import Model, load_model, require_detector, require_float, with_batch_norms
from models.network import fuse
from pruning.criteria import Scores
from pruning.layerwise import PrunableLayer, mask_alone, prunable_layers
from pruning.masked import masked_network
from pruning.policy import PrunePolicy
from pruning.spaces import Spaces, find_spaces
from pruning.surgery import fold_constants, prune
from utils.device import select_device
from utils.errors import InputError
from utils.files import existing, make_folder, run_folder
from utils.flags import multiple
from utils.log import LOGGER

FREE = ("drop", "device", "workers")  # results do not depend on these options: a run that goes on may change them


@dataclass(frozen=True)
class SensitivityOptions:
    """What a run is started with. `ratios`: shares of a layer's channels; `images`: of the validation split (0: all); `recalibrate`: on how many
    training batches batch norm statistics are re-estimated after each cut; `drop`: the mAP@.5 that a layer alone may cost in the config that is
    written; `imgsz` None: the size the checkpoint was trained at."""

    weights: str
    data: str
    cfg: str = ""
    dialect: str = "auto"
    imgsz: int | None = None
    batch_size: int = 16
    ratios: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7)
    criterion: str = "gamma"
    normalize: str = ""
    equalize: str = "union"
    calibration_batches: int = 8
    seed: int = 0
    recalibrate: int = 0
    exclude: tuple[str, ...] = ()
    images: int = 0
    drop: float = 0.01
    device: str = ""
    workers: int = 8

    def __post_init__(self) -> None:
        if not self.ratios or not all(0 < r < 1 for r in self.ratios):
            raise InputError(
                f"--ratios {' '.join(f'{r:g}' for r in self.ratios)}: give shares above 0 and below 1, such as 0.1 0.3 0.5 0.7"
            )
        for flag, value in (("--recalibrate", self.recalibrate), ("--images", self.images), ("--drop", self.drop)):
            if value < 0:
                raise InputError(f"{flag} {value}: must be at least 0")
        object.__setattr__(self, "ratios", tuple(sorted(set(self.ratios))))
        object.__setattr__(self, "exclude", tuple(self.exclude))

    @property
    def scoring(self) -> Scoring:
        """How channels are judged."""
        return Scoring(self.criterion, self.normalize, self.calibration_batches, self.seed)


@dataclass(frozen=True)
class Study:
    """A loaded checkpoint, its layers, how their channels are judged, and what measures a cut. `batches`: training images to recalibrate on."""

    options: SensitivityOptions
    model: Model
    bench: Bench
    spaces: Spaces
    scores: Scores
    layers: list[PrunableLayer]
    batches: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def mask(self, layer: PrunableLayer, ratio: float) -> np.ndarray:
        """What of the network stays when `layer` alone loses `ratio` of its channels."""
        return mask_alone(layer, ratio, self.spaces, self.scores, PrunePolicy(0.0, self.options.equalize))

    def cut(self, mask: np.ndarray) -> Model:
        """The network without the channels that `mask` drops, constants folded first."""
        blocks, state = prune(self.model.blocks, fold_constants(self.model.blocks, self.model.state, self.spaces, mask), self.spaces, mask)
        return replace(self.model, blocks=blocks, state=state)

    def measure(self, model: Model, recalibrated: bool = False) -> dict[str, Any]:
        """mAP of a network, after recalibration where that is asked for; its parameters and FLOPs."""
        network, bench = model.network().to(self.bench.precision.device, memory_format=torch.channels_last), self.bench
        if recalibrated:
            recalibrate(network, self.batches)
        options = EvaluateOptions(single_cls=len(model.names) == 1, progress=False)
        result = evaluate(fuse(network), bench.loader, bench.precision, options).result
        cost = {"params": sum(parameters(model.blocks)), "flops": sum(flops(model.blocks, bench.imgsz, bench.imgsz))}
        return {"map50": float(result.map50), "map": float(result.map), **cost}


def run(
    options: SensitivityOptions, project: str = "runs/sensitivity", name: str = "exp", exist_ok: bool = False, dry_run: bool = False
) -> Path | None:
    """Measure every layer of a checkpoint; return the run folder, which is made once the full network was measured. `dry_run`: tell what would be
    measured, write nothing and return None."""
    study = _prepare(options)
    if dry_run:
        LOGGER.info(layer_list(study.layers))
        LOGGER.info(f"dry run: {len(study.layers)} layers x {len(options.ratios)} ratios were not measured, and nothing was written")
        return None
    header = {"options": asdict(options), "content": _content(study)} | _reference(study)
    folder = make_folder(run_folder(project, name, exist_ok))
    log = MeasuredLog.begin(folder / "measured.jsonl", header)
    LOGGER.info(f"results are kept as they come; a run that was cut short goes on with: python sensitivity.py --resume {folder}")
    return _finish(study, log)


def resume(folder: str | Path, typed: Mapping[str, Any]) -> Path:
    """Go on with the run in `folder`, or with a finished one write its results again. `typed`: options that were given, which must be those that it
    was started with, but for those of `FREE`."""
    log = MeasuredLog.read(existing(Path(folder) / "measured.jsonl", "--resume"))
    saved = log.header.get("options", {})
    if set(saved) != {f.name for f in fields(SensitivityOptions)}:
        raise InputError(f"--resume: {log.path} was written by another version of this program; start a new run")
    before, options = (SensitivityOptions(**values) for values in (saved, {**saved, **typed}))
    for key in typed:
        was, now = getattr(before, key), getattr(options, key)
        if key not in FREE and was != now:
            raise InputError(f"--resume {folder}: it was started with {key} {was!r}, not {now!r}; leave the flag out, or start a new run")
    study = _prepare(options)
    if _content(study) != log.header["content"]:
        raise InputError(f"--resume {folder}: {options.weights} or the images of {options.data} have changed since; start a new run")
    LOGGER.info(f"going on with {folder}: {len(log.cells)} of {len(study.layers) * len(options.ratios)} networks are measured")
    return _finish(study, log)


def _prepare(o: SensitivityOptions) -> Study:
    """Load all that is needed; raise `InputError` for whatever does not fit."""
    model = require_detector(load_model(o.weights, o.cfg or None, o.dialect), o.weights)
    model = with_batch_norms(require_float(model, o.weights), o.weights)
    device = select_device(o.device)
    imgsz = multiple(o.imgsz or model.imgsz, image_multiple(model.blocks))
    spaces = excluding(find_spaces(model.blocks), model.blocks, o.exclude)
    bench = make_bench(model, o.weights, o.data, imgsz, o.batch_size, device, o.workers, o.images, cache="ram")
    scores = score_model(model, o.scoring, CalibrationData(o.data, imgsz, o.batch_size, device, o.workers))
    layers = prunable_layers(model.blocks, spaces, scores, PrunePolicy(0.0, o.equalize))
    batches = []
    if o.recalibrate:  # kept, since some hundred networks see them
        batches = list(training_batches(o.data, model.network(), imgsz, o.batch_size, o.recalibrate, device, o.workers))
    return Study(o, model, bench, spaces, scores, layers, batches)


def _content(study: Study) -> dict[str, Any]:
    """What the results depend on besides the options, to tell whether a file that they name has changed."""
    labels = study.bench.labels
    digest = hashlib.sha256(Path(study.options.weights).read_bytes()).hexdigest()
    return {"sha256": digest, "images": len(labels), "instances": labels.instances}


def _reference(study: Study) -> dict[str, Any]:
    """The figures of the full network: `full`, as it is, and `base`, treated like the cut ones, which is what a loss is counted from."""
    mask = np.logical_and.reduce([study.mask(layer, study.options.ratios[-1]) for layer in study.layers])
    folded = fold_constants(study.model.blocks, study.model.state, study.spaces, mask)
    masked = masked_network(study.model.blocks, folded, study.spaces, mask)
    check_oracle(masked, study.cut(mask).network(), study.model.network(), study.bench)
    full = study.measure(study.model)
    base = study.measure(study.model, recalibrated=True) if study.options.recalibrate else full
    if base["map50"] <= 0:
        raise InputError(f"{study.options.weights} finds nothing in these {len(study.bench.labels)} images: there is nothing to lose")
    return {"full": full, "base": base}


def _finish(study: Study, log: MeasuredLog) -> Path:
    """Measure what `log` lacks, and write the results."""
    base, ratios = log.header["base"], study.options.ratios
    LOGGER.info(f"{len(study.layers)} layers x {len(ratios)} ratios on {len(study.bench.labels)} images; mAP@.5 before {base['map50']:.4f}")
    with tqdm(total=len(study.layers) * len(ratios), desc="layers x ratios", unit="network", disable=None) as bar:
        for layer in study.layers:
            for ratio in ratios:
                if (layer.name, ratio) not in log.cells:
                    log.add(layer.name, ratio, _cell(study, layer, ratio, base))
                bar.set_postfix_str(f"{layer.name} -{ratio:.0%}: mAP@.5 {log.cells[layer.name, ratio]['map50']:.3f}")
                bar.update()
    write_results(study.options, study.bench.imgsz, study.layers, log)
    return log.path.parent


def _cell(study: Study, layer: PrunableLayer, ratio: float, base: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of the network in which `layer` lost `ratio` of its channels, and how many it kept."""
    mask = study.mask(layer, ratio)
    kept = int(mask[layer.classes].sum())
    figures = base if kept == layer.width else study.measure(study.cut(mask), bool(study.options.recalibrate))
    return {"kept": kept, **figures}
