"""int8 files: from which checkpoint they come, what they are called, that they give torch's rounded boxes, and who runs them."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from engine import export_check, export_run
from engine.calibrate import CalibrationOptions, calibrated
from engine.detector import load
from engine.export_check import Gap, run_onnx, run_openvino
from engine.export_int8 import size_text
from engine.export_run import ExportOptions, export
from engine.int8_check import RoundedReference, mean_gap
from engine.prune_run import PruneOptions, prepare
from engine.val_run import ValOptions, validate
from models.checkpoint import Model, save_model
from models.metadata import exported_kind
from models.quantization import QuantScheme, Ranges, quantize
from models.yaml_reader import from_spec
from tests.helpers import ROOT, SMALL_CLASSIFIER, alive, small, write_dataset
from utils.errors import InputError

onnx = pytest.importorskip("onnx", reason="requirements-export.txt is not installed")
pytest.importorskip("onnxruntime", reason="requirements-export.txt is not installed")
pytest.importorskip("openvino", reason="requirements-export.txt is not installed")
NAMES, CPU = ("a", "b", "c"), torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"), images=6)


@pytest.fixture(scope="module")
def model() -> Model:
    network = alive(small(), calm=True)
    return Model(network.blocks, network.state_dict(), NAMES, imgsz=64)


@pytest.fixture(scope="module")
def quantized(model: Model, data: Path) -> Model:
    return calibrated(model, CalibrationOptions(str(data)), QuantScheme(), CPU)


def saved(folder: Path, model: Model, name: str = "m.pt") -> str:
    save_model(folder / name, model)
    return str(folder / name)


def written(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def operators(path: Path) -> list:
    return list(onnx.load(str(path)).graph.node)


# ---- what is written -----------------------------------------------------------------------------------------------------------


def test_a_float_checkpoint_is_calibrated_and_keeps_its_float_files(tmp_path: Path, model: Model, data: Path, capsys) -> None:
    weights = saved(tmp_path, model)
    export(ExportOptions(weights, ("onnx",)))
    float_file = (tmp_path / "m.onnx").read_bytes()
    capsys.readouterr()
    paths = export(ExportOptions(weights, ("onnx", "openvino"), int8=True, data=str(data), calibration="minmax", calibration_images=4))
    assert [p.name for p in paths] == ["m_int8.onnx", "m_int8_openvino_model"]
    ir = {f"m_int8_openvino_model/{name}" for name in ("m_int8.xml", "m_int8.bin", "metadata.yaml")}
    assert written(tmp_path) == {"m.pt", "m.onnx", "m_int8.onnx"} | ir and (tmp_path / "m.onnx").read_bytes() == float_file
    said = capsys.readouterr().out
    assert "ranges from 4 images" in said and "64x64 px, minmax" in said and said.count("of torch's int8, which is") == 2
    assert said.count("MB compressed, ") == 2 and said.count("of float32's") == 2
    weights_of = {n.input[0] for n in operators(tmp_path / "m_int8.onnx") if n.op_type == "DequantizeLinear"}
    kinds = {t.name: t.data_type for t in onnx.load(str(tmp_path / "m_int8.onnx")).graph.initializer}
    stored = [kinds[name] for name in weights_of if name.endswith(".weight")]
    assert len(stored) == sum(b.kind == "convolutional" for b in small()) and set(stored) == {onnx.TensorProto.INT8}


def test_a_quantised_checkpoint_needs_no_images(tmp_path: Path, quantized: Model, data: Path, capsys) -> None:
    weights = saved(tmp_path, quantized, "q_int8.pt")
    assert export(ExportOptions(weights))[0].name == "q_int8.onnx", "the name says it already"
    first = (tmp_path / "q_int8.onnx").read_bytes()
    capsys.readouterr()
    export(ExportOptions(weights, int8=True, data=str(data)))
    assert "is quantised, with ranges of its own; no images are read" in capsys.readouterr().out
    assert (tmp_path / "q_int8.onnx").read_bytes() == first


def test_calibration_by_the_script_is_that_of_the_checkpoint(tmp_path: Path, model: Model, quantized: Model, data: Path) -> None:
    one = export(ExportOptions(saved(tmp_path, replace(quantized, state=model.state), "a.pt")))[0]
    other = export(ExportOptions(saved(tmp_path, replace(model, imgsz=64), "b.pt"), int8=True, data=str(data)))[0]
    assert (tmp_path / "a.pt").stat().st_size > (tmp_path / "b.pt").stat().st_size, "a float checkpoint is stored in half precision"
    x = np.random.default_rng(0).random((1, 3, 64, 64), np.float32)
    rows = [run_onnx(path.read_bytes(), x)["output"] for path in (one, other)]
    assert mean_gap(*rows).boxes < 0.5


def test_tensorrt_has_no_zero_points(tmp_path: Path, model: Model, quantized: Model, data: Path, capsys) -> None:
    for name, options in {"f": {"data": str(data)}, "q": {}}.items():
        weights = saved(tmp_path, quantized if name == "q" else model, f"{name}.pt")
        path = export(ExportOptions(weights, tensorrt=True, **options))[0]
        assert path.name == f"{name}_tensorrt.onnx"
        graph = onnx.load(str(path)).graph
        values = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
        pairs = [n for n in graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
        assert len(pairs) > 40 and all(values[n.input[2]].dtype == np.int8 and not values[n.input[2]].any() for n in pairs)
    assert "q.pt has zero points, which TensorRT does not have" in capsys.readouterr().out


def test_boxes_may_be_suppressed_in_the_file(tmp_path: Path, quantized: Model) -> None:
    paths = export(ExportOptions(saved(tmp_path, quantized), ("onnx", "openvino"), nms=True, conf_thres=0.3, max_det=50))
    rows = run_onnx(paths[0].read_bytes(), np.random.default_rng(0).random((1, 3, 64, 64), np.float32))["output"]
    assert rows.shape == (1, 50, 6) and rows[..., 4].max() > 0.3


def test_torchscript_rounds_in_float32(tmp_path: Path, quantized: Model, capsys) -> None:
    path = export(ExportOptions(saved(tmp_path, quantized), ("torchscript",)))[0]
    assert path.name == "m.torchscript" and "boxes within 0 px" in capsys.readouterr().out


def test_sizes_are_told_plain_packed_and_beside_float32() -> None:
    assert size_text([bytes(1_000_000)], None) == "1.0 MB"
    assert size_text([bytes(1_000_000), bytes(1_000_000)], 8_000_000) == "2.00 MB, 0.00 MB compressed, 0.25 of float32's 8.00 MB"


# ---- what it computes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["onnxruntime", "openvino", "tensorrt"])
def test_a_reference_refuses_what_is_not_rounding(quantized: Model, form: str) -> None:
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    reference = RoundedReference.of(quantized.network(), images, form)
    assert reference.step.boxes > 0.01 and reference.check("onnx", _rows(quantized, images, form), "f").boxes == 0
    own = quantized.quantization
    high = {name: (low, high * (0.1 if name == "model.3" else 1)) for name, (low, high) in own.ranges.items()}
    with pytest.raises(InputError, match="f: computes something else than torch's int8 network"):
        reference.check("onnx", _rows(replace(quantized, quantization=Ranges(own.scheme, high)), images, form), "f")
    with pytest.raises(InputError, match="computes something else"):
        reference.check("onnx", np.zeros((1, 3, 8), np.float32), "f")


def _rows(model: Model, images: torch.Tensor, form: str) -> np.ndarray:
    """Predictions of torch's rounded network, as a file would give them."""
    from models.network import fuse
    from models.quantization import FORMS
    from models.torchscript import Decoded

    network = fuse(model.network())
    network.quantization.form = FORMS[form]
    with torch.no_grad():
        return Decoded(network)(images).numpy()


