"""Zeros counted in what was saved: checkpoint and ONNX, the table, the sizes, the json, and the observer's curves and lines."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from engine.ema import Ema
from engine.loop import Loop
from engine.observers import TensorBoard
from engine.recipe.modifiers import ConstantPruningModifier, GlobalMagnitudePruningModifier, Modifier
from engine.recipe.observers import SparsityLog
from engine.recipe.pruner import MagnitudePruner
from engine.recipe.run import report_recipe
from engine.recipe.selectors import prunable
from engine.seams import EpochRecord, Seams
from engine.sparsity_report import (
    ADVICE,
    SparsityRow,
    checkpoint_report,
    file_sizes,
    onnx_sparsity,
    parameter_rows,
    sparsity_rows,
    table,
    total,
)
from models.checkpoint import Model, save_model, stripped
from models.metadata import Metadata
from models.network import Network
from models.onnx_writer import onnx_model
from tests.helpers import alive, small
from utils.errors import InputError

HEADS = ("model.14.m.0.weight", "model.14.m.1.weight")


def pruned(final: float = 0.8, **fields: object) -> tuple[Network, MagnitudePruner]:
    network = alive(small())
    pruner = MagnitudePruner(
        [GlobalMagnitudePruningModifier(0.0, 1.0, init_sparsity=0.0, final_sparsity=final, **fields)], network, epochs=2, batches=1
    )
    pruner.update(1.0)
    return network, pruner


def save(network: Network, path: Path) -> Path:
    save_model(path, stripped(Model(network.blocks, network.state_dict(), ("a", "b", "c"), 64)))
    return path


def test_rows_and_totals_count_exact_zeros() -> None:
    network, pruner = pruned()
    rows = sparsity_rows(network.state_dict())
    assert [row.name for row in rows] == prunable(network) == pruner.names
    for row in rows:
        weight = network.get_parameter(row.name)
        assert (row.weights, row.zeros) == (weight.numel(), int((weight == 0).sum()))
    whole = total(rows)
    assert whole.zeros == round(whole.weights * 0.8) and whole.share == pytest.approx(0.8, abs=1e-4)
    everything = total(parameter_rows(network.state_dict()))
    assert everything.weights == sum(p.numel() for p in network.parameters()) and everything.zeros == whole.zeros
    assert sparsity_rows(network.state_dict(), HEADS)[1].name == HEADS[1] and sparsity_rows({}) == [] and total([]).share == 0


def test_the_table_has_every_layer_and_points_at_an_empty_one() -> None:
    text = table([SparsityRow("a.weight", 1000, 250), SparsityRow("b.weight", 16, 16)], [SparsityRow("prunable weights", 1016, 266)])
    assert text.splitlines() == [
        "layer                  weights       zeros    share",
        "a.weight                 1,000         250   25.00%",
        "b.weight                    16          16  100.00%  every weight is zero",
        "prunable weights         1,016         266   26.18%",
    ]


def test_sizes_are_those_of_gzip(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(bytes(3_000_000) + torch.randn(50_000).numpy().tobytes())
    sizes = file_sizes(path)
    assert sizes["bytes"] == 3_200_000
    assert sizes["compressed"] == pytest.approx(len(gzip.compress(path.read_bytes(), 6)), abs=20)


def test_a_saved_checkpoint_has_the_recipes_zeros_and_compresses(tmp_path: Path) -> None:
    network, pruner = pruned()
    content, text = checkpoint_report(save(network, tmp_path / "best.pt"))
    dense, _ = checkpoint_report(save(alive(small()), tmp_path / "dense.pt"))
    assert content["prunable"]["sparsity"] == pytest.approx(0.8, abs=1e-3) and content["recipe"]["zeros"] == content["prunable"]["zeros"]
    assert content["parameters"]["weights"] == sum(p.numel() for p in network.parameters()) and dense["prunable"]["zeros"] == 0
    assert content["bytes"] == dense["bytes"] == (tmp_path / "best.pt").stat().st_size
    assert content["compressed"] < 0.7 * dense["compressed"]
    assert len(content["layers"]) == len(pruner.names) and "weights of the recipe" not in text
    assert text.splitlines()[-2].startswith("all parameters") and "MB compressed (gzip -6; " in text.splitlines()[-1]


def ended(pruner: MagnitudePruner) -> Loop:
    """A loop that has nothing but masks, as at a run's end."""
    return cast(Loop, SimpleNamespace(seams=Seams(masks=[pruner])))


