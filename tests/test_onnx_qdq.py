"""A quantised network in ONNX: what stands in the file, the rules of the runtimes that read it, and their numbers against torch's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from models.blocks import Blocks
from models.metadata import Metadata
from models.network import Network, fuse
from models.onnx_writer import onnx_model
from models.quantization import FORMS, QuantScheme, weight_scales
from tests.helpers import alive, random_blocks, small, with_module
from tests.test_quantization import AFFINE, images, quantized
from utils.decode import decode
from utils.errors import InputError

onnx = pytest.importorskip("onnx")
SYMMETRIC = QuantScheme(symmetric=True)
BOXES, SCORES = slice(0, 4), slice(4, None)


def written(network: Network, form: str, **options: object) -> bytes:
    names = tuple(f"c{i}" for i in range(network.classes))
    return onnx_model(network, Metadata(names, network.max_stride, (64, 64), batch=2), form=form, **options)


def tensors(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}


def scheme_of(form: str) -> QuantScheme:
    return SYMMETRIC if form == "tensorrt" else AFFINE


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_int8_and_give_the_rounded_floats(form: str) -> None:
    network = quantized(small(), scheme_of(form))
    with torch.no_grad():
        network.model._modules["1"].conv.weight[:, ::2] = 0
    fused, values = fuse(network), tensors(onnx.load_from_string(written(network, form)))
    for name, weight in fused.named_parameters():
        if name.endswith(".weight"):
            stored, scale = values[name], values[f"{name}.scale"]
            assert stored.dtype == np.int8 and np.abs(stored).max() <= 127
            assert np.allclose(stored * scale[:, None, None, None], fused.quantization.rounded_weight(weight), rtol=1e-5, atol=1e-7)
            assert np.allclose(scale, weight_scales(weight), rtol=1e-6)
    assert (values["model.1.conv.weight"][:, ::2] == 0).all() and values["model.1.conv.weight"][:, 1::2].any()


def test_weights_between_two_steps_go_where_torch_puts_them() -> None:
    """torch multiplies by the scale's inverse, and dividing by the scale rounds some ties the other way."""
    network = quantized(small())
    name = "model.14.m.0.weight"
    weight = network.state_dict()[name]
    scale = 0.1 / 127
    with torch.no_grad():
        weight.copy_(scale * ((torch.arange(weight.numel()) % 127).view(weight.shape) + 0.5))
        weight[:, 0] = 0.1
    stored = tensors(onnx.load_from_string(written(network, "onnxruntime")))[name]
    steps = weight_scales(weight)[:, None, None, None]
    assert np.array_equal(stored, (network.quantization.rounded_weight(weight) / steps).round().numpy())
    assert (stored != (weight / steps).round().numpy()).any()


def test_integers_have_biases_at_the_scale_of_their_products() -> None:
    network = quantized(small())
    model = onnx.load_from_string(written(network, "onnxruntime"))
    values, fused = tensors(model), fuse(network)
    bias, scale = values["model.1.conv.bias"], values["model.1.conv.bias.scale"]
    assert bias.dtype == np.int32
    assert np.allclose(bias * scale, fused.state_dict()["model.1.conv.bias"], atol=float(scale.max()))
    assert values["model.14.m.0.bias"].dtype == np.float32  # the head's maps are float


def test_a_dead_channel_keeps_its_bias() -> None:
    """Its weights say nothing of a scale, and its bias must fit into an int32 all the same."""
    network = quantized(small())
    with torch.no_grad():
        network.model._modules["1"].conv.weight[3] = 0
    values, fused = tensors(onnx.load_from_string(written(network, "onnxruntime"))), fuse(network)
    got = values["model.1.conv.bias"] * values["model.1.conv.bias.scale"].astype(np.float64)
    assert np.allclose(got, fused.state_dict()["model.1.conv.bias"], atol=1e-4)