def test_what_computes_something_else_is_not_written(tmp_path: Path, quantized: Model, monkeypatch) -> None:
    monkeypatch.setattr(
        export_run, "run_onnx", lambda content, images: {k: v + 9 for k, v in export_check.run_onnx(content, images).items()}
    )
    with pytest.raises(InputError, match=r"m_int8\.onnx: computes something else than torch's int8 network \(boxes within .* on average"):
        export(ExportOptions(saved(tmp_path, quantized)))
    assert written(tmp_path) == {"m.pt"}


def test_both_runtimes_are_nearer_to_torch_than_float_is(tmp_path: Path, quantized: Model) -> None:
    paths = export(ExportOptions(saved(tmp_path, quantized), ("onnx", "openvino")))
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    ir = (paths[1] / "m_int8.xml").read_bytes(), (paths[1] / "m_int8.bin").read_bytes()
    for form, rows in {
        "onnxruntime": run_onnx(paths[0].read_bytes(), images.numpy())["output"],
        "openvino": run_openvino(*ir, images.numpy())["output"],
    }.items():
        reference = RoundedReference.of(quantized.network(), images, form)
        found: Gap = reference.check("onnx", rows, form)
        assert found.boxes < reference.step.boxes and found.scores < reference.step.scores


# ---- who runs it ---------------------------------------------------------------------------------------------------------------


