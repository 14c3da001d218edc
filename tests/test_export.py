"""export.py from checkpoint to files: what is written where, that each program gives torch's numbers, and what is refused."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from engine import export_check, export_run
from engine.detector import load
from engine.export_check import Reference, gap, reported, run_onnx, run_opencv, run_openvino, run_torchscript
from engine.export_run import ExportOptions, export
from models.blocks import Blocks
from models.cfg import write_cfg
from models.checkpoint import Model, load_model, save_model
from models.darknet import MARK, pair_path
from models.metadata import Metadata
from models.network import Network
from models.onnx_writer import onnx_model
from models.openvino_ir import openvino_files
from models.torchscript import CONFIG, Decoded
from models.yaml_reader import read_yaml
from tests.helpers import ROOT, alive, small
from utils.augment import letterbox
from utils.decode import decode
from utils.errors import InputError
from utils.nms import non_max_suppression
from utils.planes import stack, to_planes

NAMES = ("a", "b", "c")
OFFICIAL, COCO = os.environ.get("YOLOV5N_PT"), os.environ.get("COCO128_DIR")


def needs_extras() -> None:
    for package in ("onnx", "onnxruntime", "openvino"):
        pytest.importorskip(package, reason="requirements-export.txt is not installed")


def saved(folder: Path, blocks: Blocks | None = None, name: str = "m.pt") -> Path:
    """A checkpoint of a network whose numbers say something."""
    network = alive(small() if blocks is None else blocks, calm=True)
    save_model(folder / name, Model(network.blocks, network.state_dict(), NAMES, imgsz=96))
    return folder / name


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ---- everything at once --------------------------------------------------------------------------------------------------------


def test_every_format_beside_the_weights_with_torchs_numbers(tmp_path: Path, capsys) -> None:
    needs_extras()
    weights = saved(tmp_path)
    paths = export(ExportOptions(str(weights), ("darknet", "onnx", "openvino", "torchscript"), imgsz=(64, 96), batch_size=2))
    assert [p.name for p in paths] == ["m.weights", "m.onnx", "m_openvino_model", "m.torchscript"]
    ir = {f"m_openvino_model/{name}" for name in ("m.xml", "m.bin", "metadata.yaml")}
    assert contents(tmp_path).keys() == {"m.pt", "m.cfg", "m.names", "m.weights", "m.onnx", "m.torchscript"} | ir
    files, images = contents(tmp_path), torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(5))
    network = load_model(weights).network()
    reference, x = Reference.of(network, images), images.numpy()
    reference.check("onnx", run_onnx(files["m.onnx"], x)["output"], "onnx")
    reference.check("openvino", run_openvino(files["m_openvino_model/m.xml"], files["m_openvino_model/m.bin"], x)["output"], "openvino")
    reference.check("torchscript", run_torchscript(files["m.torchscript"], x), "torchscript")
    reference.check("darknet", run_opencv(files["m.cfg"], files["m.weights"], x, network.blocks), "darknet")
    assert max(reference.noise.boxes, reference.noise.scores * 100) < 0.002, "the limits of the formats are those that count"
    said = capsys.readouterr().out
    assert (
        f"results saved to {tmp_path}" in said
        and f"detect.py --source IMAGES --weights {tmp_path / 'm.weights'} --cfg {tmp_path / 'm.cfg'}" in said
    )
    assert said.count("of torch") == 4


def test_every_format_says_names_stride_and_size(tmp_path: Path) -> None:
    needs_extras()
    import onnxruntime
    import yaml

    weights = saved(tmp_path)
    export(ExportOptions(str(weights), ("onnx", "openvino", "ts"), imgsz=(64, 96), nms=True, max_det=20, conf_thres=0.3))
    want = Metadata(NAMES, 16, (64, 96), 3, 1, False, True, 0.3, 0.45, 20)
    props = onnxruntime.InferenceSession(tmp_path / "m.onnx").get_modelmeta().custom_metadata_map
    assert Metadata.from_props(props, (1, 1), "onnx") == want
    written = yaml.safe_load((tmp_path / "m_openvino_model/metadata.yaml").read_text(encoding="utf-8"))
    assert Metadata.from_props(written, (1, 1), "openvino") == want
    extra = {CONFIG: ""}
    torch.jit.load(str(tmp_path / "m.torchscript"), _extra_files=extra)
    assert Metadata.from_props(json.loads(extra[CONFIG]), (1, 1), "ts") == replace(want, nms=False, dynamic=True)


def test_torchscript_takes_other_sizes_and_batches(tmp_path: Path) -> None:
    weights = saved(tmp_path)
    export(ExportOptions(str(weights), ("torchscript",)))
    network = load_model(weights).network()
    for shape in ((1, 3, 96, 96), (3, 3, 64, 128)):
        images = torch.rand(shape)
        got = run_torchscript((tmp_path / "m.torchscript").read_bytes(), images.numpy())
        Reference.of(network, images).check("torchscript", got, "ts")


@pytest.mark.parametrize("dynamic", [False, True])
def test_suppression_in_openvino_is_that_of_detect(tmp_path: Path, dynamic: bool) -> None:
    """`export` refuses what differs; these are the images on which it looks, and there is something to find."""
    needs_extras()
    weights = saved(tmp_path)
    export(ExportOptions(str(weights), ("openvino",), nms=True, conf_thres=0.3, batch_size=2, max_det=60, dynamic=dynamic))
    files = contents(tmp_path / "m_openvino_model")
    images = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(0)).numpy()
    rows = run_openvino(files["m.xml"], files["m.bin"], images)["output"]
    assert rows.shape == (2, 60, 6) and (rows[:, :, 4] > 0.3).sum(1).min() > 5
    assert (np.diff(rows[:, :, 4]) <= 0).all()


def test_a_classifier_is_exported_as_probabilities(tmp_path: Path, capsys) -> None:
    needs_extras()
    weights = saved(tmp_path, read_yaml(ROOT / "models/yolov5nb.yaml", 3))
    export(ExportOptions(str(weights), ("darknet", "onnx", "openvino", "torchscript"), imgsz=(64, 64)))
    said = capsys.readouterr().out
    assert said.count("probabilities within") == 4 and "boxes" not in said
    rows = run_onnx((tmp_path / "m.onnx").read_bytes(), np.zeros((1, 3, 64, 64), np.float32))["output"]
    assert rows.shape == (1, 3) and rows.sum() == pytest.approx(1, abs=1e-5)
    with pytest.raises(InputError, match="is a classifier, which has nothing to suppress"):
        export(ExportOptions(str(weights), ("onnx",), nms=True))


# ---- the Darknet pair ----------------------------------------------------------------------------------------------------------


def test_a_pair_of_ours_keeps_its_cfg(tmp_path: Path) -> None:
    weights = saved(tmp_path)
    (tmp_path / "m.cfg").write_text(write_cfg(small()))
    before = contents(tmp_path)
    for _ in range(2):  # an export replaces its own files
        assert export(ExportOptions(str(weights), ("darknet",)))[0] == tmp_path / "m_darknet.weights"
        after = contents(tmp_path)
        assert after.keys() - before.keys() == {"m_darknet.cfg", "m_darknet.weights", "m_darknet.names"}
        assert all(after[name] == content for name, content in before.items())
    assert after["m_darknet.cfg"].startswith(MARK.encode())


def test_an_export_replaces_an_earlier_one_and_nothing_else(tmp_path: Path) -> None:
    weights = tmp_path / "m.pt"
    assert pair_path(weights) == tmp_path / "m.cfg"
    assert pair_path(tmp_path / "m.weights") == tmp_path / "m_darknet.cfg", "the pair that is exported stays"
    (tmp_path / "m.cfg").write_text(f"{MARK}\n[net]\n")
    assert pair_path(weights) == tmp_path / "m.cfg"
    (tmp_path / "m.cfg").unlink()
    (tmp_path / "m.names").write_text("mine\n")
    assert pair_path(weights) == tmp_path / "m_darknet.cfg"
    (tmp_path / "m_darknet.cfg").write_text("[net]\n")
    with pytest.raises(InputError, match="m_darknet.cfg: is there and was not written by an export; move it away"):
        pair_path(weights)


def test_an_exported_pair_is_read_back_and_exported_again(tmp_path: Path) -> None:
    weights = saved(tmp_path)
    pair = export(ExportOptions(str(weights), ("darknet",)))[0]
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        want, got = (reported(Decoded(load_model(w).network())(images).numpy()) for w in (weights, pair))
    assert gap(got, want).boxes < 0.01
    assert export(ExportOptions(str(pair), ("darknet",)))[0] == tmp_path / "m_darknet.weights"


# ---- what is refused -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ({"include": ("onnxx",)}, "--include onnxx: known are darknet, onnx, openvino, torchscript; did you mean onnx"),
        ({"half": True}, "--half: files are written in float32"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"conf_thres": 1.5}, "--conf-thres 1.5"),
        ({"include": ("darknet",), "nms": True}, "--nms: only onnx and openvino"),
        ({"opset": 9}, "--opset 9: .* 12 to 21"),
    ],
)
def test_wrong_options_are_one_line(wrong: dict, line: str) -> None:
    with pytest.raises(InputError, match=line):
        ExportOptions("m.pt", **wrong)


@pytest.mark.parametrize(("package", "kind"), [("onnx", "onnx"), ("openvino", "openvino")])
def test_a_missing_package_is_one_line_and_nothing_is_written(tmp_path: Path, monkeypatch, package: str, kind: str) -> None:
    if kind == "openvino":
        pytest.importorskip("onnx", reason="requirements-export.txt is not installed")
    weights = saved(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=f"--include {kind} needs the package {package}: pip install -r requirements-export.txt"):
        export(ExportOptions(str(weights), ("darknet", kind)))
    assert contents(tmp_path).keys() == {"m.pt"}


def test_without_onnxruntime_the_file_is_not_compared(tmp_path: Path, monkeypatch, capsys) -> None:
    pytest.importorskip("onnx", reason="requirements-export.txt is not installed")
    monkeypatch.setattr(export_run, "find_spec", lambda name: None)
    assert export(ExportOptions(str(saved(tmp_path))))[0].is_file()
    assert "not compared with torch: onnxruntime is not installed" in capsys.readouterr().out


def test_a_model_without_a_darknet_form_is_named_before_anything_is_written(tmp_path: Path) -> None:
    blocks = tuple(replace(b, activation="hardswish") if b.name == "model.1" else b for b in small())
    weights = saved(tmp_path, blocks)
    with pytest.raises(InputError, match="no exact Darknet cfg can be written: block 2 .model.1.: Darknet has no Hardswish"):
        export(ExportOptions(str(weights), ("torchscript", "darknet")))
    assert contents(tmp_path).keys() == {"m.pt"}


def test_what_computes_something_else_is_not_written(tmp_path: Path, monkeypatch) -> None:
    weights = saved(tmp_path)
    monkeypatch.setattr(export_run, "run_torchscript", lambda model, images: export_check.run_torchscript(model, images) + 0.02)
    with pytest.raises(InputError, match=r"m.torchscript: computes something else than torch \(boxes within 0.02"):
        export(ExportOptions(str(weights), ("torchscript",)))
    assert contents(tmp_path).keys() == {"m.pt"}


# ---- from the command line -----------------------------------------------------------------------------------------------------


def command(*argv: object) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = [sys.executable, "export.py", *map(str, argv)]
    return subprocess.run(done, cwd=ROOT, capture_output=True, text=True, timeout=120, env=environment)


def test_the_script(tmp_path: Path) -> None:
    weights = saved(tmp_path)
    done = command("--weights", weights, "--include", "darknet", "torchscript", "--img", 60, "--simplify", "--device", "0")
    assert done.returncode == 0, done.stderr
    assert "raised to 64 64" in done.stdout and "nothing to simplify" in done.stdout and "exporting on the CPU" in done.stdout
    net = cv2.dnn.readNetFromDarknet(str(tmp_path / "m.cfg"), str(tmp_path / "m.weights"))
    net.setInput(np.zeros((1, 3, 64, 64), np.float32))
    assert [o.shape for o in net.forward(net.getUnconnectedOutLayersNames())] == [(8 * 8 * 3, 8), (4 * 4 * 3, 8)]
    done = command("--weights", weights, "--half")
    assert done.returncode == 2 and done.stderr.startswith("error: --half") and done.stderr.count("\n") == 1


@torch.no_grad()
def choosy(network: Network) -> Network:
    """`network` with so little objectness that at 640 px it finds some dozens of boxes rather than thousands."""
    for i in network.heads:
        conv = network.get_submodule(network.blocks[network.blocks[i].inputs[0]].conv_path)
        conv.weight *= 2
        conv.bias.view(3, -1)[:, 4] -= 2.4
    return network


def test_the_scripts_of_the_docs_find_what_detect_finds(tmp_path: Path) -> None:
    """On a picture of the network's size, which need not be stretched."""
    needs_extras()
    network = choosy(alive(small(), calm=True))
    save_model(tmp_path / "best.pt", Model(network.blocks, network.state_dict(), NAMES))
    export(ExportOptions(str(tmp_path / "best.pt"), ("darknet", "onnx"), nms=True))
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / "street.jpg"), cv2.resize(noise, (640, 640), interpolation=cv2.INTER_CUBIC))
    want = load(tmp_path / "best.pt", imgsz=640)(tmp_path / "street.jpg")[0].boxes
    assert 10 < len(want) < 300
    scripts = re.findall(r"```python\n(.*?)```", (ROOT / "docs/export.md").read_text(encoding="utf-8"), re.DOTALL)
    for script, corners in zip(scripts, (False, True), strict=True):
        done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        lines = [line.split(maxsplit=2) for line in done.stdout.splitlines()]
        boxes = np.array([json.loads(box) for *_, box in lines])
        if not corners:
            boxes[:, 2:] += boxes[:, :2]
        rows = np.column_stack((boxes, [float(score) for _, score, _ in lines], [NAMES.index(name) for name, *_ in lines]))
        rows = rows[np.argsort(-rows[:, 4], kind="stable")]
        assert len(rows) == len(want)
        inside = np.column_stack((rows[:, :4].clip(0, 640), rows[:, 4:]))  # as detect.py clips boxes to the picture
        np.testing.assert_allclose(inside, want, atol=0.16)


