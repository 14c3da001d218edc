"""Exported models take the place of the checkpoint: the same mAP, the same boxes, in every program that is installed."""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from engine import detector
from engine.evaluate import EvaluateOptions, evaluate
from engine.export_run import ExportOptions, export
from engine.opencv import decoded
from engine.runner import chosen
from engine.runtime import Runtime
from engine.runtimes import open_runtime
from engine.val_run import ValOptions, validate
from models.checkpoint import Model, load_model, save_model
from models.metadata import Metadata
from tests.helpers import alive, small, write_dataset
from utils.data_config import read_data
from utils.dataset import DatasetOptions, DetectionDataset, make_loader
from utils.decode import decode
from utils.device import Precision
from utils.errors import InputError, run_script
from utils.labels import scan_labels

CPU = torch.device("cpu")
FIXED = ("onnx", "openvino", "dnn onnx")
FREE = ("torchscript", "dnn weights", "dynamic onnx", "dynamic openvino")
NMS = ("nms onnx", "nms openvino")
NEEDS = {"onnx": "onnxruntime", "openvino": "openvino"}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, data whose labels are some of its detections, and folders of exports: `plain`, `dynamic`, `nms`."""
    pytest.importorskip("onnx")
    root = tmp_path_factory.mktemp("runtimes")
    data = write_dataset(root / "data", images=7)
    network = alive(small(), seed=3, calm=True)
    model = Model(network.blocks, network.state_dict(), ("a", "b", "c"), 64)
    for folder in ("plain", "dynamic", "nms"):
        (root / folder).mkdir()
        save_model(root / folder / "m.pt", model)
    for path, found in zip(
        sorted((root / "data/images/val").glob("*.png")), detector.load(root / "plain/m.pt", conf=0.1)(images(root)).xyxy
    ):
        x1, y1, x2, y2 = np.clip(found[:6, :4], 0, 64).T / 64
        rows = np.stack([found[:6, 5], (x1 + x2) / 2, (y1 + y2) / 2, (x2 - x1) * 0.9, (y2 - y1) * 0.9], 1)
        np.savetxt(root / "data/labels/val" / f"{path.stem}.txt", rows, fmt="%g")
    assert data.is_file()
    openvino = ("openvino",) if has("openvino") else ()
    export(ExportOptions(str(root / "plain/m.pt"), ("darknet", "onnx", "torchscript", *openvino), imgsz=(64,), batch_size=4))
    export(ExportOptions(str(root / "dynamic/m.pt"), ("onnx", *openvino), imgsz=(64,), dynamic=True))
    limits = {"conf_thres": 0.1, "iou_thres": 0.6, "max_det": 300}
    export(ExportOptions(str(root / "nms/m.pt"), ("onnx", *openvino), imgsz=(64,), nms=True, **limits))
    return root


def has(package: str) -> bool:
    try:
        __import__(package)
    except ImportError:
        return False
    return True


def images(root: Path) -> list[Path]:
    return sorted((root / "data/images/val").glob("*.png"))


def options_of(work: Path, kind: str) -> dict:
    """`weights` and `dnn` of a kind such as `onnx`, `dnn weights`, `nms openvino`."""
    how, _, form = kind.rpartition(" ")
    if how != "dnn" and form in NEEDS:
        pytest.importorskip(NEEDS[form])
    folder = work / (how if how in ("dynamic", "nms") else "plain")
    path = folder / ("m_openvino_model" if form == "openvino" else f"m.{form}")
    return {"weights": str(path), "dnn": how == "dnn"}


def in_torch(work: Path, **options: object) -> dict:
    """What torch measures at squares of 64 pixels."""
    config = read_data(str(work / "data/data.yaml"), ("val",))
    dataset = DetectionDataset(scan_labels(config.val, config.nc, quiet=True), DatasetOptions(64, batch_size=3))
    network = load_model(work / "plain/m.pt").network()
    return evaluate(network, make_loader(dataset, 0), Precision(CPU), EvaluateOptions(progress=False, **options)).metrics()


def measured(work: Path, out: Path, **options: object) -> dict:
    run = {"data": str(work / "data/data.yaml"), "batch_size": 3, "workers": 0, "device": "cpu", "plots": False, "project": str(out)}
    return json.loads((validate(ValOptions(**run | options)) / "metrics.json").read_text())


@pytest.mark.parametrize("kind", [*FIXED, *FREE])
def test_val_measures_what_torch_measures(kind: str, work: Path, tmp_path: Path) -> None:
    """Seven images in batches of three; the files of fixed batch hold four."""
    metrics, expected = measured(work, tmp_path, **options_of(work, kind)), None
    if kind in FIXED:
        expected = in_torch(work)
    else:  # what has no fixed size is padded as little as a checkpoint
        expected = measured(work, tmp_path, weights=str(work / "plain/m.pt"))
    assert expected["map50"] > (0.2 if kind in FIXED else 0.01), "something is found"
    assert metrics["images"] == 7
    for key in ("precision", "recall", "map50", "map"):
        assert metrics[key] == pytest.approx(expected[key], abs=1e-3), key
    assert metrics["params"] is None and metrics["flops"] is None and metrics["speed_ms"]["inference"] > 0


@pytest.mark.parametrize("kind", [*FIXED, *FREE])
def test_detections_are_torchs(kind: str, work: Path) -> None:
    """More images than the fixed batch, in the order given."""
    pictures = [*images(work), *images(work)[:2]]
    ours = detector.load(**options_of(work, kind), device="cpu", conf=0.1)
    expected = detector.load(work / "plain/m.pt", device="cpu", conf=0.1)(pictures).xyxy
    assert ours.names == {0: "a", 1: "b", 2: "c"} and ours.imgsz == (64, 64)
    assert min(map(len, expected)) > 2
    for got, want in zip(ours(pictures).xyxy, expected):
        assert_same(got, want)


def assert_same(got: np.ndarray, want: np.ndarray) -> None:
    assert got.shape == want.shape
    assert np.abs(got[:, :4] - want[:, :4]).max() < 0.05 and np.abs(got[:, 4] - want[:, 4]).max() < 1e-3
    assert (got[:, 5] == want[:, 5]).all()


@pytest.mark.parametrize("kind", NMS)
def test_what_is_suppressed_in_the_file_is_not_suppressed_again(
    kind: str, work: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loaded = detector.load(**options_of(work, kind), device="cpu", conf=0.01, iou=0.9)
    torch_too = detector.load(work / "plain/m.pt", device="cpu", conf=0.1, iou=0.6)
    for conf, classes, most in ((0.1, None, 300), (0.3, None, 300), (0.1, (0, 2), 300), (0.1, None, 1)):
        for each in (loaded, torch_too):
            each.conf, each.classes, each.max_det = conf, classes, most
        pairs = list(zip(loaded(images(work)).xyxy, torch_too(images(work)).xyxy))
        assert any(len(want) for _, want in pairs)
        for got, want in pairs:
            if want.size or got.size:
                assert_same(got, want)
    with caplog.at_level(logging.INFO):
        metrics = measured(work, tmp_path, **options_of(work, kind))
    assert 0.2 < metrics["map50"] <= in_torch(work)["map50"] + 1e-3
    assert (
        "leaves out what is below confidence 0.1" in caplog.text and "suppresses boxes itself: confidence above 0.1, IoU 0.6" in caplog.text
    )


def test_rows_of_zeros_are_nothing() -> None:
    row = [0.0, 0, 9, 9, 0.5, 1]
    rows = torch.tensor([[row, [1.0, 1, 5, 5, 0.2, 0], [0.0] * 6], [[0.0] * 6] * 3])
    assert [len(r) for r in chosen(rows, 0.0)] == [2, 0]
    assert chosen(rows, 0.3)[0].tolist() == [row] and [len(r) for r in chosen(rows, 0.0, max_det=1)] == [1, 0]
    assert chosen(rows, 0.0, classes=(0,))[0][:, 5].tolist() == [0.0]


@pytest.mark.parametrize("kind", ["dynamic onnx", "dynamic openvino", "torchscript", "dnn weights"])
def test_files_of_free_size_take_every_size(kind: str, work: Path, tmp_path: Path) -> None:
    pictures = [np.random.default_rng(0).integers(0, 255, (90, 128, 3), np.uint8)]
    got = detector.load(**options_of(work, kind), device="cpu", imgsz=(64, 128), conf=0.05)(pictures)
    want = detector.load(work / "plain/m.pt", device="cpu", imgsz=(64, 128), conf=0.05)(pictures)
    assert len(want[0]) and got[0].detections.input_shape == want[0].detections.input_shape == (64, 96)
    assert_same(got.xyxy[0], want.xyxy[0])
    assert measured(work, tmp_path, **options_of(work, kind), imgsz=96)["imgsz"] == 96


def test_a_whole_batch_is_the_same_as_its_parts() -> None:
    seen = []

    def compute(x: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        return torch.cat([x.mean((1, 2, 3))[:, None, None]] * 8, 2)

    runtime = Runtime("m.onnx", "a program", Metadata(("a", "b", "c"), 32, (64, 64)), compute, (64, 64), 4)
    x = torch.rand(6, 3, 64, 64)
    assert torch.allclose(runtime(x)[:, 0, 0], x.mean((1, 2, 3))) and seen == [4, 4]
    with pytest.raises(InputError, match="m.onnx: gives 6x1x8, not rows of 7 numbers"):
        replace(runtime, metadata=Metadata(("a", "b"), 32, (64, 64)))(x)


def test_a_fixed_size_need_not_be_square(work: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    save_model(tmp_path / "m.pt", load_model(work / "plain/m.pt"))
    export(ExportOptions(str(tmp_path / "m.pt"), ("onnx",), imgsz=(64, 96)))
    metrics = measured(work, tmp_path, weights=str(tmp_path / "m.onnx"), imgsz=96)
    assert metrics["imgsz"] == 96 and metrics["map50"] > 0.1
    runtime = open_runtime(tmp_path / "m.onnx")
    assert (runtime.size, runtime.batch, runtime.max_stride) == ((64, 96), 1, 16)


def test_opencvs_rows_become_those_of_decode() -> None:
    """Rows (y, x, anchor) of fractions and products, as `models/darknet.py` tells, made here by hand."""
    network = alive(small(), seed=1)
    with torch.no_grad():
        want = decode(network(torch.rand(2, 3, 64, 96)), network.levels)
    count = 3 * 8 * 12
    fine = want[:, :count].reshape(2, 3, 96, 8).transpose(1, 2).reshape(2, -1, 8).clone()
    fine[..., :4] /= torch.tensor([96.0, 64, 96, 64])
    fine[..., 5:] *= fine[..., 4:5]
    assert torch.allclose(decoded(fine, 2, 3, 64, 96), want[:, :count], rtol=1e-5, atol=1e-5)
    fine[..., 4:] = 0
    assert (decoded(fine, 2, 3, 64, 96)[..., 4:] == 0).all(), "no objectness, no class"


@pytest.mark.parametrize(("script", "kind"), [("detect", "onnx"), ("prune_detect", "dnn weights")])
def test_the_scripts(script: str, kind: str, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The labels that detect.py writes, and how it says which program ran."""
    options = options_of(work, kind)
    cfg = ["--cfg", options["weights"].replace(".weights", ".cfg"), "--dnn"] if options["dnn"] else []
    common = [
        "--source",
        str(work / "data/images/val"),
        "--conf",
        "0.1",
        "--save-txt",
        "--save-conf",
        "--nosave",
        "--project",
        str(tmp_path),
    ]
    import_module(script).main(["--weights", options["weights"], *cfg, *common, "--name", "exported"])
    assert f"runs in {'OpenCV' if options['dnn'] else 'ONNX Runtime'}" in capsys.readouterr().out
    import_module("detect").main(["--weights", str(work / "plain/m.pt"), *common, "--name", "torch"])
    labels = sorted((tmp_path / "torch/labels").glob("*.txt"))
    assert len(labels) == 7
    for path in labels:
        got, want = (np.loadtxt(p, ndmin=2) for p in (tmp_path / "exported/labels" / path.name, path))
        assert got.shape == want.shape and np.abs(got - want).max() < 1e-3