def test_val_detect_and_the_python_api_take_files_and_checkpoint(tmp_path: Path, quantized: Model, data: Path) -> None:
    weights = saved(tmp_path, quantized)
    files = [weights, *map(str, export(ExportOptions(weights, ("onnx", "openvino"))))]
    assert [exported_kind(f) for f in files] == [None, "ONNX", "OpenVINO"]
    figures, boxes = [], []
    for number, file in enumerate(files):
        folder = validate(
            ValOptions(file, str(data), plots=False, project=str(tmp_path / "val"), name=f"v{number}", workers=0, batch_size=1)
        )
        figures.append(json.loads((folder / "metrics.json").read_text()))
        boxes.append(len(load(file, conf=0.3)(sorted((data.parent / "images/val").iterdir())[0])[0].boxes))
    assert all(f["images"] == 6 and f["map50"] == pytest.approx(figures[0]["map50"], abs=0.05) for f in figures)
    assert min(boxes) > 0 and max(boxes) - min(boxes) <= 0.2 * max(boxes)


def test_a_quantised_checkpoint_validates_folded_and_not_alike(tmp_path: Path, quantized: Model, data: Path) -> None:
    weights, maps = saved(tmp_path, quantized), []
    for fused in (True, False):
        options = ValOptions(weights, str(data), plots=False, fuse=fused, project=str(tmp_path / "val"), workers=0)
        maps.append(json.loads((validate(options) / "metrics.json").read_text())["map50"])
    assert maps[0] == pytest.approx(maps[1], abs=0.05)


def test_a_quantised_checkpoint_is_not_pruned(tmp_path: Path, quantized: Model, data: Path) -> None:
    with pytest.raises(InputError, match=r"m\.pt: is quantised; prune the checkpoint before quantisation, fine-tune it and quantise then"):
        prepare(PruneOptions(saved(tmp_path, quantized), str(data), "p_", dry_run=True))


# ---- what is refused -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ({"include": ("onnx", "torchscript"), "int8": True}, "--int8: torchscript holds floating-point numbers only; int8 is for onnx and openvino"),
        ({"include": ("openvino",), "tensorrt": True}, "--tensorrt: is an ONNX file"),
        ({"int8": True, "calibration": "mean"}, "--calibration mean: known are minmax, percentile, entropy"),
        ({"int8": True, "calibration_images": 0}, "--calibration-images 0"),
    ],
)  # fmt: skip
def test_wrong_options_are_one_line(wrong: dict, line: str) -> None:
    with pytest.raises(InputError, match=line):
        ExportOptions("m.pt", **wrong)


def test_what_has_no_int8_form_is_told_and_nothing_is_written(tmp_path: Path, model: Model, quantized: Model) -> None:
    weights = saved(tmp_path, model)
    with pytest.raises(InputError, match=r"--int8: .*m\.pt is not quantised; name the images .* --data DATA.yaml"):
        export(ExportOptions(weights, int8=True))
    weights = saved(tmp_path, quantized)
    with pytest.raises(InputError, match="--include darknet: .* is quantised, and a Darknet pair holds floats"):
        export(ExportOptions(weights, ("onnx", "darknet")))
    with pytest.raises(InputError, match="--opset 12: a quantised network needs 13 or newer"):
        export(ExportOptions(weights, opset=12))
    weights = saved(tmp_path, replace(quantized, quantization=Ranges(QuantScheme())))
    with pytest.raises(InputError, match="was saved before its quantisation saw an image; name the images"):
        export(ExportOptions(weights))
    assert written(tmp_path) == {"m.pt"}


def test_calibration_without_int8_changes_nothing_and_is_told(tmp_path: Path, model: Model, data: Path, capsys) -> None:
    assert export(ExportOptions(saved(tmp_path, model), data=str(data), calibration="entropy"))[0].name == "m.onnx"
    assert "--data, --calibration: without --int8 nothing is calibrated" in capsys.readouterr().out


def test_a_classifier_has_probabilities_and_no_boxes(tmp_path: Path, capsys) -> None:
    network = alive(from_spec(SMALL_CLASSIFIER, "classifier"), calm=True)
    quantize(network, QuantScheme())
    network.train()
    network(torch.rand(4, 3, 64, 64))
    export(
        ExportOptions(saved(tmp_path, Model(network.blocks, network.weights(), NAMES, imgsz=64, quantization=network.quantization.saved())))
    )
    said = capsys.readouterr().out
    assert "probabilities within" in said and "px" not in said


def test_the_script(tmp_path: Path, model: Model, data: Path) -> None:
    argv = ["--weights", saved(tmp_path, model), "--int8", "--data", str(data), "--calibration", "entropy", "--calibration_images", "3"]
    done = subprocess.run([sys.executable, "export.py", *argv], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "from 3 images" in done.stdout and "entropy" in done.stdout and (tmp_path / "m_int8.onnx").is_file()
