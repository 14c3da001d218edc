"""TensorBoard's graph of the network. (What a whole run shows is read back in test_scripts.py.)"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from engine.ema import Ema
from engine.observers import TensorBoard
from models.network import Network
from tests.helpers import small
from utils.device import Precision


def _loop(start_epoch: int = 0) -> SimpleNamespace:
    return SimpleNamespace(ema=Ema(Network(small())), start_epoch=start_epoch, precision=Precision(torch.device("cpu")))


def test_the_graph_leaves_weights_and_random_numbers_alone(tmp_path: Path) -> None:
    loop, board = _loop(), TensorBoard(tmp_path)
    board.train_start(loop)
    before, random = {k: v.clone() for k, v in loop.ema.network.state_dict().items()}, torch.get_rng_state()
    board.batch_end(loop, 0, torch.zeros(2, 3, 64, 64, dtype=torch.uint8), torch.zeros(0, 6), torch.zeros(3))
    assert torch.equal(random, torch.get_rng_state()) and not loop.ema.network.training
    assert all(torch.equal(v, before[k]) for k, v in loop.ema.network.state_dict().items())
    board.train_end(loop)


def test_a_graph_that_fails_is_a_line_in_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no tracing today\nsecond line")

    monkeypatch.setattr(torch.jit, "trace", broken)
    for start, said in ((0, 1), (1, 0)):  # a resumed run has its graph already
        loop, board = _loop(start), TensorBoard(tmp_path)
        board.train_start(loop)
        for index in range(2):
            board.batch_end(loop, index, torch.zeros(1, 3, 64, 64, dtype=torch.uint8), torch.zeros(0, 6), torch.zeros(3))
        board.train_end(loop)
        assert capsys.readouterr().out.count("TensorBoard: no graph of this model (no tracing today)\n") == said