@pytest.mark.parametrize(("kind", "package"), [("onnx", "onnxruntime"), ("openvino", "openvino"), ("dnn onnx", "onnx")])
def test_a_missing_package_is_one_line(kind: str, package: str, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = options_of(work, kind)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=f"needs the package {package}: pip install -r requirements-export.txt"):
        open_runtime(options["weights"], dnn=options["dnn"])


# ---- files of others ---------------------------------------------------------------------------------------------------------------


def third_party(
    path: Path, props: dict[str, str], outputs: tuple = (("output0", (1, 10, 7)),), images: tuple = (1, 3, 64, 64), half: bool = False
) -> Path:
    """An ONNX file whose outputs are constants, ten boxes of one object of class 1 where there is room for it, and whose input is used by none."""
    onnx = pytest.importorskip("onnx")
    nodes, values, number = [], [], onnx.TensorProto.FLOAT16 if half else onnx.TensorProto.FLOAT
    for i, (name, shape) in enumerate(outputs):
        rows = np.zeros(shape, np.float16 if half else np.float32)
        if len(shape) == 3:
            rows[0, 0, :7] = [32, 32, 20, 10, 0.9, 0.1, 0.8][: shape[2]]
        nodes.append(onnx.helper.make_node("Constant", [], [f"c{i}"], value=onnx.numpy_helper.from_array(rows)))
        nodes.append(onnx.helper.make_node("Add", [f"c{i}", "zero"], [name]))
        values.append(onnx.helper.make_tensor_value_info(name, number, shape))
    axes = onnx.numpy_helper.from_array(rows.dtype.type(0), "none")
    nodes.insert(0, onnx.helper.make_node("ReduceMean", ["images"], ["mean"], keepdims=0))
    nodes.insert(1, onnx.helper.make_node("Mul", ["mean", "none"], ["zero"]))
    source = onnx.helper.make_tensor_value_info("images", number, images)
    graph = onnx.helper.make_graph(nodes, "g", [source], values, [axes])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 12)], ir_version=8)
    onnx.helper.set_model_props(model, props)
    onnx.save(model, str(path))
    return path


