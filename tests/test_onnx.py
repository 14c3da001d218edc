"""The ONNX graph: equal to torch for every kind, activation and stock model, of free size too, and with suppression in it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml

from models.blocks import ACTIVATIONS, KINDS, Block, Blocks, check, image_multiple, is_classifier
from models.metadata import Metadata
from models.network import Network
from models.onnx_writer import onnx_model
from models.yaml_reader import from_spec
from tests.helpers import ROOT, alive, random_blocks, small
from utils.decode import decode
from utils.errors import InputError
from utils.nms import non_max_suppression

onnx = pytest.importorskip("onnx", reason="requirements-export.txt is not installed")
ort = pytest.importorskip("onnxruntime", reason="requirements-export.txt is not installed")

STOCK_YAMLS = sorted((ROOT / "models").rglob("*.yaml"))


def metadata_of(network: Network, size: tuple[int, int], **more: object) -> Metadata:
    names = tuple(f"class{i}" for i in range(network.classes))
    task = "classify" if is_classifier(network.blocks) else "detect"
    return Metadata(names, network.max_stride, size, network.channels, task=task, **more)


def run(model: bytes, images: torch.Tensor) -> np.ndarray:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"]).run(["output"], {"images": images.numpy()})[0]


@torch.no_grad()
def wanted(network: Network, images: torch.Tensor) -> np.ndarray:
    maps = network(images)
    return (maps[0].flatten(1).softmax(1) if is_classifier(network.blocks) else decode(maps, network.levels)).numpy()


def assert_equal(network: Network, images: torch.Tensor, **more: object) -> None:
    size = (images.shape[2], images.shape[3])
    got = run(onnx_model(network, metadata_of(network, size, batch=len(images), **more)), images)
    want = wanted(network, images)
    assert got.shape == want.shape
    boxes, scores = (slice(0, 0), slice(None)) if is_classifier(network.blocks) else (slice(4), slice(4, None))
    np.testing.assert_allclose(got[..., boxes], want[..., boxes], atol=0.01, rtol=0)
    np.testing.assert_allclose(got[..., scores], want[..., scores], atol=1e-4, rtol=0)


def images(batch: int, height: int, width: int, channels: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.rand(batch, channels, height, width, generator=torch.Generator().manual_seed(seed))


# ---- equality ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", STOCK_YAMLS, ids=lambda p: p.stem)
def test_every_stock_model_equals_torch(path) -> None:
    spec = yaml.safe_load(path.read_text())
    blocks = from_spec(spec | {"width_multiple": 0.125, "depth_multiple": 0.33}, path.stem, 3)
    network = alive(blocks, size=max(128, 2 * image_multiple(blocks)), calm=True)
    assert_equal(network, images(1, network.max_stride, 2 * network.max_stride))


@pytest.mark.parametrize("seed", range(8))
def test_random_block_lists_equal_torch(seed: int) -> None:
    assert_equal(alive(random_blocks(seed), seed, 64, calm=True), images(2, 64, 96, seed=seed))


def every_kind(activation: str, exp: bool = False) -> Blocks:
    """A detector on grey images that has every kind of block but the classifier's, and one block that nothing reads."""
    act = {"activation": activation, "batch_norm": True}
    return check(
        [
            Block("input", channels=1), Block("focus", "", (0,), 4), Block("convolutional", "a", (1,), 8, 3, 2, 1, **act),
            Block("zeropad", "", (2,), 8, pads=(0, 1, 1, 0)), Block("maxpool", "", (3,), 8, 2),
            Block("batchnorm", "b", (4,), 8, activation=activation), Block("convolutional", "c", (5,), 8, 3, 2, 1, 8, bias=True, activation=activation),
            Block("upsample", "", (6,), 8, stride=2), Block("shortcut", "", (7, 5, 4), 8), Block("route", "", (8,), 3, slice=(2, 5)),
            Block("maxpool", "", (9,), 3, 3, padding=0, pads=(1, 1, 2, 0)), Block("route", "", (8, 10), 11),
            Block("convolutional", "unread", (8,), 5, batch_norm=True), Block("convolutional", "h.m.0", (11,), 14, bias=True),
            Block("yolo", "h", (13,), 14, anchors=((8.0, 9.0), (20.0, 12.0)), classes=2, scale_x_y=1.05 if exp else 2.0, exp=exp),
        ]
    )  # fmt: skip


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_kind_and_activation(activation: str) -> None:
    blocks = every_kind(activation)
    assert {b.kind for b in blocks} == KINDS.keys() - {"avgpool", "softmax"}
    network = alive(blocks, calm=True)
    assert_equal(network, images(2, 32, 48, 1))
    graph = onnx.load_from_string(onnx_model(network, metadata_of(network, (32, 48)))).graph
    assert not any("unread" in node.name for node in graph.node)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("exp", [False, True])
