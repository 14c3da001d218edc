"""How sparse a saved model is: zeros by layer and in all, of a checkpoint or an ONNX file, and what its files weigh plain and compressed.

Everything is counted in what was saved, not in what a training meant to save.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.reporting import write_json
from models.checkpoint import load_model
from utils.errors import InputError
from utils.extras import require
from utils.files import existing
from utils.log import LOGGER

LEVEL = 6  # gzip's own default
ADVICE = (
    "zeros that stand anywhere make a file compressible, and ordinary runtimes (PyTorch, ONNX Runtime, OpenVINO, TensorRT) no faster: "
    "they multiply by zero as by any number (but for TensorRT, which can use the pattern 2:4 on GPUs that have it). Pruned channels "
    "(slim_prune.py) and int8 make them faster"
)


@dataclass(frozen=True)
class SparsityRow:
    """A tensor, or several together: how many weights, and how many of them are exactly zero."""

    name: str
    weights: int
    zeros: int

    @property
    def share(self) -> float:
        return self.zeros / max(self.weights, 1)

    def as_json(self) -> dict[str, Any]:
        return {"name": self.name, "weights": self.weights, "zeros": self.zeros, "sparsity": self.share}


def sparsity_rows(state: Mapping[str, Tensor], names: Sequence[str] | None = None) -> list[SparsityRow]:
    """One row per tensor of `state` in `names`; by default every weight of a convolution (all that `__ALL_PRUNABLE__` means)."""
    chosen = [k for k, v in state.items() if k.endswith(".weight") and v.dim() == 4] if names is None else list(names)
    if not chosen:
        return []
    zeros = torch.stack([(state[name] == 0).sum() for name in chosen]).tolist()  # one wait for the device, not one per layer
    return [SparsityRow(name, state[name].numel(), count) for name, count in zip(chosen, zeros)]


def total(rows: Sequence[SparsityRow], name: str = "total") -> SparsityRow:
    """All `rows` as one."""
    return SparsityRow(name, sum(r.weights for r in rows), sum(r.zeros for r in rows))


def parameter_rows(state: Mapping[str, Tensor]) -> list[SparsityRow]:
    """One row per parameter of `state`, biases, gammas and betas included; its buffers (statistics, anchors) are none."""
    return sparsity_rows(state, [k for k in state if k.endswith((".weight", ".bias"))])


def onnx_sparsity(path: str | Path) -> list[SparsityRow]:
    """One row per convolution of an .onnx file, under the name of its weights, float or stored as integers around 0 (int8).

    What else is stored with four axes, such as the grid of the boxes, is no weight and does not count. An int8 file has more zeros than the float
    one that it comes from: weights of less than half a step are 0 too.
    """
    onnx = require("onnx", "counting the zeros of an ONNX file")
    path = existing(path, "--weights")
    try:
        graph = onnx.load(str(path)).graph
    except Exception as error:  # noqa: BLE001 - protobuf's own, of which it has many
        raise InputError(f"{path}: is no ONNX model ({(str(error).splitlines() or [type(error).__name__])[0][:120]})") from None
    stored = {tensor.name: tensor for tensor in graph.initializer}
    through = {node.output[0]: node.input[0] for node in graph.node if node.op_type in ("DequantizeLinear", "QuantizeLinear", "Cast")}
    rows = {}
    for node in graph.node:
        if node.op_type not in ("Conv", "ConvTranspose", "ConvInteger", "QLinearConv"):
            continue
        name = node.input[3] if node.op_type == "QLinearConv" else node.input[1]
        while name not in stored and name in through:
            name = through[name]
        if name in stored:
            values = onnx.numpy_helper.to_array(stored[name], str(path.parent))
            own = name.removesuffix("_q").removesuffix("_quantized")
            rows[name] = SparsityRow(own, values.size, values.size - int(np.count_nonzero(values)))
    return list(rows.values())


def file_sizes(path: Path) -> dict[str, int]:
    """`bytes` of a file, and `compressed`: what they are as zlib's stream at level 6 (gzip's, but for a few bytes of header)."""
    packer, compressed, plain = zlib.compressobj(LEVEL), 0, 0
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            plain += len(piece)
            compressed += len(packer.compress(piece))
    return {"bytes": plain, "compressed": compressed + len(packer.flush())}


def table(rows: Sequence[SparsityRow], totals: Sequence[SparsityRow]) -> str:
    """A line per layer and per total; a layer without any weight left is pointed at."""
    width = max(len(row.name) for row in (*rows, *totals)) + 2
    lines = [f"{'layer':<{width}}{'weights':>12}{'zeros':>12}{'share':>9}"]
    lines += [_line(row, width) + ("  every weight is zero" if row.weights and row.zeros == row.weights else "") for row in rows]
    return "\n".join([*lines, *(_line(row, width) for row in totals)])


def _line(row: SparsityRow, width: int) -> str:
    return f"{row.name:<{width}}{row.weights:>12,}{row.zeros:>12,}{row.share:>9.2%}"


def size_line(path: Path, sizes: Mapping[str, int]) -> str:
    """What a file weighs, plain and compressed."""
    plain, compressed = sizes["bytes"], sizes["compressed"]
    return f"{path.name}: {plain / 1e6:.2f} MB, {compressed / 1e6:.2f} MB compressed (gzip -{LEVEL}; {compressed / max(plain, 1):.0%})"


def checkpoint_report(weights: Path, names: Sequence[str] | None = None) -> tuple[dict[str, Any], str]:
    """What the checkpoint `weights` holds, as plain data and as the log's table. `names`: those that a recipe makes sparse; default: all prunable."""
    state = load_model(weights).state
    rows = sparsity_rows(state)
    totals = {"prunable": total(rows, "prunable weights"), "parameters": total(parameter_rows(state), "all parameters")}
    totals["recipe"] = total(rows if names is None else sparsity_rows(state, names), "weights of the recipe")
    shown = [
        totals[key] for key in ("recipe", "prunable", "parameters") if key != "recipe" or totals[key].weights != totals["prunable"].weights
    ]
    sizes = file_sizes(weights)
    content = {
        "file": weights.name, **sizes, **{key: row.as_json() for key, row in totals.items()}, "layers": [row.as_json() for row in rows],
    }  # fmt: skip
    return content, f"{table(rows, shown)}\n{size_line(weights, sizes)}"


def report_sparsity(files: Sequence[Path], folder: Path, names: Sequence[str] | None = None, target: float | None = None) -> None:
    """Write `folder`/sparsity.json about checkpoints, stripped as they are left behind, and log the first one's table and everyone's size.

    `names`, `target`: the weights of the recipe, and the sparsity that it asks of them.
    """
    reports = {path: checkpoint_report(path, names) for path in files}
    write_json(folder / "sparsity.json", {"target": target, "files": [content for content, _ in reports.values()]})
    (first, (content, text)), *others = reports.items()
    asked = f" (the recipe asks for {target:.1%} and has {content['recipe']['sparsity']:.2%})" if target is not None else ""
    LOGGER.info(f"zeros in {first}, counted in the file{asked}:\n{text}")
    for path, (content, _) in others:
        LOGGER.info(f"{size_line(path, content)}, sparsity {content['recipe']['sparsity']:.2%}")
    LOGGER.info(ADVICE)
