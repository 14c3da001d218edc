"""Opening exported detectors in the programs that people run them in: ONNX Runtime, OpenVINO, TorchScript, and OpenCV's own readers.

All compute in float32 with as many threads as torch. What OpenCV makes of a Darknet pair is told in `engine/opencv.py`. Files that other programs
exported are read where they leave no doubt.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import yaml
from torch import Tensor

from engine import opencv
from engine.runtime import CPU, Compute, Runtime, first_line
from models.metadata import Metadata, exported_kind
from utils.errors import InputError
from utils.extras import require
from utils.files import existing
from utils.log import LOGGER

Axes = Sequence[object]  # of a shape: a whole number where it is fixed, anything else where it is free
Ports = Sequence[tuple[str, Axes]]  # inputs or outputs of a model: name and shape


def open_runtime(weights: str | Path, cfg: str | Path = "", device: torch.device = CPU, dnn: bool = False) -> Runtime | None:
    """The runtime of an exported model; None for a checkpoint, which torch runs. `dnn`: in OpenCV, a `.onnx` or a Darknet pair.

    Raises `InputError` naming the file for what cannot be read or understood, and the package that is missing.
    """
    path, kind = Path(weights), exported_kind(weights)
    if dnn and kind != "ONNX" and path.suffix != ".weights":
        raise InputError(f"--dnn: {weights} is neither a .onnx nor the .weights of a Darknet pair, which OpenCV reads; leave the flag out")
    if kind is None and not dnn:
        return None
    if cfg and kind:
        raise InputError(f"--cfg {cfg}: {weights} holds its own structure; leave the flag out")
    path = path if path.is_dir() else existing(path, "--weights")
    if kind is None:
        runtime = Runtime(str(path), "OpenCV", *opencv.open_darknet(path, cfg or None))
    else:
        runtime = _OPENERS["OpenCV" if dnn else kind](path, device)
    LOGGER.info(f"{path}: {_described(runtime)}")
    return runtime


def _described(runtime: Runtime) -> str:
    """What a user should know: program, what is fixed, and where suppression is decided already."""
    m = runtime.metadata
    fixed = [f"{runtime.size[0]}x{runtime.size[1]} px"] if runtime.size else []
    fixed += [f"batch {runtime.batch}"] if runtime.batch else []
    nms = f", suppresses boxes itself: confidence above {m.conf:g}, IoU {m.iou:g}, at most {m.max_det}" if m.nms else ""
    return f"runs in {runtime.program}, {' and '.join(fixed) + ' fixed' if fixed else 'any size and batch'}{nms}"


# ---- each program ----------------------------------------------------------------------------------------------------------------


def _open_onnx(path: Path, device: torch.device) -> Runtime:
    ort = require("onnxruntime", "running a .onnx")
    cuda = device.type == "cuda" and "CUDAExecutionProvider" in ort.get_available_providers()
    providers = [("CUDAExecutionProvider", {"device_id": device.index or 0})] if cuda else []
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = torch.get_num_threads(), 1, 3
    with _reading(path, "ONNX Runtime"):
        session = ort.InferenceSession(str(path), options, providers=[*providers, "CPUExecutionProvider"])
    inputs, outputs = session.get_inputs(), session.get_outputs()
    name, shape = _image_input(path, [(i.name, i.shape) for i in inputs])
    which = _predictions(path, [(o.name, o.shape) for o in outputs])
    half = inputs[0].type == "tensor(float16)"
    metadata = _metadata(path, session.get_modelmeta().custom_metadata_map, shape, outputs[which].shape)
    output = outputs[which].name

    def compute(images: Tensor) -> Tensor:
        array = (images.half() if half else images).contiguous().numpy()
        return torch.from_numpy(session.run([output], {name: array})[0]).float()

    return _runtime(path, "ONNX Runtime", metadata, compute, shape)


def _open_openvino(path: Path, device: torch.device) -> Runtime:
    openvino = require("openvino", "running an OpenVINO model")
    xml = _xml(path)
    core = openvino.Core()
    with _reading(xml, "OpenVINO"):
        model = core.read_model(xml)
        settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
        request = core.compile_model(model, "CPU", settings).create_infer_request()
    outputs = _openvino_ports(model.outputs)
    _, shape = _image_input(xml, _openvino_ports(model.inputs))
    which = _predictions(xml, outputs)
    metadata = _metadata(xml, _beside(xml), shape, outputs[which][1])

    def compute(images: Tensor) -> Tensor:
        request.infer([images.contiguous().numpy()])
        return torch.from_numpy(request.get_output_tensor(which).data.copy()).float()

    return _runtime(path, "OpenVINO", metadata, compute, shape)


def _open_torchscript(path: Path, device: torch.device) -> Runtime:
    files = {"config.txt": ""}
    with _reading(path, "TorchScript"), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        module = torch.jit.load(str(path), map_location=device, _extra_files=files).eval()
    try:
        props = json.loads(files["config.txt"])
        shape = props.get("shape", ()) if isinstance(props, dict) else ()
    except ValueError:
        raise InputError(f"{path}: has no config.txt with names and stride in it; export the model with export.py") from None
    metadata = Metadata.from_props(props, tuple(shape[2:]) or (640, 640), str(path))
    shape = shape or ((None,) * 4 if metadata.dynamic else (metadata.batch, metadata.channels, *metadata.imgsz))

    def compute(images: Tensor) -> Tensor:
        found = module(images.to(device))
        return (found[0] if isinstance(found, (tuple, list)) else found).float()  # YOLOv5's gives the heads' maps too

    return _runtime(path, "TorchScript", _detector(path, metadata), torch.no_grad()(compute), shape, device)


def _open_onnx_in_opencv(path: Path, device: torch.device) -> Runtime:
    onnx = require("onnx", "reading the metadata of a .onnx")
    with _reading(path, "onnx"):
        model = onnx.load(str(path), load_external_data=False)
    name, shape = _image_input(path, _onnx_ports(model.graph.input, frozenset(i.name for i in model.graph.initializer)))
    outputs = _onnx_ports(model.graph.output)
    which = _predictions(path, outputs)
    if not all(map(_fixed, shape)):
        raise InputError(f"{path}: OpenCV runs files of fixed size and batch only; export it without --dynamic, or leave --dnn out")
    metadata = _metadata(path, {p.key: p.value for p in model.metadata_props}, shape, outputs[which][1])
    if metadata.nms:
        raise InputError(f"{path}: OpenCV cannot suppress boxes as the file does; export it without --nms, or leave --dnn out")
    with _reading(path, "OpenCV"):
        compute = opencv.open_onnx(path, name, outputs[which][0])
    return _runtime(path, "OpenCV", metadata, compute, shape)


_OPENERS: Mapping[str, Callable[[Path, torch.device], Runtime]] = {
    "ONNX": _open_onnx, "OpenVINO": _open_openvino, "TorchScript": _open_torchscript, "OpenCV": _open_onnx_in_opencv,
}  # fmt: skip


def _runtime(path: Path, program: str, metadata: Metadata, compute: Compute, shape: Axes, device: torch.device = CPU) -> Runtime:
    batch, _, *sides = map(_fixed, shape)
    size = (sides[0], sides[1]) if all(sides) else None
    return Runtime(str(path), program, metadata, compute, size, batch, device)


def _fixed(axis: object) -> int | None:
    return axis if isinstance(axis, int) and axis > 0 else None


@contextmanager
def _reading(path: Path, program: str) -> Iterator[None]:
    """Make one line of whatever `program` says about a file that it cannot read."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # noqa: BLE001 - each program has exceptions of its own
        raise InputError(f"{path}: {program} cannot read it ({first_line(error)})") from error