YOLOV5 = {"stride": "32", "names": "{0: 'cat', 1: 'dog'}"}


def test_yolov5s_own_onnx(tmp_path: Path) -> None:
    """Names as Python writes a dict, and the raw maps as further outputs."""
    pytest.importorskip("onnxruntime")
    maps = tuple((f"onnx::Sigmoid_{i}", (1, 3, 8 >> i, 8 >> i, 7)) for i in range(3))
    path = third_party(tmp_path / "y.onnx", YOLOV5, (("output0", (1, 10, 7)), *maps))
    for dnn in (False, True):
        loaded = detector.load(path, dnn=dnn, device="cpu")
        (found,) = loaded([np.zeros((64, 64, 3), np.uint8)])
        assert loaded.names == {0: "cat", 1: "dog"}
        assert found.boxes == pytest.approx(np.array([[22, 27, 42, 37, 0.72, 1]]), abs=1e-4)
    renamed = third_party(tmp_path / "n.onnx", YOLOV5, (("predictions", (1, 10, 7)), *maps))
    assert open_runtime(renamed).names == ("cat", "dog"), "the only output of three axes"


def test_half_precision_inside_the_file_is_its_own_affair(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    runtime = open_runtime(third_party(tmp_path / "h.onnx", YOLOV5, half=True))
    rows = runtime(torch.ones(1, 3, 64, 64))
    assert rows.dtype == torch.float32 and rows[0, 0].tolist() == pytest.approx([32, 32, 20, 10, 0.9, 0.1, 0.8], abs=1e-3)


def test_without_metadata_the_usual_is_assumed_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("onnxruntime")
    path = third_party(tmp_path / "bare.onnx", {}, images=(1, 3, 96, 64))
    with caplog.at_level(logging.INFO):
        runtime = open_runtime(path)
    assert (runtime.names, runtime.max_stride, runtime.size) == (("class0", "class1"), 32, (96, 64))
    assert "says nothing of stride and names; taken to be stride 32 and the names class0..class1" in caplog.text
    assert "runs in ONNX Runtime, 96x64 px and batch 1 fixed" in caplog.text


def test_metadata_is_read_not_run(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    canary = tmp_path / "canary"
    path = third_party(tmp_path / "evil.onnx", {"stride": "32", "names": f"open({str(canary)!r}, 'w')"})
    with pytest.raises(InputError, match="evil.onnx: its metadata names"):
        open_runtime(path)
    assert not canary.exists()


@pytest.mark.parametrize(
    ("props", "outputs", "said"),
    [
        (YOLOV5, (("output0", (1, 84, 8400)),), "its rows are 8400 long, those of a YOLOv5 detector of 2 classes are 7"),
        (YOLOV5, (("a", (1, 10, 7)), ("b", (1, 10, 7))), r"which of its outputs \(a, b\) holds the predictions cannot be told"),
        (YOLOV5 | {"task": "classify"}, (("output0", (1, 2)),), "task classify"),
        ({"stride": "32"}, (("output0", (1, 10, 3)),), "has no names in its metadata"),
    ],
)
def test_other_onnx_files_are_refused(props: dict, outputs: tuple, said: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    with pytest.raises(InputError, match=f"x.onnx: .*{said}"):
        open_runtime(third_party(tmp_path / "x.onnx", props, outputs))


def test_torchscript_of_yolov5_is_fixed_to_its_shape(tmp_path: Path) -> None:
    class Head(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
            return x.mean((1, 2, 3)).view(-1, 1, 1).expand(-1, 5, 7), [x]

    config = json.dumps({"shape": [2, 3, 64, 96], "stride": 32, "names": {"0": "cat", "1": "dog"}})
    for name in ("y.torchscript", "y.torchscript.pt"):
        torch.jit.save(torch.jit.script(Head()), str(tmp_path / name), _extra_files={"config.txt": config})
        runtime = open_runtime(tmp_path / name)
        assert (runtime.names, runtime.size, runtime.batch) == (("cat", "dog"), (64, 96), 2)
        assert runtime(torch.ones(3, 3, 64, 96)).shape == (3, 5, 7)
    torch.jit.save(torch.jit.script(Head()), str(tmp_path / "n.torchscript"))
    with pytest.raises(InputError, match="n.torchscript: has no config.txt"):
        open_runtime(tmp_path / "n.torchscript")


# ---- refusals ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"half": True}, "--half: .*m.onnx runs in ONNX Runtime as it was exported"),
        ({"augment": True}, "--augment: .*m.onnx runs in"),
        ({"imgsz": 128}, "--imgsz 128: .*m.onnx takes 64x64 pixels only"),
        ({"cfg": "m.cfg"}, "--cfg m.cfg: .*m.onnx holds its own structure"),
    ],
)
def test_flags_that_an_export_cannot_honour(flags: dict, said: str, work: Path, tmp_path: Path) -> None:
    options = options_of(work, "onnx") | flags
    with pytest.raises(InputError, match=said):
        measured(work, tmp_path, **options)
    with pytest.raises(InputError, match=said):
        detector.load(**options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["plain/m.pt", "plain/m.torchscript", "plain/m_openvino_model", "dynamic/m.onnx", "nms/m.onnx"])
def test_dnn_is_for_files_that_opencv_reads(name: str, work: Path) -> None:
    with pytest.raises(InputError, match=r"--dnn: .*leave the flag out|OpenCV runs files of fixed size|export it without --nms"):
        open_runtime(work / name, dnn=True)


@pytest.mark.parametrize("name", ["m.onnx", "m.weights"])
def test_what_opencv_cannot_read(name: str, work: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    onnx = pytest.importorskip("onnx")
    (tmp_path / "m.cfg").write_text("[net]\nwidth=64\nheight=64\n\n[nonsense]\n\n[yolo]\nmask=0\nclasses=2\n")
    (tmp_path / "m.weights").write_bytes(bytes(64))
    model = onnx.load(work / "plain/m.onnx")
    model.graph.node[0].op_type = "Nonsense"
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(InputError, match=f"{name}.*: OpenCV cannot read it") as caught:
        open_runtime(tmp_path / name, dnn=True)
    assert len(str(caught.value).splitlines()) == 1 and "ERROR" not in capfd.readouterr().err


def test_a_cfg_that_opencv_would_misread(work: Path, tmp_path: Path) -> None:
    from models.cfg import write_cfg

    (tmp_path / "ours.cfg").write_text(write_cfg(small()))
    with pytest.raises(InputError, match="ours.cfg: not plain Darknet, so OpenCV would misread it"):
        open_runtime(work / "plain/m.weights", tmp_path / "ours.cfg", dnn=True)
    with pytest.raises(InputError, match="--cfg: no file .*gone.cfg"):
        open_runtime(work / "plain/m.weights", tmp_path / "gone.cfg", dnn=True)


@pytest.mark.parametrize("name", ["m.onnx", "m.torchscript"])
@pytest.mark.parametrize("content", [b"", b"no model"])
def test_damaged_files(name: str, content: bytes, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name}: .* cannot read it") as caught:
        open_runtime(tmp_path / name)
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(InputError, match="--weights: no file .*none.onnx"):
        open_runtime(tmp_path / "none.onnx")


def test_damaged_openvino_models(work: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    (tmp_path / "m.xml").write_text("<net/>")
    with pytest.raises(InputError, match="m.bin, are not beside it"):
        open_runtime(tmp_path)
    (tmp_path / "m.bin").write_bytes(b"")
    with pytest.raises(InputError, match=r"m.xml: OpenVINO cannot read it \((?!Exception from)"):
        open_runtime(tmp_path / "m.xml")
    (tmp_path / "empty_openvino_model").mkdir()
    with pytest.raises(InputError, match="empty_openvino_model.* is a folder; give a file"):
        load_model(tmp_path / "empty_openvino_model")
    (tmp_path / "n.xml").write_text("<net/>")
    with pytest.raises(InputError, match="holds 2 models; name one of m.xml, n.xml"):
        open_runtime(tmp_path)
    assert open_runtime(work / "plain") is None, "a folder of other files is no model"


def test_exports_cannot_be_trained(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(InputError, match="an exported ONNX model, which detect.py, val.py and prune_detect.py can run"):
        load_model(work / "plain/m.onnx")
    with pytest.raises(SystemExit) as ended:
        run_script(lambda: train.main(["--weights", str(work / "plain/m.torchscript"), "--project", str(tmp_path / "none")]))
    error = capsys.readouterr().err
    assert ended.value.code == 2 and len(error.splitlines()) == 1 and "an exported TorchScript model" in error
    assert not (tmp_path / "none").exists()
