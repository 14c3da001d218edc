"""An export: any checkpoint in, files for other programs out, each proven to give torch's numbers before it is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.export_check import LIMITS, Gap, Reference, gap, run_onnx, run_opencv, run_openvino, run_torchscript
from models.blocks import is_classifier
from models.checkpoint import Model, load_model
from models.darknet import darknet_obstacles, pair_files, pair_path
from models.metadata import Metadata
from models.network import Network
from models.onnx_graph import OPSET, check_opset
from models.onnx_writer import OUTPUT, PREDICTIONS, onnx_model
from models.openvino_ir import openvino_files
from models.torchscript import torchscript_bytes
from utils.errors import InputError, did_you_mean
from utils.extras import require
from utils.files import make_folder, megabytes, write_files
from utils.flags import multiple
from utils.log import LOGGER
from utils.nms import non_max_suppression

ALIASES = {"cfg": "darknet", "weights": "darknet", "ir": "openvino", "ts": "torchscript", "jit": "torchscript"}


@dataclass(frozen=True)
class ExportOptions:
    """What to write. `imgsz`: one side, or height and width; None: the size the checkpoint was trained at. The thresholds count with `nms`."""

    weights: str
    include: tuple[str, ...] = ("onnx",)
    cfg: str = ""
    dialect: str = "auto"
    imgsz: tuple[int, ...] | None = None
    batch_size: int = 1
    dynamic: bool = False
    nms: bool = False
    conf_thres: float = 0.25
    iou_thres: float = 0.45
    max_det: int = 1000
    opset: int = OPSET
    half: bool = False
    simplify: bool = False
    device: str = ""

    def __post_init__(self) -> None:
        for name in self.include:
            if ALIASES.get(name, name) not in FORMATS:
                raise InputError(f"--include {name}: known are {', '.join(FORMATS)}{did_you_mean(name, [*FORMATS, *ALIASES])}")
        if self.half:
            raise InputError("--half: files are written in float32, so that their numbers are torch's; leave it out")
        if self.batch_size < 1 or self.max_det < 1:
            raise InputError(f"--batch-size {self.batch_size} --max-det {self.max_det}: both must be at least 1")
        if not 0 <= self.conf_thres <= 1 or not 0 <= self.iou_thres <= 1:
            raise InputError(f"--conf-thres {self.conf_thres} --iou-thres {self.iou_thres}: both must lie between 0 and 1")
        if self.nms and not {"onnx", "openvino"} & set(self.formats):
            raise InputError("--nms: only onnx and openvino can end with suppression; add one of them to --include")
        check_opset(self.opset)

    @property
    def formats(self) -> tuple[str, ...]:
        """The formats by their own names, each once."""
        return tuple(dict.fromkeys(ALIASES.get(name, name) for name in self.include))


def export(options: ExportOptions) -> list[Path]:
    """Write every format of `options.include` beside the weights; return the file or folder of each that is given to `--weights`.

    Raises `InputError`, before anything is written, where a package is missing or the model has no such form; a file whose numbers are not
    torch's is not written.
    """
    _tell(options)
    model = load_model(options.weights, options.cfg or None, options.dialect)
    job = _Job(options, model, model.network())
    if options.nms and is_classifier(model.blocks):
        raise InputError(f"--nms: {options.weights} is a classifier, which has nothing to suppress")
    for name in options.formats:
        for package in FORMATS[name].needs:
            require(package, f"--include {name}")
        FORMATS[name].check(job)
    written = []
    for name in options.formats:
        product = FORMATS[name].make(job)
        make_folder(next(iter(product.files)).parent)
        write_files(product.files)
        written.append(product.path)
        size = sum(map(megabytes, product.files))
        apart = f"probabilities within {product.gap.scores:.2g}" if product.gap and job.classifier else product.gap
        checked = f"{apart} of torch" if apart else "not compared with torch: onnxruntime is not installed"
        LOGGER.info(f"{name}: {product.path} ({size:.1f} MB), {checked}")
    _tell_next(job, written)
    return written


def _tell(options: ExportOptions) -> None:
    if options.simplify:
        LOGGER.info("--simplify: there is nothing to simplify, the graph is written block by block")
    if options.device not in ("", "cpu"):
        LOGGER.info(f"--device {options.device}: not needed, the files are the same; exporting on the CPU")
    plain = [name for name in options.formats if name in ("darknet", "torchscript")]
    if options.nms and plain:
        LOGGER.info(f"--nms: {' and '.join(plain)} cannot hold the suppression and get{'s' * (len(plain) == 1)} the predictions before it")


def _tell_next(job: _Job, written: list[Path]) -> None:
    LOGGER.info(f"results saved to {written[0].parent}")
    if job.classifier:
        return
    for path in written:
        cfg = f" --cfg {path.with_suffix('.cfg')}" if path.suffix == ".weights" else ""
        LOGGER.info(f"next: python detect.py --source IMAGES --weights {path}{cfg}")
    LOGGER.info("      (val.py takes them too, with --data DATA.yaml)")


@dataclass(frozen=True, eq=False)
class _Job:
    """A loaded checkpoint, and what torch computes with it on fixed images."""

    options: ExportOptions
    model: Model
    network: Network

    @property
    def classifier(self) -> bool:
        return is_classifier(self.model.blocks)

    @property
    def weights(self) -> Path:
        return Path(self.options.weights)

    @cached_property
    def metadata(self) -> Metadata:
        o, stride = self.options, self.network.max_stride
        sides = o.imgsz or (self.model.imgsz,)
        size = (multiple(sides[0], stride), multiple(sides[-1], stride))
        if o.imgsz and size != (sides[0], sides[-1]):
            LOGGER.info(f"--imgsz {' '.join(map(str, sides))}: raised to {size[0]} {size[1]}, multiples of the stride {stride}")
        task = "classify" if self.classifier else "detect"
        limits = (o.conf_thres, o.iou_thres, o.max_det)
        return Metadata(tuple(self.model.names), stride, size, self.network.channels, o.batch_size, o.dynamic, o.nms, *limits, task=task)

    @cached_property
    def images(self) -> Tensor:
        shape = (self.options.batch_size, self.network.channels, *self.metadata.imgsz)
        return torch.rand(shape, generator=torch.Generator().manual_seed(0))

    @cached_property
    def reference(self) -> Reference:
        return Reference.of(self.network, self.images)

    @cached_property
    def onnx(self) -> bytes:
        return onnx_model(self.network, self.metadata, self.options.opset)

    @cached_property
    def onnx_to_check(self) -> bytes:
        """The same graph; with suppression it also gives what was suppressed, so that both can be compared."""
        return onnx_model(self.network, self.metadata, self.options.opset, both=True) if self.options.nms else self.onnx


@dataclass(frozen=True)
class _Product:
    """`path`: what a user gives to `--weights`. `files`: the contents. `gap`: to torch; None where the program that would tell is not here."""

    path: Path
    files: dict[Path, bytes]
    gap: Gap | None


@dataclass(frozen=True)
class _Format:
    """`needs`: packages. `make` builds the files and compares them with torch; `check` raises `InputError` for what makes that impossible."""

    make: Callable[[_Job], _Product]
    needs: tuple[str, ...] = ()
    check: Callable[[_Job], None] = lambda job: None


# ---- formats -------------------------------------------------------------------------------------------------------------------


def _check_darknet(job: _Job) -> None:
    if darknet_obstacles(job.model.blocks):
        pair_files(job.model, *job.metadata.imgsz, f"--include darknet: {job.weights}")  # says what they are
    pair_path(job.weights)


def _make_darknet(job: _Job) -> _Product:
    cfg = pair_path(job.weights)
    files = pair_files(job.model, *job.metadata.imgsz, str(cfg))
    rows = run_opencv(files[".cfg"], files[".weights"], job.images.numpy(), job.model.blocks)
    found = job.reference.check("darknet", rows, str(cfg))
    return _Product(cfg.with_suffix(".weights"), {cfg.with_suffix(suffix): content for suffix, content in files.items()}, found)


def _make_onnx(job: _Job) -> _Product:
    path, found = job.weights.with_suffix(".onnx"), None
    if find_spec("onnxruntime"):
        found = _checked(job, "onnx", str(path), run_onnx(job.onnx_to_check, job.images.numpy()))
    return _Product(path, {path: job.onnx}, found)


def _make_openvino(job: _Job) -> _Product:
    stem = job.weights.stem
    folder = job.weights.with_name(f"{stem}_openvino_model")
    files, to_check = (openvino_files(onnx, stem, job.metadata.to_props()) for onnx in (job.onnx, job.onnx_to_check))
    outputs = run_openvino(to_check[f"{stem}.xml"], to_check[f"{stem}.bin"], job.images.numpy())
    found = _checked(job, "openvino", str(folder), outputs)
    return _Product(folder, {folder / name: content for name, content in files.items()}, found)


def _make_torchscript(job: _Job) -> _Product:
    path = job.weights.with_suffix(".torchscript")
    content = torchscript_bytes(job.network, job.images, replace(job.metadata, nms=False, dynamic=True).to_props())
    found = job.reference.check("torchscript", run_torchscript(content, job.images.numpy()), str(path))
    return _Product(path, {path: content}, found)


def _checked(job: _Job, kind: str, what: str, outputs: Mapping[str, np.ndarray]) -> Gap:
    """Compare predictions with torch's, and final detections with what `non_max_suppression` makes of the same predictions."""
    o = job.options
    if not o.nms:
        return job.reference.check(kind, outputs[OUTPUT], what)
    predictions = outputs[PREDICTIONS]
    found = job.reference.check(kind, predictions, what)
    right = np.zeros((len(predictions), o.max_det, 6), np.float32)
    settled = non_max_suppression(torch.from_numpy(predictions), o.conf_thres, o.iou_thres, max_det=o.max_det)
    for image, boxes in zip(right, settled):
        image[: len(boxes)] = boxes
    apart = gap(outputs[OUTPUT], right)
    if apart.boxes > LIMITS[kind][0] or apart.scores > LIMITS[kind][1]:
        raise InputError(f"{what}: its suppression finds other boxes than detect.py; leave out --nms")
    return found


FORMATS = {
    "darknet": _Format(_make_darknet, check=_check_darknet),
    "onnx": _Format(_make_onnx, ("onnx",)),
    "openvino": _Format(_make_openvino, ("onnx", "openvino")),
    "torchscript": _Format(_make_torchscript),
}
