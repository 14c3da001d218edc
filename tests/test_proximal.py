"""Proximal sparsity training: exact steps, true zeros, once per optimizer step, zeros of the EMA, resume equality, and the flags."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.loop import Loop
from engine.optim import build_optimizer
from engine.options import TrainOptions
from engine.schedule import ScheduleOptions, YoloSchedule, cosine
from engine.seams import Observer, Seams
from engine.session import resume, train
from models.checkpoint import Model, load_model, save_model
from models.network import Network
from pruning.proximal import ProximalStep, reach
from pruning.sparsity import SparsityOptions, penalised
from tests.helpers import alive, small, write_dataset
from tests.test_training import CPU, gamma_of, make_loop
from utils.device import Precision
from utils.errors import InputError

GAMMA = "model.0.bn.weight"


def step_of(network: Network, options: SparsityOptions, optimizer: torch.optim.Optimizer | None = None, epochs: int = 1) -> ProximalStep:
    return ProximalStep(["model.0.bn"], options, epochs, network, optimizer or torch.optim.SGD(network.parameters(), lr=0.1))


def proximal_loop(options: SparsityOptions, epochs: int = 1, silent: bool = True, **kwargs: object) -> Loop:
    """A loop with the step in both of its seams; `silent`: without a gradient from the task, and with plain SGD at lr 0.01."""
    loop = make_loop(epochs=epochs, **kwargs)
    if silent:
        loop.optimizer = torch.optim.SGD([{"params": [p], "role": "norm"} for p in loop.network.parameters()], lr=0.01)
        accumulate = loop.schedule.options.accumulate
        loop.schedule = YoloSchedule(loop.optimizer, ScheduleOptions(epochs, 0.01, 1.0, 0.0, 0, 0.0, 0.0, accumulate))
        forward = lambda self, network, images, targets: (sum(m.float().sum() for m in network(images)) * 0, torch.zeros(3))  # noqa: E731
        loop.objective = type("Silent", (), {"names": ("a", "b", "c"), "__call__": forward})()
    step = step_of(loop.network, options, loop.optimizer, epochs)
    loop.seams = Seams(masks=[step], transitions=[step])
    return loop


# ---- one step ------------------------------------------------------------------------------------------------------------------


def test_gamma_moves_by_exactly_lr_s_and_stops_at_zero() -> None:
    network = Network(small())
    start = torch.tensor([1.0, -1.0, 0.3, -0.3, 0.002, -0.002, 0.001, 0.0])
    gamma_of(network).data.copy_(start)
    step_of(network, SparsityOptions(0.02)).apply(network)  # lr 0.1: the threshold is 0.002
    torch.testing.assert_close(
        gamma_of(network).detach(), torch.tensor([0.998, -0.998, 0.298, -0.298, 0.0, 0.0, 0.0, 0.0]), atol=1e-7, rtol=0
    )
    assert (gamma_of(network)[4:] == 0).all(), "true zeros, not small values"
    assert network.get_parameter("model.0.bn.bias").abs().max() == 0 and network.get_parameter("model.1.bn.weight").unique() == 1


def test_each_group_has_its_own_current_rate() -> None:
    network = Network(small())
    network.get_parameter("model.0.bn.bias").data.fill_(-0.5)
    optimizer = build_optimizer(network, "AdamW", 0.01, 0.9, 0.0)
    step = step_of(network, SparsityOptions(2.0, beta=3.0), optimizer)
    optimizer.load_state_dict(optimizer.state_dict())  # a resume replaces the groups
    for group in optimizer.param_groups:
        group["lr"] = {"norm": 0.1, "bias": 0.05, "weight": 1.0}[group["role"]]
    step.apply(network)
    assert gamma_of(network).unique().tolist() == pytest.approx([1 - 0.1 * 2.0])
    assert network.get_parameter("model.0.bn.bias").unique().tolist() == pytest.approx([-0.5 + 0.05 * 3.0])


def test_decay_follows_the_epoch_and_frozen_gammas_are_left_alone() -> None:
    network = Network(small())
    step = step_of(network, SparsityOptions(0.02, decay=True), epochs=10)
    step.before_epoch(None, 9)
    step.apply(network)
    assert gamma_of(network).unique().tolist() == pytest.approx([1 - 0.1 * 0.02 * 0.19])
    gamma_of(network).requires_grad_(False)
    before = gamma_of(network).clone()
    step.apply(network)
    assert torch.equal(gamma_of(network), before)


@pytest.mark.parametrize(("pull", "stays"), [(0.9, True), (1.1, False)])
def test_a_gamma_stays_at_zero_while_the_gradient_is_below_s(pull: float, stays: bool) -> None:
    """The optimality condition of L1: zero is the minimum exactly where |gradient| <= s."""
    network = Network(small())
    gamma_of(network).data.zero_()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    step = step_of(network, SparsityOptions(1.0), optimizer)
    for _ in range(3):
        gamma_of(network).grad = torch.full((8,), pull)
        optimizer.step()
        step.apply(network)
    assert bool((gamma_of(network) == 0).all()) is stays


# ---- in the loop ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", [CPU, Precision(torch.device("cpu"), torch.bfloat16)], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_step_is_exact_under_clipping_accumulation_and_amp(precision: Precision, accumulate: int) -> None:
    loop = proximal_loop(SparsityOptions(5.0), batches=2, accumulate=accumulate, precision=precision)
    loop.run()
    torch.testing.assert_close(gamma_of(loop.network).detach(), torch.full((8,), 1 - 2 // accumulate * 0.01 * 5.0))


def test_the_ema_follows_the_gammas_and_takes_their_zeros() -> None:
    loop = proximal_loop(SparsityOptions(10.0), epochs=2, batches=3)  # 0.1 per step, six steps
    start = torch.tensor([1.0, -1.0, 0.65, 0.35, 0.25, 0.15, 0.05, 0.0])
    gamma_of(loop.network).data.copy_(start)
    loop.ema.network.load_state_dict(loop.network.state_dict())
    loop.ema.decay, loop.ema.tau = 0.9, 1e-9  # a plain moving average, slow beside six steps
    loop.run()
    mine, average = gamma_of(loop.network).detach(), gamma_of(loop.ema.network)
    torch.testing.assert_close(mine, torch.tensor([0.4, -0.4, 0.05, 0.0, 0.0, 0.0, 0.0, 0.0]), atol=1e-6, rtol=0)
    assert torch.equal(average == 0, mine == 0), "what is evaluated and saved has the zeros"
    expected = 1.0
    for now in (0.9, 0.8, 0.7, 0.6, 0.5, 0.4):
        expected = 0.9 * expected + 0.1 * now
    assert average[0].item() == pytest.approx(expected), "where it is not zero it is the plain average, not thresholded once more"


def test_two_epochs_equal_one_and_one_resumed() -> None:
    options = SparsityOptions(3.0, decay=True)
    whole = proximal_loop(options, epochs=2, silent=False, optimizer="AdamW")
    whole.run()
    first = proximal_loop(options, epochs=2, silent=False, optimizer="AdamW")
    first.seams.observers.append(type("Stop", (Observer,), {"epoch_end": lambda self, loop, record: True})())
    first.run()
    state, ema = first.state_dict() | {"stopped": False}, {k: v.clone() for k, v in first.ema.network.state_dict().items()}
    second = proximal_loop(options, epochs=2, silent=False, optimizer="AdamW")
    second.load_state_dict(state, ema, 0)
    second.run()
    assert not torch.equal(gamma_of(first.network), gamma_of(whole.network))
    for a, b in ((whole.network, second.network), (whole.ema.network, second.ema.network)):
        assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


def test_reach_is_how_far_a_gamma_travels_without_a_task() -> None:
    options = SparsityOptions(2.0, decay=True)
    loop = proximal_loop(options, epochs=3, batches=2)
    loop.run()
    travelled = 1 - gamma_of(loop.network)[0].item()
    assert reach([0.01] * 3, [2.0, 2.0 * 0.7, 2.0 * 0.4], 2) == pytest.approx(travelled, rel=1e-5)


# ---- the script ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TrainOptions]:
    root = tmp_path_factory.mktemp("proximal")
    data, start, hyp = write_dataset(root / "data"), root / "start.pt", root / "hyp.yaml"
    network = alive(small())
    save_model(start, Model(network.blocks, network.state_dict(), ("a", "b", "c"), 64))
    hyp.write_text("warmup_epochs: 0\nlr0: 0.01\nlrf: 0.1\n")
    common = TrainOptions(
        str(data), weights=str(start), hyp=str(hyp), epochs=2, batch_size=4, imgsz=64, workers=0, project=str(root), device="cpu", sr=0.5
    )
    return lambda **changes: replace(common, **changes)


def test_a_real_run_saves_true_zeros_and_resumes_to_the_same_weights(
    base: Callable[..., TrainOptions], capsys: pytest.CaptureFixture
) -> None:
    options = base(sr=30.0, sparsity_method="proximal", name="whole", cos_lr=True)
    whole = train(options)
    model = load_model(whole / "weights" / "last.pt")
    gammas = torch.cat([model.state[f"{path}.weight"] for path in penalised(model.blocks, True)])
    assert 0.02 < (gammas == 0).float().mean() < 1, "zeros in the saved file, and not only zeros"
    printed = capsys.readouterr().out
    taken = 0.01 * 30 * (cosine(0, 2, 0.1) + cosine(1, 2, 0.1))  # one step per epoch
    (line,) = [line for line in printed.splitlines() if line.startswith("sparsity (")]
    assert line.startswith("sparsity (proximal): ") and line.endswith(f"over the run it alone takes {taken:.2g} off a gamma")
    assert "exactly zero), strength 30" in printed and model.options["sparsity_method"] == "proximal"

    from engine import observers

    keep = observers.Checkpoints.epoch_end

    def stop_in_the_second(self, loop, record):
        if record.epoch == 1:
            raise KeyboardInterrupt
        return keep(self, loop, record)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(observers.Checkpoints, "epoch_end", stop_in_the_second)
        with pytest.raises(KeyboardInterrupt):
            train(replace(options, name="cut"))
    resumed = load_model(resume(Path(options.project) / "cut") / "weights" / "last.pt")
    assert all(torch.equal(value, resumed.state[key]) for key, value in model.state.items())


def test_an_unknown_method_is_refused_and_old_options_are_subgradient() -> None:
    with pytest.raises(InputError, match="--sparsity-method prox: choose subgradient or proximal"):
        TrainOptions("d.yaml", sr=0.1, sparsity_method="prox")
    assert TrainOptions.from_saved({"data": "d.yaml", "sr": 0.1}).sparsity_method == "subgradient"
    assert "--sparsity-method" not in TrainOptions("d.yaml", sr=0.1).command()
    assert TrainOptions("d.yaml", sr=0.1, sparsity_method="proximal").command().endswith("--sparsity-method proximal")