def test_levels_of_other_programs_decode_their_way(exp: bool, dynamic: bool) -> None:
    assert_equal(alive(every_kind("leaky", exp), calm=True), images(1, 64, 32, 1), dynamic=dynamic)


@pytest.mark.parametrize("opset", [12, 13, 18, 21])
def test_opsets(opset: int) -> None:
    network = alive(small(), calm=True)
    for dynamic in (False, True):
        model = onnx_model(network, metadata_of(network, (64, 96), dynamic=dynamic, nms=dynamic), opset)
        assert onnx.load_from_string(model).opset_import[0].version == opset
        assert np.isfinite(run(model, images(1, 64, 96))).all()


def test_other_opsets_are_refused() -> None:
    network = Network(small())
    for opset in (11, 22):
        with pytest.raises(InputError, match=f"--opset {opset}: the graph can be written for the opsets 12 to 21"):
            onnx_model(network, metadata_of(network, (64, 64)), opset)


def test_a_dynamic_graph_takes_any_size_and_batch() -> None:
    network = alive(small(), calm=True)
    model = onnx_model(network, metadata_of(network, (64, 64), dynamic=True))
    for shape in ((1, 64, 96), (3, 96, 64), (2, 128, 128)):
        x = images(*shape)
        np.testing.assert_allclose(run(model, x), wanted(network, x), atol=0.01)


def test_a_static_graph_says_its_shapes() -> None:
    network = alive(small(), calm=True)
    graph = onnx.load_from_string(onnx_model(network, metadata_of(network, (64, 96), batch=2))).graph
    shapes = [[d.dim_value for d in v.type.tensor_type.shape.dim] for v in (*graph.input, *graph.output)]
    assert shapes == [[2, 3, 64, 96], [2, 3 * (16 * 24 + 8 * 12) // 4, 8]]
    assert not {"Range", "Shape", "Expand"} & {node.op_type for node in graph.node}


# ---- what it says --------------------------------------------------------------------------------------------------------------


def test_metadata_is_in_the_file() -> None:
    network = Network(small())
    metadata = replace(metadata_of(network, (64, 96), dynamic=True), names=("a", "ü", 'q"'))
    session = ort.InferenceSession(onnx_model(network, metadata))
    assert Metadata.from_props(session.get_modelmeta().custom_metadata_map, (1, 1), "m") == metadata


def test_weights_have_the_names_of_the_checkpoint() -> None:
    network = Network(small())
    names = {tensor.name for tensor in onnx.load_from_string(onnx_model(network, metadata_of(network, (64, 64)))).graph.initializer}
    assert {"model.0.conv.weight", "model.0.conv.bias", "model.14.m.1.weight"} <= names


# ---- suppression ---------------------------------------------------------------------------------------------------------------


def settled(network: Network, x: torch.Tensor, conf: float, iou: float, max_det: int) -> list[np.ndarray]:
    with torch.no_grad():
        return [found.numpy() for found in non_max_suppression(decode(network(x), network.levels), conf, iou, max_det=max_det)]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("conf", "max_det"), [(0.25, 300), (0.25, 7), (0.5, 50), (0.9999, 5)])
def test_suppression_is_that_of_detect(dynamic: bool, conf: float, max_det: int) -> None:
    network = alive(small(), calm=True)
    x = images(3, 64, 96)
    x[1] = 0.5
    want = settled(network, x, conf, 0.45, max_det)
    model = onnx_model(network, metadata_of(network, (64, 96), batch=3, dynamic=dynamic, nms=True, conf=conf, max_det=max_det))
    got = run(model, x)
    assert got.shape == (3, max_det, 6)
    assert (len({len(rows) for rows in want}) > 1) == (conf < 0.9 and max_det > 7), "images with many detections, with few, with none"
    for rows, right in zip(got, want):
        np.testing.assert_allclose(rows[: len(right)], right, atol=0.01)
        assert not rows[len(right) :].any()
