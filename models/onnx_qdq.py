"""A quantised network's roundings as ONNX's QuantizeLinear and DequantizeLinear: the same blocks in another spelling.

Weights are stored as the integers that they are. Its `form` decides which of the plan's roundings are written; a runtime reads off from where they stand
what it may compute in integers.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from models.blocks import Block, Blocks
from models.onnx_graph import Graph
from models.quantization import Quantization, gate_grid, weight_scales
from utils.errors import InputError

LEAST_OPSET = 13  # scales per channel


def check_opset_for_int8(opset: int) -> None:
    """Raise `InputError` for a version whose QuantizeLinear knows no axis."""
    if opset < LEAST_OPSET:
        raise InputError(f"--opset {opset}: a quantised network needs {LEAST_OPSET} or newer, whose integers have a scale per channel")


class Rounding:
    """Writes what a fused, quantised network rounds, in the quantisation's form. Values are named as everywhere: by what holds the dequantised number."""

    def __init__(self, graph: Graph, blocks: Blocks, quantization: Quantization) -> None:
        check_opset_for_int8(graph.opset)
        self.graph, self.blocks, self.q, self.form = graph, blocks, quantization, quantization.form
        signed = quantization.scheme.symmetric and self.form.signed
        self.kind, self.shift = (np.int8 if signed else np.uint8), (128 if quantization.scheme.symmetric and not signed else 0)

    def convolution(self, index: int, block: Block, weight: Tensor, bias: Tensor | None) -> list[str]:
        """The weights and the bias of a convolution, as its inputs behind the first."""
        q, levels = self.q, self.q.scheme.weight_levels
        integer = bias is not None and q.has_integer_bias(index)
        scales = weight_scales(weight, levels)
        if integer:
            products = q.product_scales(index, weight, bias)
            scales = products / q.parameters_of(q.plan.output[block.inputs[0]])[0]
        values = (q.rounded_weight(weight) / scales[:, None, None, None]).round().clamp(-levels, levels)  # torch's integers, ties too
        parts = [self._dequantized(values.numpy().astype(np.int8), scales.numpy(), f"{block.name}.weight")]
        name = f"{block.name}.bias"
        if integer:
            parts.append(self._dequantized(q.bias_steps(index, weight, bias).numpy().astype(np.int32), products.numpy(), name))
        elif bias is not None:
            parts.append(self.graph.tensor(bias.numpy(), name))
        return parts

    def _dequantized(self, values: np.ndarray, scales: np.ndarray, name: str) -> str:
        """Integers with a scale per output channel."""
        graph = self.graph
        zeros = graph.constant(np.zeros(len(scales)), values.dtype)
        return graph.node(
            "DequantizeLinear", graph.tensor(values, name), graph.tensor(scales, f"{name}.scale"), zeros, axis=0, name=f"{name}.rounded"
        )

    def image(self, x: str) -> str:
        """The network's input."""
        return self._rounded(x, self.q.plan.output[0], "images")

    def output(self, index: int, x: str) -> str:
        """What a block gives."""
        plan, moves = self.q.plan, index not in self.q.plan.sources
        if (moves and not self.form.moved) or (index in plan.branches and not self.form.branches):
            return x
        return self._rounded(x, plan.output[index], self.blocks[index].name or self.blocks[index].kind)

    def inner(self, index: int, x: str) -> str:
        """What stands before a block's activation."""
        return self._rounded(x, self.q.plan.inner[index], f"{self.blocks[index].name}.pre") if self.form.inner else x

    def gate(self, index: int, x: str) -> str:
        """The sigmoid of a SiLU."""
        if self.q.plan.inner[index] is None or not self.form.inner:
            return x
        return self._pair(x, *gate_grid(self.q.scheme.symmetric), f"{self.blocks[index].name}.gate")

    def _rounded(self, x: str, point: int | None, name: str) -> str:
        if point is None:
            return x
        scale, zero = self.q.parameters_of(point)
        return self._pair(x, float(scale), int(zero), name)

    def _pair(self, x: str, scale: float, zero: int, name: str) -> str:
        inputs = self.graph.constant(scale), self.graph.constant(zero + self.shift, self.kind)
        quantized = self.graph.node("QuantizeLinear", x, *inputs, name=f"{name}.quantized")
        return self.graph.node("DequantizeLinear", quantized, *inputs, name=f"{name}.rounded")


class NoRounding:
    """What writes a network in float."""

    def convolution(self, index: int, block: Block, weight: Tensor, bias: Tensor | None) -> None:
        return None

    def image(self, x: str) -> str:
        return x

    def output(self, index: int, x: str) -> str:
        return x

    inner = gate = output