# ---- what the files say of themselves --------------------------------------------------------------------------------------------


def _xml(path: Path) -> Path:
    """The .xml of an OpenVINO model, given it or its folder."""
    found = sorted(path.glob("*.xml")) if path.is_dir() else [path]
    if len(found) > 1:
        raise InputError(f"--weights: {path} holds {len(found)} models; name one of {', '.join(p.name for p in found)}")
    if not found[0].with_suffix(".bin").is_file():
        raise InputError(f"{found[0]}: its weights, {found[0].stem}.bin, are not beside it")
    return found[0]


def _beside(xml: Path) -> Mapping[str, object]:
    """`metadata.yaml` in the folder of an OpenVINO model, or as YOLOv5 has it the .yaml of the same name; nothing where there is neither."""
    path = next((p for p in (xml.with_name("metadata.yaml"), xml.with_suffix(".yaml")) if p.is_file()), None)
    if path is None:
        return {}
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: cannot be read ({first_line(error)})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds no metadata; export the model with export.py")
    return content


def _openvino_ports(ports: Sequence) -> Ports:
    def axes(shape: Sequence) -> Axes:
        return [axis.get_length() if axis.is_static else None for axis in shape]

    return [(port.any_name if port.names else "", axes(port.partial_shape) if port.partial_shape.rank.is_static else ()) for port in ports]


