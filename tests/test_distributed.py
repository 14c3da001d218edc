"""Several processes: sums and shares, and real torchrun runs of the scripts against those of one process."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.autobatch import choose
from engine.image_weights import ImageWeights
from models.checkpoint import load_model
from models.network import Network, synchronise_norms
from tests.helpers import ROOT, alive, small, with_module, write_dataset
from utils.device import evaluation_workers, select_device, worker_count
from utils.errors import InputError
from utils.world import SOLO, World

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def run(*command: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([str(c) for c in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def test_shares_make_the_mean_over_processes_the_mean_over_items() -> None:
    a, b = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([5.0])
    counts = torch.tensor([len(a), len(b)])
    shares = [World(rank, 2).share(n.float(), counts.sum()) for rank, n in enumerate(counts)]
    assert float(shares[0] * a.mean() + shares[1] * b.mean()) / 2 == pytest.approx(float(torch.cat((a, b)).mean()))
    assert World(0, 2).share(torch.zeros(1), torch.zeros(1)).item() == 0, "nothing anywhere is no share, not a division by zero"
    assert SOLO.share(torch.tensor([3.0, 0.0]), torch.tensor([3.0, 0.0])).tolist() == [1, 1]


def test_devices_and_workers_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert select_device("", World(1, 2, 1, 2)) == torch.device("cuda:1")
    assert select_device("2,3", World(5, 8, 1, 2)) == torch.device("cuda:3")
    assert select_device("3") == select_device("cuda:3") == torch.device("cuda:3")
    assert select_device("cpu", World(1, 8, 1, 8)) == torch.device("cpu")
    for text, world, wrong in (("0,1", SOLO, "torchrun --nproc_per_node 2"), ("4", SOLO, "has 4 CUDA"), ("x", SOLO, "give cpu"),
                               ("0", World(1, 2, 1, 2), "2 processes share 1")):  # fmt: skip
        with pytest.raises(InputError, match=wrong):
            select_device(text, world)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert (worker_count(8), worker_count(8, World(0, 2, 0, 2)), worker_count(8, World(0, 16, 0, 16))) == (8, 4, 1)
    cpu, gpu = torch.device("cpu"), torch.device("cuda:0")
    assert (evaluation_workers(8, gpu), evaluation_workers(8, cpu), evaluation_workers(2, cpu)) == (8, 3, 2)
    assert evaluation_workers(8, cpu, World(0, 4, 0, 4)) == 0


@pytest.mark.parametrize("most", [1, 3, 16, 37, 1000, 5000])
def test_the_batch_chosen_fits_and_is_near_the_largest(most: int) -> None:
    tried = []

    def probe(batch: int) -> int | None:
        tried.append(batch)
        return 1000 + 100 * batch if batch <= most else None

    chosen = choose(probe, 10**9)
    assert chosen <= min(most, 1024) and chosen >= 0.7 * min(most, 1024) and chosen in tried
    assert choose(probe, 1000) == 0
    assert choose(lambda b: 1000 + 100 * b, 1000 + 100 * 50) == 50


def test_image_weights_follow_yolov5s_formula_and_draw_rare_classes_more_often() -> None:
    class Loader:
        def draw(self, positions: np.ndarray | None) -> None:
            self.drawn = positions

    class Result:
        classes, ap, map = np.array([0]), np.array([[0.8, 0.4]]), 0.6

    rows = [np.array([[0, 0.5, 0.5, 0.1, 0.1]])] * 9 + [np.array([[1, 0.5, 0.5, 0.1, 0.1], [0, 0.5, 0.5, 0.1, 0.1]])]
    loader = Loader()
    weights = ImageWeights(loader, rows, 3, seed=0)
    share = np.array([1 / 10, 1 / 1, 1 / 1]) / 2.1  # ten labels of class 0, one of class 1, none of class 2
    assert weights.weights() == pytest.approx([share[0]] * 9 + [share[0] + share[1]])
    draws = []
    for epoch in range(60):
        weights.before_epoch(None, epoch)
        draws.append(loader.drawn)
    assert np.mean(np.array(draws) == 9) == pytest.approx(1.1 / 2.0, abs=0.05), "its weight over the sum of all"
    weights.observe(Result)
    assert weights.maps == pytest.approx([0.6, 0.6, 0.6])
    assert weights.weights() == pytest.approx((np.array([share[0]] * 9 + [share[0] + share[1]])) * 0.16)
    other = ImageWeights(loader, rows, 3, seed=0)
    other.load_state_dict(weights.state_dict())
    assert other.weights() == pytest.approx(weights.weights())
    empty = ImageWeights(loader, [np.zeros((0, 5))] * 3, 3, seed=0)
    empty.before_epoch(None, 0)
    assert loader.drawn is None


@pytest.mark.parametrize("blocks", [small(), with_module("BottleneckCSP", [24])])
def test_synchronised_norms_keep_the_keys_and_the_outputs(blocks) -> None:
    network = alive(blocks)
    image, state = torch.rand(2, 3, 64, 64), network.state_dict()
    before = network(image)
    synchronise_norms(network)
    norms = [m for m in network.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    assert all(isinstance(m, torch.nn.SyncBatchNorm) for m in norms) and norms
    assert network.state_dict().keys() == state.keys()
    assert all(torch.equal(a, b) for a, b in zip(before, network(image)))
    assert isinstance(Network(blocks), Network)


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """Frozen norms: equal losses, step by step, with mosaic, accumulation, distillation and sparsity, and a last batch of one image."""
    data = write_dataset(tmp_path / "data", images=13)
    sizes = "--images 13 --img 64 --batch 4 --epochs 2".split()
    records = []
    for processes in ("1", "2"):
        out = tmp_path / f"{processes}.json"
        result = run(*TORCHRUN[:-1], processes, "benchmarks/two_processes.py", "--frozen", "--data", data, "--out", out, *sizes)
        assert result.returncode == 0, result.stderr
        records.append(json.loads(out.read_text()))
    one, two = (np.array(r["steps"]) for r in records)
    assert one.shape == two.shape == (8, 4)
    assert np.abs(one - two).max() < 1e-4 and np.ptp(one[:, 0]) > 1e-3
    assert records[1]["aligned"]


def test_torchrun_of_train_and_val_writes_once_and_resumes(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", images=6)
    common = ["--data", data, "--img", 64, "--project", tmp_path / "runs", "--workers", 0]
    trained = run(*TORCHRUN, "train.py", "--cfg", "models/yolov5n.yaml", "--batch", 4, "--epochs", 2, "--patience", 0, *common)
    assert trained.returncode == 0, trained.stderr
    assert trained.stdout.count("results saved to") == 1 and "2 processes" in trained.stdout
    folder = tmp_path / "runs" / "exp"
    assert not (tmp_path / "runs" / "exp2").exists()
    rows = list(csv.reader((folder / "results.csv").open()))
    assert [int(row[0]) for row in rows[1:]] == [0, 1]
    assert len(list(folder.glob("events.out.tfevents.*"))) == 2, "the training, and the pictures at its end"
    last = folder / "weights" / "last.pt"
    for name, command in (("one", [sys.executable]), ("two", TORCHRUN)):
        measured = run(*command, "val.py", "--weights", last, "--name", name, "--save-json", *common)
        assert measured.returncode == 0, measured.stderr
        assert measured.stdout.count("results saved to") == 1
    one, two = (json.loads((tmp_path / "runs" / name / "metrics.json").read_text()) for name in ("one", "two"))
    assert one["images"] == two["images"] == 6 and one["instances"] == two["instances"]
    for key in ("precision", "recall", "map50", "map"):
        assert one[key] == pytest.approx(two[key], abs=1e-6)
    a, b = (json.loads((tmp_path / "runs" / name / "last_predictions.json").read_text()) for name in ("one", "two"))
    assert [(r["image_id"], r["category_id"], r["bbox"]) for r in a] == [(r["image_id"], r["category_id"], r["bbox"]) for r in b]
    assert load_model(last).epoch == -1


def test_sync_bn_and_too_many_processes_are_refused_in_one_line(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", images=2)
    refused = run(sys.executable, "train.py", "--cfg", "models/yolov5n.yaml", "--data", data, "--sync-bn", "--device", "cpu")
    assert refused.returncode == 2 and refused.stderr.startswith("error: --sync-bn") and refused.stderr.count("\n") == 1