def test_the_report_tells_a_recipes_own_weights_from_all(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    network, pruner = pruned(0.5, params=("re:model.1.*conv.weight", *HEADS))
    files = [save(network, tmp_path / name) for name in ("best.pt", "last.pt")]
    report_recipe(ended(pruner), files[0], files[1:], tmp_path)
    saved = json.loads((tmp_path / "sparsity.json").read_text())
    assert saved["target"] == 0.5 and [file["file"] for file in saved["files"]] == ["best.pt", "last.pt"]
    best = saved["files"][0]
    assert best["recipe"]["sparsity"] == pytest.approx(0.5, abs=1e-3) and best["prunable"]["sparsity"] < best["recipe"]["sparsity"]
    assert {"name", "weights", "zeros", "sparsity"} == best["layers"][0].keys() and {"bytes", "compressed", "parameters"} <= best.keys()
    said = capsys.readouterr().out
    assert f"zeros in {files[0]}, counted in the file (the recipe asks for 50.0% and has 50.0" in said
    assert "weights of the recipe" in said and "last.pt: " in said and said.splitlines()[-2] == ADVICE


def test_zeros_that_are_only_kept_are_reported_without_a_target(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    network, _ = pruned(0.6)
    keeper = MagnitudePruner([ConstantPruningModifier()], network, epochs=1, batches=1)
    keeper.update(0.0, last=True)
    report_recipe(ended(keeper), save(network, tmp_path / "last.pt"), [], tmp_path)
    assert json.loads((tmp_path / "sparsity.json").read_text())["target"] is None
    assert f"zeros in {tmp_path / 'last.pt'}, counted in the file:\n" in capsys.readouterr().out


def test_an_onnx_file_has_the_zeros_of_its_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    network, pruner = pruned()
    path = tmp_path / "a.onnx"
    path.write_bytes(onnx_model(network, Metadata(("a", "b", "c"), 16, (64, 64))))
    rows = onnx_sparsity(path)
    assert {row.name: (row.weights, row.zeros) for row in rows} == {
        row.name: (row.weights, row.zeros) for row in sparsity_rows(network.state_dict())
    }
    assert total(rows).share == pytest.approx(0.8, abs=1e-4)


def test_weights_stored_as_integers_are_found_behind_their_dequantisation(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    values = np.arange(-8, 8, dtype=np.int8).reshape(4, 1, 2, 2)
    tensors = {
        "a.weight_q": values, "a.scale": np.float32(0.1), "a.zero": np.int8(0), "grid": np.zeros((1, 1, 4, 4), np.float32),
        "b.weight": np.zeros((2, 4, 1, 1), np.float32),
    }  # fmt: skip
    nodes = [
        helper.make_node("DequantizeLinear", ["a.weight_q", "a.scale", "a.zero"], ["a.weight"]),
        helper.make_node("Conv", ["x", "a.weight"], ["y"]),
        helper.make_node("Conv", ["y", "b.weight"], ["z"]),
        helper.make_node("Add", ["z", "grid"], ["out"]),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "out")]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], [numpy_helper.from_array(np.asarray(v), k) for k, v in tensors.items()])
    onnx.save(helper.make_model(graph), str(tmp_path / "q.onnx"))
    assert onnx_sparsity(tmp_path / "q.onnx") == [SparsityRow("a.weight", 16, 1), SparsityRow("b.weight", 8, 8)]


def test_what_is_no_onnx_file_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    (tmp_path / "a.onnx").write_bytes(b"not a model at all")
    with pytest.raises(InputError, match="a.onnx: is no ONNX model"):
        onnx_sparsity(tmp_path / "a.onnx")
    with pytest.raises(InputError, match="no file"):
        onnx_sparsity(tmp_path / "b.onnx")


# ---- over the epochs -----------------------------------------------------------------------------------------------------------


def watched(tmp_path: Path, modifier: Modifier, network: Network) -> dict[str, list[float]]:
    """Three epochs of two batches under the observer, the EMA following at once; its scalars, by tag."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    pruner = MagnitudePruner([modifier], network, epochs=3, batches=2)
    loop = SimpleNamespace(ema=Ema(network), start_epoch=0)
    board = TensorBoard(tmp_path / "board")
    log = SparsityLog(board, pruner)
    board.train_start(loop)
    log.train_start(loop)
    for step in range(6):
        pruner.update(step / 2, step == 5)
        pruner.apply(loop.ema.network)
        if step % 2:
            assert log.epoch_end(loop, EpochRecord(step // 2, {}, {}, {}, 0.0, True)) is False
    log.train_end(loop)
    board.train_end(loop)
    events = accumulator.EventAccumulator(str(tmp_path / "board")).Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_sparsity_is_logged_by_layer_and_epoch_beside_its_target(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    modifier = GlobalMagnitudePruningModifier(0.0, 3.0, init_sparsity=0.1, final_sparsity=0.7, inter_func="linear")
    network = alive(small())
    scalars = watched(tmp_path, modifier, network)
    assert scalars["sparsity/total"] == pytest.approx([0.1, 0.3, 0.7], abs=1e-3)
    assert scalars.keys() == {"sparsity/total", *(f"sparsity/{name.removesuffix('.weight')}" for name in prunable(network))}
    last = {row.name: row.share for row in sparsity_rows(network.state_dict())}
    assert all(scalars[f"sparsity/{name.removesuffix('.weight')}"][-1] == pytest.approx(share) for name, share in last.items())
    lines = [line.strip() for line in capsys.readouterr().out.splitlines() if line.strip().startswith("sparsity ")]
    assert lines == ["sparsity 10.0% (target 10.0%)", "sparsity 30.0% (target 30.0%)", "sparsity 70.0% (target 70.0%)"]


def test_zeros_that_are_only_kept_have_no_target(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    network, _ = pruned(0.6)
    scalars = watched(tmp_path, ConstantPruningModifier(), network)
    assert scalars["sparsity/total"] == pytest.approx([0.6] * 3, abs=1e-3)
    assert capsys.readouterr().out.count("sparsity 60.0%\n") == 3