def _onnx_ports(values: Sequence, without: frozenset[str] = frozenset()) -> Ports:
    return [(v.name, [d.dim_value or None for d in v.type.tensor_type.shape.dim]) for v in values if v.name not in without]


def _image_input(path: Path, inputs: Ports) -> tuple[str, Axes]:
    if len(inputs) != 1 or len(inputs[0][1]) != 4:
        found = ", ".join(f"{name} of {len(axes)} axes" for name, axes in inputs)
        raise InputError(f"{path}: a detector has one input, images of 4 axes; this has {found or 'none'}")
    return inputs[0]


def _predictions(path: Path, outputs: Ports) -> int:
    """Which output holds the predictions: the one of that name, or the only one with three axes. (YOLOv5's raw maps have five.)"""
    named = [i for i, (name, _) in enumerate(outputs) if name in ("output", "output0")]
    flat = [i for i, (_, axes) in enumerate(outputs) if len(axes) == 3]
    for found in (named, flat):
        if len(found) == 1:
            return found[0]
    names = ", ".join(name or "?" for name, _ in outputs)
    raise InputError(f"{path}: which of its outputs ({names}) holds the predictions cannot be told; export the model with export.py")


def _metadata(path: Path, props: Mapping[str, object], images: Axes, output: Axes) -> Metadata:
    """What a file says, with the usual in the place of what it does not say, if the number of classes can be counted."""
    width = _fixed(output[2]) if len(output) == 3 else None
    usual = {"stride": 32} | ({"names": [f"class{i}" for i in range(width - 5)]} if width and width > 5 else {})
    lacking = [key for key in usual if key not in props]
    if lacking:
        taken = " and ".join("stride 32" if key == "stride" else f"the names class0..class{width - 6}" for key in lacking)
        LOGGER.info(f"{path}: says nothing of {' and '.join(lacking)}; taken to be {taken}")
    height, wide = _fixed(images[2]), _fixed(images[3])
    metadata = Metadata.from_props({**usual, **props}, (height or 640, wide or 640), str(path))
    channels = _fixed(images[1])
    own = metadata.imgsz if height is None or wide is None else (height, wide)  # the graph knows better than its metadata
    metadata = replace(metadata, imgsz=own, channels=channels or metadata.channels)
    wanted = 6 if metadata.nms else 5 + len(metadata.names)
    if width and width != wanted:
        raise InputError(
            f"{path}: its rows are {width} long, those of a YOLOv5 detector of {len(metadata.names)} classes are {wanted}; only such can be run"
        )
    return _detector(path, metadata)


def _detector(path: Path, metadata: Metadata) -> Metadata:
    if metadata.task != "detect":
        raise InputError(
            f"{path}: an exported model for the task {metadata.task}; only detectors are run here, val.py measures a classifier's .pt"
        )
    return metadata
