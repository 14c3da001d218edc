"""A network as an ONNX model, written block by block: no tracing, so that the graph has the blocks' names and nothing else.

Input `images`, (B, channels, H, W) float32 in 0..1, RGB. Output `output`: of a detector what `utils.decode.decode` gives, (B, N, 5 + nc), or with
`nms` final detections, (B, max_det, 6) (see `models/onnx_head.py`); of a classifier (B, nc) probabilities. `Metadata` says which, and stands
in the model's own metadata.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from torch import Tensor

from models.blocks import OUTPUTS, Block, Blocks, is_classifier, resolutions
from models.metadata import Metadata
from models.network import Network, fuse
from models.onnx_graph import OPSET, Axes, Graph
from models.onnx_head import probabilities, suppressed, write_level
from models.onnx_qdq import NoRounding, Rounding
from models.quantization import FORMS

INPUT, OUTPUT, PREDICTIONS = "images", "output", "predictions"
State = dict[str, Tensor]


def onnx_model(network: Network, metadata: Metadata, opset: int = OPSET, both: bool = False, form: str = "onnxruntime") -> bytes:
    """The serialized model of `network`, its batch norms folded into its convolutions; a quantised one with int8 weights, in the `form` of a runtime.

    `metadata` says what is fixed: (batch, channels, *imgsz), or with `dynamic` nothing but the channels; `imgsz` are multiples of the
    largest stride. `both`: with `nms` there is a second output, the `predictions` that were suppressed. Raise `InputError` where onnx is
    not installed or the opset is not one that can be written.
    """
    graph = Graph(opset)
    fused = fuse(network).cpu()
    blocks, state = fused.blocks, {k: v.detach().float() for k, v in fused.weights().items()}
    rounding, quantized = NoRounding(), frozenset()
    if fused.quantization is not None:
        fused.quantization.form = FORMS[form]
        rounding, quantized = Rounding(graph, blocks, fused.quantization), fused.quantization.plan.convolutions
    values = {0: rounding.image(INPUT)}
    needed = _needed(blocks, fused.heads)
    for index, block in enumerate(blocks):
        if block.kind == "input" or index not in needed:
            continue
        x = [values[i] for i in block.inputs]
        if block.kind in OUTPUTS:
            values[index] = x[0]
            continue
        tensors = rounding.convolution(index, block, *_weights(block, state)) if index in quantized else None
        y = _write_conv(graph, block, x, state, tensors) if tensors else _WRITERS[block.kind](graph, block, x, state)
        values[index] = rounding.output(index, _activated(graph, block, y, index, rounding))
    maps = [values[i] for i in fused.heads]
    batch, height, width = ("batch", "height", "width") if metadata.dynamic else (metadata.batch, *metadata.imgsz)
    _write_head(graph, fused, maps, metadata)
    inputs = {INPUT: (batch, metadata.channels, height, width)}
    outputs = {OUTPUT: _output_axes(fused, metadata, batch)}
    if both and metadata.nms:
        outputs[PREDICTIONS] = _output_axes(fused, replace(metadata, nms=False), batch)
    return graph.serialized(inputs, outputs, metadata.to_props())


def _needed(blocks: Blocks, heads: list[int]) -> set[int]:
    """The blocks that a head depends on."""
    needed = set(heads)
    for index in range(len(blocks) - 1, -1, -1):
        if index in needed:
            needed |= set(blocks[index].inputs)
    return needed


def _write_head(graph: Graph, network: Network, maps: list[str], metadata: Metadata) -> None:
    if is_classifier(network.blocks):
        probabilities(graph, maps[0], network.classes, OUTPUT)
        return
    sizes = resolutions(network.blocks, *metadata.imgsz)
    shapes = [None if metadata.dynamic else sizes[i] for i in network.heads]
    widths = [5 + network.blocks[i].classes for i in network.heads]
    levels = [write_level(graph, *level) for level in zip(maps, network.levels, widths, shapes)]
    if metadata.nms:
        suppressed(graph, graph.node("Concat", *levels, axis=1, output=PREDICTIONS), INPUT, metadata, OUTPUT)
    else:
        graph.node("Concat", *levels, axis=1, output=OUTPUT)


def _output_axes(network: Network, metadata: Metadata, batch: int | str) -> Axes:
    if is_classifier(network.blocks):
        return batch, network.classes
    if metadata.nms:
        return batch, metadata.max_det, 6
    sizes = resolutions(network.blocks, *metadata.imgsz)
    boxes = sum(len(network.blocks[i].anchors) * sizes[i][0] * sizes[i][1] for i in network.heads)
    return batch, "boxes" if metadata.dynamic else boxes, 5 + network.classes


# ---- activations ---------------------------------------------------------------------------------------------------------------


def _activated(graph: Graph, block: Block, x: str, index: int, rounding: Rounding | NoRounding) -> str:
    if block.activation == "linear":
        return x
    x = rounding.inner(index, x)
    if block.activation == "silu":
        gate = rounding.gate(index, graph.node("Sigmoid", x, name=f"{block.name}.sigmoid"))
        return graph.node("Mul", x, gate, name=f"{block.name}.silu")
    return _ACTIVATIONS[block.activation](graph, x, block.name)


def _hardswish(graph: Graph, x: str, name: str) -> str:
    """Of older operators than HardSwish (opset 14), which runtimes know in every version."""
    return graph.node("Mul", x, graph.node("HardSigmoid", x, alpha=1 / 6, beta=0.5, name=f"{name}.gate"), name=f"{name}.hardswish")


def _mish(graph: Graph, x: str, name: str) -> str:
    gate = graph.node("Tanh", graph.node("Softplus", x, name=f"{name}.softplus"), name=f"{name}.tanh")
    return graph.node("Mul", x, gate, name=f"{name}.mish")


_ACTIVATIONS: dict[str, Callable[[Graph, str, str], str]] = {
    "leaky": lambda graph, x, name: graph.node("LeakyRelu", x, alpha=0.1, name=f"{name}.leaky"),
    "hardswish": _hardswish,
    "relu": lambda graph, x, name: graph.node("Relu", x, name=f"{name}.relu"),
    "mish": _mish,
    "logistic": lambda graph, x, name: graph.node("Sigmoid", x, name=f"{name}.sigmoid"),
}


# ---- kinds ---------------------------------------------------------------------------------------------------------------------


def _array(state: State, key: str) -> np.ndarray:
    return state[key].numpy()


def _weights(block: Block, state: State) -> tuple[Tensor, Tensor | None]:
    return state[f"{block.name}.weight"], state[f"{block.name}.bias"] if block.bias else None


def _write_conv(graph: Graph, block: Block, x: list[str], state: State, tensors: list[str] | None = None) -> str:
    """`tensors`: what stands for its weights and bias, where they are not written as they are."""
    if tensors is None:
        keys = [f"{block.name}.weight"] + [f"{block.name}.bias"] * block.bias
        tensors = [graph.tensor(_array(state, key), key) for key in keys]
    form = {"kernel_shape": [block.size] * 2, "strides": [block.stride] * 2, "pads": [block.padding] * 4, "group": block.groups}
    return graph.node("Conv", x[0], *tensors, name=block.name, **form)


def _write_batchnorm(graph: Graph, block: Block, x: list[str], state: State) -> str:
    keys = [f"{block.name}.{part}" for part in ("weight", "bias", "running_mean", "running_var")]
    tensors = [graph.tensor(_array(state, key), key) for key in keys]
    return graph.node("BatchNormalization", x[0], *tensors, epsilon=block.bn_eps, name=block.name)


def _write_route(graph: Graph, block: Block, x: list[str], state: State) -> str:
    if block.slice is not None:
        return graph.slice(x[0], 1, *block.slice, name=block.name)
    return x[0] if len(x) == 1 else graph.node("Concat", *x, axis=1, name=block.name)


def _write_shortcut(graph: Graph, block: Block, x: list[str], state: State) -> str:
    y = x[0]
    for other in x[1:]:
        y = graph.node("Add", y, other, name=block.name)
    return y


def _write_maxpool(graph: Graph, block: Block, x: list[str], state: State) -> str:
    """ONNX pads a pool by what never wins, which is what `pads` mean too."""
    left, right, above, below = (block.padding + pad for pad in block.pads)
    form = {"kernel_shape": [block.size] * 2, "strides": [block.stride] * 2, "pads": [above, left, below, right]}
    return graph.node("MaxPool", x[0], name=block.name, **form)


def _write_zeropad(graph: Graph, block: Block, x: list[str], state: State) -> str:
    left, right, above, below = block.pads
    return graph.node("Pad", x[0], graph.ints(0, 0, above, left, 0, 0, below, right), name=block.name)


def _write_focus(graph: Graph, block: Block, x: list[str], state: State) -> str:
    """Space to depth, its parts in YOLOv5's order, which is not that of ONNX's SpaceToDepth."""
    far = np.iinfo(np.int64).max
    ends, axes, steps = graph.ints(far, far), graph.ints(2, 3), graph.ints(2, 2)
    starts = [graph.ints(row, column) for row, column in ((0, 0), (1, 0), (0, 1), (1, 1))]
    parts = [graph.node("Slice", x[0], start, ends, axes, steps, name=block.name) for start in starts]
    return graph.node("Concat", *parts, axis=1, name=block.name)


_WRITERS: dict[str, Callable[[Graph, Block, list[str], State], str]] = {
    "convolutional": _write_conv,
    "batchnorm": _write_batchnorm,
    "route": _write_route,
    "shortcut": _write_shortcut,
    "upsample": lambda graph, block, x, state: graph.resize(x[0], block.stride, block.name),
    "maxpool": _write_maxpool,
    "zeropad": _write_zeropad,
    "focus": _write_focus,
    "avgpool": lambda graph, block, x, state: graph.node("GlobalAveragePool", x[0], name=block.name),
}