def test_rules_of_tensorrt() -> None:
    """Scales and zero points are constants, zero points 0 and int8, activations per tensor, weights per output channel, biases float."""
    model = onnx.load_from_string(written(quantized(small(), SYMMETRIC), "tensorrt"))
    values, made = tensors(model), {n.output[0]: n for n in model.graph.node}
    pairs = [n for n in model.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert len(pairs) > 40
    for node in pairs:
        scale, zero = values[node.input[1]], values[node.input[2]]
        assert zero.dtype == np.int8 and not zero.any() and (scale > 0).all()
        axis = {a.name: a.i for a in node.attribute}
        assert scale.ndim == 0 if node.input[0] not in values else (scale.ndim == 1 and axis == {"axis": 0})
    for node in model.graph.node:
        if node.op_type == "Conv":
            assert made[node.input[0]].op_type == "DequantizeLinear" and made[node.input[1]].op_type == "DequantizeLinear"
            assert values[node.input[2]].dtype == np.float32
        if node.op_type == "Sigmoid" and not node.name.startswith("level"):  # between a convolution and its activation nothing is rounded
            assert made[node.input[0]].op_type == "Conv"


def test_opset_12_has_no_scales_per_channel() -> None:
    network = quantized(small())
    with pytest.raises(InputError, match="--opset 12: a quantised network needs 13 or newer"):
        written(network, "onnxruntime", opset=12)
    assert onnx.load_from_string(written(network, "onnxruntime", opset=13)).opset_import[0].version == 13


def torch_rows(network: Network, form: str) -> torch.Tensor:
    network.quantization.form = FORMS[form]
    with torch.no_grad():
        return decode(fuse(network)(images(7)), network.levels)


def float_rows(blocks: Blocks) -> torch.Tensor:
    """What the network of `quantized` gives without rounding."""
    network = alive(blocks, calm=True)
    with torch.no_grad():
        return decode(fuse(network)(images(7)), network.levels)


def ort_rows(content: bytes, optimised: bool = True) -> torch.Tensor:
    runtime = pytest.importorskip("onnxruntime")
    options = runtime.SessionOptions()
    if not optimised:
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": images(7).numpy()})[0])


def openvino_rows(content: bytes) -> torch.Tensor:
    core = pytest.importorskip("openvino").Core()
    compiled = core.compile_model(core.read_model(content), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return torch.from_numpy(compiled([images(7).numpy()])[0])


GRAPHS = [
    small(),
    with_module("BottleneckCSP", [24]),
    with_module("SPP", [24, [3, 5]]),
    with_module("Focus", [24, 3]),
    *map(random_blocks, range(8)),
]


@pytest.mark.parametrize("blocks", GRAPHS)
@pytest.mark.parametrize("form", FORMS)
def test_file_means_what_torch_computes(blocks: Blocks, form: str) -> None:
    """Read operator by operator: the same to what float32 rounds, but where that moves a sum over the border of two steps."""
    network = quantized(blocks, scheme_of(form))
    wanted = torch_rows(network, form)
    gap, step = (ort_rows(written(network, form), optimised=False) - wanted).abs(), (wanted - float_rows(blocks)).abs()
    assert gap.median() < 1e-5 and all(gap[..., part].mean() < step[..., part].mean() / 4 for part in (BOXES, SCORES))


@pytest.mark.parametrize("blocks", GRAPHS)
@pytest.mark.parametrize("form", ["openvino", "onnxruntime"])
@pytest.mark.parametrize("run", [ort_rows, openvino_rows])
def test_runtimes_compute_it(blocks: Blocks, form: str, run: Callable[[bytes], torch.Tensor]) -> None:
    """In integers, which are exact, and with other roundings on the borders of steps: nearer to torch's rounded network than that is to float."""
    network = quantized(blocks)
    wanted = torch_rows(network, form)
    gap, step = (run(written(network, form)) - wanted).abs(), (wanted - float_rows(blocks)).abs()
    assert all(gap[..., part].mean() < step[..., part].mean() for part in (BOXES, SCORES))


def test_openvino_computes_a_symmetric_scheme_around_128() -> None:
    """Written as int8 with zero point 0 its numbers were far from any rounding; unsigned they are the same grid, and near."""
    network = quantized(small(), SYMMETRIC)
    content, wanted = written(network, "openvino"), torch_rows(network, "openvino")
    values = tensors(onnx.load_from_string(content))
    zeros = {int(values[n.input[2]]) for n in onnx.load_from_string(content).graph.node if n.op_type == "QuantizeLinear"}
    gap, step = (openvino_rows(content) - wanted).abs(), (wanted - float_rows(small())).abs()
    assert zeros == {128} and all(gap[..., part].mean() < step[..., part].mean() for part in (BOXES, SCORES))


def test_onnx_runtime_computes_in_integers(tmp_path: Path) -> None:
    """Every convolution but the head's becomes one that takes and gives 8 bits; so do SiLU, adds and concats."""
    runtime = pytest.importorskip("onnxruntime")
    blocks = small()
    options = runtime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    runtime.InferenceSession(written(quantized(blocks), "onnxruntime"), options, providers=["CPUExecutionProvider"])
    kinds = [n.op_type for n in onnx.load(options.optimized_model_filepath, load_external_data=False).graph.node]
    convolutions = sum(b.kind == "convolutional" for b in blocks)
    assert kinds.count("QLinearConv") == convolutions - 2 and kinds.count("Conv") == 2
    assert kinds.count("QLinearSigmoid") == kinds.count("QLinearMul") == convolutions - 2
    assert kinds.count("QLinearAdd") == sum(b.kind == "shortcut" for b in blocks)
