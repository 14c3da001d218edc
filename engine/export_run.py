"""An export: any checkpoint in, files for other programs out, each proven to give torch's numbers before it is written.

A quantised checkpoint, or with `int8` a calibrated one, becomes files with int8 weights that runtimes compute in integers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.calibrate import IMAGES, METHOD, CalibrationOptions
from engine.export_check import LIMITS, Gap, Reference, gap, run_onnx, run_opencv, run_openvino, run_torchscript
from engine.export_int8 import FORM, int8_model, size_text
from engine.int8_check import MeanGap, RoundedReference
from engine.one_shot import apply_recipe, one_shot_path, save_one_shot
from engine.recipe.document import read_recipe
from engine.sparsity_report import onnx_sparsity, total
from models.blocks import is_classifier
from models.checkpoint import Model, load_model
from models.darknet import darknet_obstacles, pair_files, pair_path
from models.metadata import Metadata
from models.network import Network
from models.onnx_graph import OPSET, check_opset
from models.onnx_qdq import check_opset_for_int8
from models.onnx_writer import OUTPUT, PREDICTIONS, onnx_model
from models.openvino_ir import openvino_files
from models.quantization import QuantScheme
from models.torchscript import torchscript_bytes
from utils.errors import InputError, did_you_mean
from utils.extras import require
from utils.files import make_folder, write_files
from utils.flags import multiple
from utils.log import LOGGER
from utils.nms import non_max_suppression

INT8 = ("onnx", "openvino")  # the formats that hold integers
ALIASES = {"cfg": "darknet", "weights": "darknet", "ir": "openvino", "ts": "torchscript", "jit": "torchscript"}


@dataclass(frozen=True)
class ExportOptions:
    """What to write. `imgsz`: one side, or height and width; None: the size the checkpoint was trained at. The thresholds count with `nms`.

    `int8`: quantise a float checkpoint by `calibration` on so many images of `data`; one that is quantised becomes int8 anyway. `tensorrt`: int8 without
    zero points, an ONNX file for TensorRT. `one_shot`: prune and quantise as `recipe` ends, and write that checkpoint too.
    """

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
    int8: bool = False
    tensorrt: bool = False
    data: str = ""
    calibration: str = METHOD
    calibration_images: int = IMAGES
    recipe: str = ""
    recipe_args: str = ""
    one_shot: bool = False

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
        self._check_int8()

    def _check_int8(self) -> None:
        floats = [name for name in self.formats if name not in INT8]
        if self.int8 and floats:
            raise InputError(f"--int8: {floats[0]} holds floating-point numbers only; int8 is for {' and '.join(INT8)}")
        if self.tensorrt and self.formats != ("onnx",):
            raise InputError("--tensorrt: is an ONNX file, whose activations are symmetric; write other formats by a command of their own")
        if self.one_shot != bool(self.recipe) or (self.recipe_args and not self.recipe):
            raise InputError(
                "--recipe R --one-shot: go together, since an export does not train; name both, or train with train.py --recipe R"
            )
        self.calibrate  # noqa: B018 - raises for a method that there is not

    @property
    def calibrate(self) -> CalibrationOptions:
        """How the ranges of a float checkpoint are found."""
        return CalibrationOptions(self.data, self.calibration, self.calibration_images, self.imgsz)

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
    for name in options.formats:
        for package in FORMATS[name].needs:
            require(package, f"--include {name}")
    model = load_model(options.weights, options.cfg or None, options.dialect)
    if options.nms and is_classifier(model.blocks):
        raise InputError(f"--nms: {options.weights} is a classifier, which has nothing to suppress")
    if options.one_shot:
        return _one_shot(options, model)
    return write_formats(options, _quantized(options, model))


def _one_shot(options: ExportOptions, model: Model) -> list[Path]:
    """The checkpoint that a recipe leads to without training, and its formats."""
    recipe = read_recipe(options.recipe, options.recipe_args)
    scheme = QuantScheme(symmetric=options.tensorrt) if options.int8 or options.tensorrt else None
    made = apply_recipe(model, recipe, options.calibrate, options.weights, scheme)
    path = one_shot_path(options.weights)
    options = replace(options, weights=str(path), data="" if made.model.quantization else options.data)
    exported = _quantized(options, made.model)
    save_one_shot(made, path)
    written = write_formats(options, exported)
    for file in written:
        if file.suffix == ".onnx" and made.pruned:
            LOGGER.info(f"zeros in {file}: {total(onnx_sparsity(file)).share:.2%} of all convolutions' weights")
    return written


def _quantized(options: ExportOptions, model: Model) -> Model:
    """`model` as it is exported: with the ranges of an int8 file, or as it is."""
    wanted = options.int8 or options.tensorrt
    if model.quantization is None and not wanted:
        flags = {
            "--data": options.data,
            "--calibration": options.calibration != METHOD,
            "--calibration-images": options.calibration_images != IMAGES,
        }
        if any(flags.values()):
            LOGGER.info(f"{', '.join(flag for flag, given in flags.items() if given)}: without --int8 nothing is calibrated")
        return model
    check_opset_for_int8(options.opset)
    if model.quantization is not None and "darknet" in options.formats:
        raise InputError(
            f"--include darknet: {options.weights} is quantised, and a Darknet pair holds floats; export the checkpoint before quantisation"
        )
    return int8_model(model, options.calibrate, options.tensorrt, options.weights)


def write_formats(options: ExportOptions, model: Model) -> list[Path]:
    """Write every format of `options.include` of a loaded model, quantised already where it is to be int8."""
    job = _Job(options, model)
    for name in options.formats:
        FORMATS[name].check(job)
    written = []
    for name in options.formats:
        product = FORMATS[name].make(job)
        make_folder(next(iter(product.files)).parent)
        write_files(product.files)
        written.append(product.path)
        LOGGER.info(f"{name}: {product.path} ({size_text(product.files.values(), product.floats)}), {_checked_text(job, product.gap)}")
    _tell_next(job, written)
    return written


def _checked_text(job: _Job, found: Gap | None) -> str:
    if found is None:
        return "not compared with torch: onnxruntime is not installed"
    if isinstance(found, MeanGap):
        return found.told
    return f"probabilities within {found.scores:.2g} of torch" if job.classifier else f"{found} of torch"


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

    @cached_property
    def network(self) -> Network:
        return self.model.network()

    @property
    def int8(self) -> bool:
        return self.model.quantization is not None

    @cached_property
    def floats(self) -> _Job | None:
        """The same without quantisation, of an int8 job."""
        return _Job(self.options, replace(self.model, quantization=None)) if self.int8 else None

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

    def named(self, ending: str) -> Path:
        """The path beside the weights with `ending`; int8 files do not take the names of float ones."""
        stem = self.weights.stem
        if self.options.tensorrt:
            stem = f"{stem}_tensorrt"
        elif self.int8 and not stem.endswith("_int8"):
            stem = f"{stem}_int8"
        return self.weights.with_name(f"{stem}{ending}")

    def form(self, kind: str) -> str:
        """Where an int8 file of that format is rounded."""
        return "tensorrt" if self.options.tensorrt else FORM[kind]

    @cached_property
    def _made(self) -> dict[tuple, Any]:
        """What formats share: graphs and references by the form that they have."""
        return {}

    def reference(self, kind: str) -> Reference | RoundedReference:
        """What torch gives for what a file of format `kind` holds."""
        form = self.form(kind) if self.int8 else ""
        if ("reference", form) not in self._made:
            reference = RoundedReference.of(self.network, self.images, form) if form else Reference.of(self.network, self.images)
            self._made["reference", form] = reference
        return self._made["reference", form]

    def onnx(self, kind: str, both: bool = False) -> bytes:
        """The graph in the form of `kind`. `both`: where it suppresses boxes it also gives what was suppressed, so that both can be compared."""
        form, both = self.form(kind) if self.int8 else FORM["onnx"], both and self.options.nms
        if ("onnx", form, both) not in self._made:
            self._made["onnx", form, both] = onnx_model(self.network, self.metadata, self.options.opset, both, form)
        return self._made["onnx", form, both]


@dataclass(frozen=True)
class _Product:
    """`path`: what a user gives to `--weights`. `files`: the contents. `gap`: to torch; None where the program that would tell is not here.
    `floats`: of int8 files, the bytes of the same in float32."""

    path: Path
    files: dict[Path, bytes]
    gap: Gap | None
    floats: int | None = None


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
    found = job.reference("darknet").check("darknet", rows, str(cfg))
    return _Product(cfg.with_suffix(".weights"), {cfg.with_suffix(suffix): content for suffix, content in files.items()}, found)


def _make_onnx(job: _Job) -> _Product:
    path, content, found = job.named(".onnx"), job.onnx("onnx"), None
    if find_spec("onnxruntime"):
        found = _checked(job, "onnx", str(path), run_onnx(job.onnx("onnx", both=True), job.images.numpy()))
    return _Product(path, {path: content}, found, len(job.floats.onnx("onnx")) if job.floats else None)


def _make_openvino(job: _Job) -> _Product:
    folder = job.named("_openvino_model")
    stem, props = folder.name.removesuffix("_openvino_model"), job.metadata.to_props()
    files, to_check = (openvino_files(job.onnx("openvino", both), stem, props) for both in (False, True))
    outputs = run_openvino(to_check[f"{stem}.xml"], to_check[f"{stem}.bin"], job.images.numpy())
    found = _checked(job, "openvino", str(folder), outputs)
    floats = sum(map(len, openvino_files(job.floats.onnx("openvino"), stem, props).values())) if job.floats else None
    return _Product(folder, {folder / name: content for name, content in files.items()}, found, floats)


def _make_torchscript(job: _Job) -> _Product:
    """Of a quantised network what rounds as int8 does, and computes in float32."""
    path = job.weights.with_suffix(".torchscript")
    if job.int8:
        LOGGER.info("torchscript: rounds as int8 does and computes in float32, so it is neither smaller nor faster; onnx and openvino are")
    content = torchscript_bytes(job.network, job.images, replace(job.metadata, nms=False, dynamic=True).to_props())
    found = job.reference("torchscript").check("torchscript", run_torchscript(content, job.images.numpy()), str(path))
    return _Product(path, {path: content}, found)


def _checked(job: _Job, kind: str, what: str, outputs: Mapping[str, np.ndarray]) -> Gap:
    """Compare predictions with torch's, and final detections with what `non_max_suppression` makes of the same predictions."""
    o = job.options
    if not o.nms:
        return job.reference(kind).check(kind, outputs[OUTPUT], what)
    predictions = outputs[PREDICTIONS]
    found = job.reference(kind).check(kind, predictions, what)
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