@pytest.mark.skipif(not OFFICIAL, reason="YOLOV5N_PT does not name an official checkpoint")
def test_an_official_checkpoint(tmp_path: Path) -> None:
    needs_extras()
    shutil.copy(OFFICIAL, tmp_path / "y.pt")
    export(ExportOptions(str(tmp_path / "y.pt"), ("darknet", "onnx", "openvino", "torchscript"), imgsz=(320,)))
    network = load_model(tmp_path / "y.pt").network()
    images = torch.from_numpy(np.kron(np.random.default_rng(0).random((1, 3, 20, 20)), np.ones((16, 16))).astype(np.float32))
    reference = Reference.of(network, images)
    reference.check("onnx", run_onnx((tmp_path / "y.onnx").read_bytes(), reference.images)["output"], "onnx")
    session = io.BytesIO((tmp_path / "y.torchscript").read_bytes())
    assert gap(reported(torch.jit.load(session)(images).detach().numpy()), reference.rows).boxes < 0.01


@pytest.mark.skipif(not OFFICIAL or not COCO, reason="YOLOV5N_PT and COCO128_DIR do not name an official checkpoint and photographs")
@pytest.mark.parametrize("conf", [0.25, 0.01])
def test_suppression_of_real_detections(conf: float) -> None:
    needs_extras()
    network = load_model(OFFICIAL).network()
    files = sorted((Path(COCO) / "images/val2017").glob("*.jpg"))[:8]
    images = stack([to_planes(letterbox(cv2.imread(str(file)), (320, 320))[0], 3) for file in files]).float() / 255
    names = tuple(map(str, range(80)))
    metadata = Metadata(names, 32, (320, 320), batch=8, nms=True, conf=conf, max_det=300)
    model = onnx_model(network, metadata)
    ir = openvino_files(model, "m", {})
    with torch.no_grad():
        want = non_max_suppression(decode(network(images), network.levels), conf, 0.45, max_det=300)
    assert sum(map(len, want)) >= 20
    for got in (run_onnx(model, images.numpy()), run_openvino(ir["m.xml"], ir["m.bin"], images.numpy())):
        for rows, right in zip(got["output"], want):
            np.testing.assert_allclose(rows[: len(right)], right.numpy(), atol=0.01)
            assert not rows[len(right) :].any()
