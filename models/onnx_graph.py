"""An ONNX graph under construction: nodes, constants, unique names. What the nodes compute is decided elsewhere.

onnx is imported where it is used: only export needs it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from utils.errors import InputError
from utils.extras import require

OPSETS = range(12, 22)
OPSET = 17
Axes = Sequence[int | str]  # the size of each axis, or the name of one that is free


def check_opset(opset: int) -> None:
    """Raise `InputError` for a version that the graph cannot be written for."""
    if opset not in OPSETS:
        raise InputError(f"--opset {opset}: the graph can be written for the opsets {OPSETS[0]} to {OPSETS[-1]}; the default is {OPSET}")


class Graph:
    """Nodes in the order in which they were added; a value is known by its name.

    `opset`: the version of the operators, one of `OPSETS`; the forms used here are the same in all of them but for `resize`.
    """

    def __init__(self, opset: int = OPSET) -> None:
        check_opset(opset)
        self.opset = opset
        self._onnx = require("onnx", "export to ONNX")
        self._nodes: list[Any] = []
        self._tensors: list[Any] = []
        self._constants: dict[tuple, str] = {}
        self._names: dict[str, int] = {}

    def node(self, kind: str, *inputs: str, name: str = "", outputs: int = 1, output: str = "", **attributes: Any) -> Any:
        """Add a node; return its output's name, or with several `outputs` the tuple of them. `name`: what its values are called by;
        `output`: the exact name of its only output."""
        base = self._unique(name or kind)
        names = [output or base] if outputs == 1 else [f"{base}.{i}" for i in range(outputs)]
        self._nodes.append(self._onnx.helper.make_node(kind, list(inputs), names, base, **attributes))
        return names[0] if outputs == 1 else tuple(names)

    def tensor(self, value: np.ndarray, name: str) -> str:
        """Add weights under exactly `name`."""
        # `ascontiguousarray` would give a scalar an axis
        self._tensors.append(self._onnx.numpy_helper.from_array(np.asarray(value, order="C"), name))
        return name

    def constant(self, value: Any, dtype: type = np.float32) -> str:
        """A small constant; equal ones are one."""
        array = np.asarray(value, dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self.tensor(array, self._unique("constant"))
        return self._constants[key]

    def ints(self, *values: int) -> str:
        """A constant list of int64: a shape, axes, indices."""
        return self.constant(values, np.int64)

    def slice(self, x: str, axis: int, start: int, stop: int, step: int = 1, name: str = "") -> str:
        """`x[start:stop:step]` along one axis."""
        return self.node("Slice", x, self.ints(start), self.ints(stop), self.ints(axis), self.ints(step), name=name)

    def resize(self, x: str, scale: int, name: str) -> str:
        """Each cell of (B, c, h, w) repeated `scale` times along both axes."""
        roi = self.constant([]) if self.opset < 13 else ""  # an input that only another mode reads, and that opset 12 must have
        form = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
        return self.node("Resize", x, roi, self.constant([1, 1, scale, scale]), name=name, **form)

    def _unique(self, name: str) -> str:
        count = self._names[name] = self._names.get(name, 0) + 1
        return name if count == 1 else f"{name}_{count}"

    def serialized(self, inputs: Mapping[str, Axes], outputs: Mapping[str, Axes], props: Mapping[str, str]) -> bytes:
        """The model's bytes, checked by onnx, with float32 `inputs` and `outputs`; `props`: its metadata."""
        helper = self._onnx.helper
        ends = [
            [helper.make_tensor_value_info(name, self._onnx.TensorProto.FLOAT, list(axes)) for name, axes in values.items()]
            for values in (inputs, outputs)
        ]
        graph = helper.make_graph(self._nodes, "model", *ends, initializer=self._tensors)
        opsets = [helper.make_opsetid("", self.opset)]
        model = helper.make_model(graph, opset_imports=opsets, producer_name="export.py", ir_version=helper.find_min_ir_version_for(opsets))
        helper.set_model_props(model, dict(props))
        self._onnx.checker.check_model(model, full_check=True)
        return model.SerializeToString()
