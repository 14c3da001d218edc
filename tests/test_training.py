"""Loss, schedules, seams and the loop: values against brute force, exact sparsity steps, seam order, resume equality."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import nn

from engine.ema import Ema
from engine.loop import Loop, LoopOptions
from engine.objectives import DetectionObjective, DistillationObjective
from engine.observers import EarlyStopping
from engine.optim import build_optimizer, parameter_groups
from engine.options import TrainOptions
from engine.schedule import ScheduleOptions, YoloSchedule, cosine, linear, warmup_batches
from engine.seams import EpochRecord, Observer, Seams
from engine.session import resume, train
from models.checkpoint import load_model
from models.network import Network, replace_anchors
from pruning.sparsity import SparsityOptions, SparsityTerm, advice, equivalent_scale, near_zero_share, penalised
from tests.helpers import alive, small, stock, write_dataset
from utils.boxes import ciou
from utils.device import Precision
from utils.errors import InputError
from utils.loss import DetectionLoss, LossOptions, assign

CPU = Precision(torch.device("cpu"))


# ---- assignment and loss -------------------------------------------------------------------------------------------------------


def brute_force(targets: np.ndarray, anchors: np.ndarray, rows: int, columns: int, anchor_t: float) -> set[tuple]:
    """The rules read aloud: (image, class, anchor, row, column, x, y, w, h) of every match."""
    found = set()
    for image, cls, cx, cy, w, h in targets.tolist():
        gx, gy, gw, gh = cx * columns, cy * rows, w * columns, h * rows
        for a, (aw, ah) in enumerate(anchors.tolist()):
            if max(gw / aw, aw / gw, gh / ah, ah / gh) >= anchor_t:
                continue
            cells = [(int(gx), int(gy))]
            if gx % 1 < 0.5 and gx > 1:
                cells.append((int(gx - 0.5), int(gy)))
            if gy % 1 < 0.5 and gy > 1:
                cells.append((int(gx), int(gy - 0.5)))
            if (columns - gx) % 1 < 0.5 and columns - gx > 1:
                cells.append((int(gx + 0.5), int(gy)))
            if (rows - gy) % 1 < 0.5 and rows - gy > 1:
                cells.append((int(gx), int(gy + 0.5)))
            for x, y in cells:
                x, y = min(max(x, 0), columns - 1), min(max(y, 0), rows - 1)
                found.add((int(image), int(cls), a, y, x, *(round(v, 3) for v in (gx - x, gy - y, gw, gh))))
    return found


@pytest.mark.parametrize("seed", range(5))
def test_assignment_equals_brute_force(seed: int) -> None:
    rng = np.random.default_rng(seed)
    targets = np.column_stack([rng.integers(0, 4, 60), rng.integers(0, 3, 60), rng.random((60, 2)), rng.random((60, 2)) * 0.5 + 0.01])
    targets[:4, 2:4] = [[0, 0], [1, 1], [0.999, 0.001], [0.5, 0.5]]
    anchors = np.array([[1.25, 1.6], [2.0, 3.75], [4.1, 2.9]])
    m = assign(torch.tensor(targets), torch.tensor(anchors), 10, 14, 4.0)
    got = {
        (int(i), int(c), int(a), int(y), int(x), *(round(float(v), 3) for v in box))
        for i, c, a, y, x, box in zip(m.image, m.cls, m.anchor, m.row, m.column, m.box)
    }
    assert got == brute_force(targets, anchors, 10, 14, 4.0)
    assert (m.box[:, :2] > -0.5 - 1e-9).all() and (m.box[:, :2] < 1.5).all()


def test_loss_equals_a_loop_over_cells() -> None:
    network = alive(small())
    maps = [m.detach() for m in network(torch.rand(2, 3, 64, 64))]
    targets = torch.tensor([[0, 1, 0.4, 0.5, 0.3, 0.4], [1, 2, 0.7, 0.2, 0.2, 0.15], [1, 0, 0.31, 0.62, 0.5, 0.6]])
    options = LossOptions(cls=0.7, label_smoothing=0.1, obj_pw=1.3)
    loss, parts = DetectionLoss(network.anchors, network.strides, 3, 320, options)(maps, targets)

    box = obj = cls = 0.0
    for raw, anchors, stride, balance in zip(maps, network.anchors, network.strides, (4.0, 1.0)):
        cells = anchors / stride
        m = assign(targets, cells, raw.shape[2], raw.shape[3], 4.0)
        p = raw.view(2, 3, 8, *raw.shape[2:])
        wanted = torch.zeros(2, 3, *raw.shape[2:])
        ious, classes = [], []
        for i, a, y, x, c, t in zip(m.image, m.anchor, m.row, m.column, m.cls, m.box):
            logits = p[i, a, :, y, x]
            s = logits[:4].sigmoid()
            predicted = torch.cat([s[:2] * 2 - 0.5, (s[2:] * 2) ** 2 * cells[a]])
            iou = ciou(predicted[None], t[None])[0]
            wanted[i, a, y, x] = iou.clamp(min=0)
            ious.append(1 - iou)
            one_hot = torch.full((3,), 0.05)
            one_hot[c] = 0.95
            classes.append(nn.functional.binary_cross_entropy_with_logits(logits[5:], one_hot))
        if ious:
            box += torch.stack(ious).mean()
            cls += torch.stack(classes).mean()
        obj += balance * nn.functional.binary_cross_entropy_with_logits(p[:, :, 4], wanted, pos_weight=torch.tensor(1.3))
    expected = torch.tensor([box * 0.05 * 1.5, obj * 1.0 * 0.25 * 1.5, cls * 0.7 * 3 / 80 * 1.5])
    torch.testing.assert_close(parts, expected, atol=1e-6, rtol=1e-5)
    assert float(loss) == pytest.approx(float(expected.sum()) * 2, rel=1e-5)


def test_loss_without_targets_is_objectness_alone_and_has_a_gradient() -> None:
    network = alive(small()).train()
    loss, parts = DetectionLoss(network.anchors, network.strides, 3, 64)(network(torch.rand(1, 3, 64, 64)), torch.zeros(0, 6))
    loss.backward()
    assert parts[0] == parts[2] == 0 and parts[1] > 0
    assert network.get_parameter("model.0.conv.weight").grad.abs().sum() > 0


def test_distillation_is_zero_at_the_teacher_and_independent_of_the_batch() -> None:
    network = alive(small())
    loss = DetectionLoss(network.anchors, network.strides, 3, 64)
    images, targets = torch.rand(2, 3, 64, 64), torch.tensor([[0, 1, 0.4, 0.5, 0.3, 0.4]])
    same = DistillationObjective(loss, alive(small()), network.anchors)(network, images, targets)[1]
    other = DistillationObjective(loss, alive(small(), seed=5), network.anchors)
    assert abs(float(same[3])) < 1e-4
    moved = replace_anchors(network.blocks, [[(2 * w, 2 * h) for w, h in level.tolist()] for level in network.anchors])
    teacher = Network(moved)
    teacher.load_state_dict(network.state_dict() | {"model.14.anchors": teacher.state_dict()["model.14.anchors"]})
    assert float(DistillationObjective(loss, teacher, network.anchors)(network, images, targets)[1][3]) > 1e-3, (
        "each is decoded with its own anchors"
    )
    once, twice = other(network, images, targets)[1][3], other(network, images.repeat(2, 1, 1, 1), targets)[1][3]
    assert float(once) > 0.01
    assert float(twice) == pytest.approx(float(once), rel=1e-4)


# ---- schedules, optimizer, EMA -------------------------------------------------------------------------------------------------


def test_curves() -> None:
    assert [linear(e, 10, 0.1) for e in (0, 5, 10)] == pytest.approx([1, 0.55, 0.1])
    assert [cosine(e, 10, 0.1) for e in (0, 5, 10)] == pytest.approx([1, 0.55, 0.1])
    assert (warmup_batches(3, 20), warmup_batches(3, 200), warmup_batches(0, 200)) == (100, 600, 0)


def test_schedule_warms_up_by_role() -> None:
    optimizer = build_optimizer(Network(small()), "SGD", 0.01, 0.937, 5e-4)
    schedule = YoloSchedule(optimizer, ScheduleOptions(10, 0.01, 0.01, 0.937, 100, 0.8, 0.1, 4))
    steps = {}
    for step in (0, 50, 100, 101):
        accumulate = schedule.batch(step, 0)
        steps[step] = (
            {g["role"]: round(g["lr"], 6) for g in optimizer.param_groups},
            round(optimizer.param_groups[0]["momentum"], 4),
            accumulate,
        )
    assert steps[0] == ({"bias": 0.1, "weight": 0.0, "norm": 0.0}, 0.8, 1)
    assert steps[50] == ({"bias": 0.055, "weight": 0.005, "norm": 0.005}, 0.8685, 2)
    assert steps[100] == steps[101] == ({"bias": 0.01, "weight": 0.01, "norm": 0.01}, 0.937, 4)
    schedule.batch(500, 5)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01 * (0.5 * 0.99 + 0.01))


def test_parameter_groups_by_role() -> None:
    network = Network(stock("n"))
    groups = parameter_groups(network)
    assert {k: len(v) for k, v in groups.items()} == {"bias": 60, "weight": 60, "norm": 57}
    decays = {g["role"]: g["weight_decay"] for g in build_optimizer(network, "AdamW", 0.001, 0.9, 0.05).param_groups}
    assert decays == {"bias": 0.0, "weight": 0.05, "norm": 0.0}


def test_ema_follows_the_formula_buffers_too() -> None:
    network = Network(small())
    ema = Ema(network)
    before = {k: v.clone() for k, v in ema.network.state_dict().items()}
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1)
    network.get_buffer("model.0.bn.running_mean").add_(2)
    ema.update(network)
    d = 0.9999 * (1 - math.exp(-1 / 2000))
    now = ema.network.state_dict()
    torch.testing.assert_close(now["model.0.conv.weight"], before["model.0.conv.weight"] + (1 - d))
    torch.testing.assert_close(now["model.0.bn.running_mean"], before["model.0.bn.running_mean"] + 2 * (1 - d))


# ---- sparsity ------------------------------------------------------------------------------------------------------------------


def gamma_of(network: Network) -> torch.Tensor:
    return network.get_parameter("model.0.bn.weight")


def test_plain_sgd_moves_gamma_by_exactly_lr_s_sign() -> None:
    network = Network(small())
    gamma = gamma_of(network)
    gamma.data[:4] *= -1
    start = gamma.detach().clone()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    SparsityTerm(penalised(network.blocks, True), SparsityOptions(0.02), 1).add(network)
    optimizer.step()
    torch.testing.assert_close(gamma.detach(), start - 0.1 * 0.02 * start.sign(), atol=0, rtol=1e-6)
    assert network.get_parameter("model.0.bn.bias").abs().max() == 0, "beta is left alone"


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_other_optimizers_take_their_own_step_for_the_penalty(name: str) -> None:
    network, twin = Network(small()), nn.Parameter(torch.ones(8))
    optimizer = build_optimizer(network, name, 0.01, 0.9, 0.0)
    kind = {"SGD": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, nesterov=True), "Adam": lambda p: torch.optim.Adam(p, 0.01, betas=(0.9, 0.999)),
            "AdamW": lambda p: torch.optim.AdamW(p, 0.01, betas=(0.9, 0.999), weight_decay=0)}[name]  # fmt: skip
    reference = kind([twin])
    term = SparsityTerm(["model.0.bn"], SparsityOptions(0.02), 1)
    for _ in range(3):
        optimizer.zero_grad()
        term.add(network)
        twin.grad = 0.02 * twin.detach().sign()
        optimizer.step()
        reference.step()
    torch.testing.assert_close(gamma_of(network).detach(), twin.detach())


def test_beta_term_and_decay_to_a_tenth() -> None:
    network = Network(small())
    network.get_parameter("model.0.bn.bias").data.fill_(-0.5)
    term = SparsityTerm(["model.0.bn"], SparsityOptions(0.02, decay=True, beta=0.3), 10)
    term.before_epoch(None, 9)
    term.add(network)
    assert gamma_of(network).grad.unique().tolist() == pytest.approx([0.02 * 0.19])
    assert network.get_parameter("model.0.bn.bias").grad.unique().tolist() == pytest.approx([-0.3])


def test_frozen_gammas_are_left_alone() -> None:
    network = Network(small())
    gamma_of(network).requires_grad_(False)
    SparsityTerm(["model.0.bn", "model.1.bn"], SparsityOptions(0.02), 1).add(network)
    assert gamma_of(network).grad is None and network.get_parameter("model.1.bn.weight").grad is not None


def test_penalised_sets_are_the_two_of_prune() -> None:
    blocks = stock("s")
    everything, without = penalised(blocks, True), penalised(blocks, False)
    assert len(everything) == 57
    tied = {"model.2.cv1", "model.2.m.0.cv2", "model.4.cv1", "model.4.m.0.cv2", "model.4.m.1.cv2", "model.6.cv1", "model.6.m.0.cv2",
            "model.6.m.1.cv2", "model.6.m.2.cv2", "model.8.cv1", "model.8.m.0.cv2"}  # fmt: skip
    assert set(everything) - set(without) == {f"{name}.bn" for name in tied}


def test_equivalent_scale_and_near_zero_share() -> None:
    assert equivalent_scale(0.004, 16) == 0.001
    assert equivalent_scale(0.004, 64) == equivalent_scale(0.004, 128) == 0.004
    assert near_zero_share([np.array([1.0, 0.04, 0.06]), np.array([10.0, 0.4])]) == 0.4


def test_advice_names_what_to_try() -> None:
    fine = [0.5, 0.5, 0.5]
    assert advice([1.0, 0.99, 0.98, 0.97], [0.0, 0.0, 0.0], fine, 12, 0.001).endswith("try --sr 0.003, or more epochs")
    assert "too strong" in advice([1.0, 0.5, 0.1, 0.01], [0.3, 0.6, 0.8], [0.5, 0.4, 0.05], 12, 0.03)
    assert advice([1.0, 0.9, 0.8, 0.7], [0.0, 0.0, 0.0], fine, 12, 0.001) is None
    assert advice([1.0, 1.0], [0.0], [0.5], 12, 0.001) is None


# ---- the loop ------------------------------------------------------------------------------------------------------------------


@dataclass
class _Batch:
    images: torch.Tensor
    targets: torch.Tensor
    total: int = 2


class _Data:
    """`n` fixed batches, different from epoch to epoch."""

    def __init__(self, n: int, batch: int = 2) -> None:
        self.n, self.batch = n, batch

    def __len__(self) -> int:
        return self.n

    def epoch(self, epoch: int):
        for i in range(self.n):
            g = torch.Generator().manual_seed(100 * epoch + i)
            images = torch.randint(0, 255, (self.batch, 3, 64, 64), generator=g, dtype=torch.uint8)
            yield _Batch(images, torch.tensor([[0, 1, 0.4, 0.5, 0.3, 0.4], [1, 2, 0.7, 0.2, 0.2, 0.15]]))


def make_loop(
    seams: Seams | None = None, epochs: int = 2, batches: int = 2, optimizer: str = "SGD", accumulate: int = 1, precision: Precision = CPU
) -> Loop:
    torch.manual_seed(0)
    network = Network(small())
    objective = DetectionObjective(DetectionLoss(network.anchors, network.strides, 3, 64))
    sgd = build_optimizer(network, optimizer, 0.01, 0.9, 0.0)
    schedule = YoloSchedule(sgd, ScheduleOptions(epochs, 0.01, 0.1, 0.9, 0, 0.8, 0.1, accumulate))
    evaluator = lambda network: (0.5, {"metrics/mAP_0.5": 0.5})  # noqa: E731
    return Loop(network, objective, sgd, schedule, _Data(batches), evaluator, precision, LoopOptions(epochs), seams or Seams())


def test_seams_are_called_in_the_fixed_order(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Spy(Observer):
        def add(self, network: Network) -> None:
            log.append("term")

        def apply(self, network: Network) -> None:
            log.append("mask ema" if network is loop.ema.network else "mask")

        def before_epoch(self, loop: Loop, epoch: int) -> None:
            log.append(f"transition {epoch}")

        def batch_end(self, *args) -> None:
            log.append("batch")

        def epoch_end(self, loop: Loop, record: EpochRecord) -> bool:
            log.append(f"epoch {record.epoch}")
            return False

    spy = Spy()
    loop = make_loop(Seams([spy], [spy], [spy], [spy]))
    step, update, schedule, clip = loop.optimizer.step, loop.ema.update, loop.schedule.batch, nn.utils.clip_grad_norm_
    monkeypatch.setattr(loop.optimizer, "step", lambda *a, **k: (log.append("step"), step(*a, **k))[1])
    monkeypatch.setattr(loop.ema, "update", lambda n: (log.append("ema"), update(n))[1])
    monkeypatch.setattr(loop.schedule, "batch", lambda *a: (log.append("schedule"), schedule(*a))[1])
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda *a, **k: (log.append("clip"), clip(*a, **k))[1])
    monkeypatch.setattr(loop, "evaluator", lambda network: (log.append("evaluate"), (0.1, {}))[1])
    loop.run()
    one = ["schedule", "clip", "term", "step", "mask", "ema", "mask ema", "batch"]
    assert log == ["transition 0", *one, *one, "evaluate", "epoch 0", "transition 1", *one, *one, "evaluate", "epoch 1"]


@pytest.mark.parametrize("precision", [CPU, Precision(torch.device("cpu"), torch.bfloat16)], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_penalty_is_exact_under_clipping_accumulation_and_amp(
    precision: Precision, accumulate: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the task's gradient taken away, what is left of a step is lr * s * sign, once per optimizer step."""
    seams = Seams([SparsityTerm(["model.0.bn"], SparsityOptions(5.0), 1)])
    loop = make_loop(seams, epochs=1, batches=2, accumulate=accumulate, precision=precision)
    plain = torch.optim.SGD([{"params": [p], "role": "norm"} for p in loop.network.parameters()], lr=0.01)
    loop.optimizer = plain
    loop.schedule = YoloSchedule(plain, ScheduleOptions(1, 0.01, 1.0, 0.0, 0, 0.0, 0.0, accumulate))

    def silent(network: Network, images: torch.Tensor, targets: torch.Tensor):
        return sum(m.float().sum() for m in network(images)) * 0, torch.zeros(3)

    loop.objective = type("Silent", (), {"names": ("a", "b", "c"), "__call__": lambda self, *a: silent(*a)})()
    loop.run()
    steps = 2 // accumulate
    torch.testing.assert_close(gamma_of(loop.network).detach(), torch.ones(8) - steps * 0.01 * 5.0)


def test_a_nan_loss_stops_with_the_remedy() -> None:
    loop = make_loop()
    loop.network.get_parameter("model.0.conv.weight").data.fill_(float("nan"))
    with pytest.raises(InputError, match="the last checkpoint is kept. Lower lr0"):
        loop.run()


def test_two_epochs_equal_one_and_one_resumed() -> None:
    def seams() -> Seams:
        term = SparsityTerm(["model.0.bn"], SparsityOptions(0.1, decay=True), 3)
        return Seams([term], [], [term], [EarlyStopping(9)])

    whole = make_loop(seams(), epochs=3)
    whole.run()
    first = make_loop(seams(), epochs=3)
    first.seams.observers.append(type("Stop", (Observer,), {"epoch_end": lambda self, loop, record: True})())
    first.run()
    first.seams.observers.pop()
    state, ema = first.state_dict() | {"stopped": False}, {k: v.clone() for k, v in first.ema.network.state_dict().items()}
    second = make_loop(seams(), epochs=3)
    second.load_state_dict(state, ema, 0)
    second.run()
    for a, b in ((whole.network, second.network), (whole.ema.network, second.ema.network)):
        assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))
    assert whole.ema.updates == second.ema.updates


def test_early_stopping_counts_from_the_last_best() -> None:
    stopping, record = EarlyStopping(2), EpochRecord(0, {}, {}, {}, 0.5, True)
    fitness = [0.5, 0.4, 0.5, 0.4, 0.3]
    assert [stopping.epoch_end(None, replace(record, epoch=i, fitness=f)) for i, f in enumerate(fitness)] == [
        False,
        False,
        False,
        False,
        True,
    ]


def test_a_real_run_resumes_to_the_same_weights_and_repeats_bit_by_bit(tmp_path) -> None:
    """Through files, the loader's workers and mosaic: 3 epochs = stopped after 2 and resumed; and no csv row stands twice."""
    data = write_dataset(tmp_path / "data")
    cfg = tmp_path / "small.yaml"
    import yaml

    from tests.helpers import SMALL_YAML

    cfg.write_text(yaml.safe_dump(SMALL_YAML))
    options = TrainOptions(
        str(data), cfg=str(cfg), epochs=3, batch_size=4, imgsz=64, workers=0, project=str(tmp_path), name="whole", device="cpu", sr=0.01
    )
    train(options)

    from engine import observers

    keep = observers.Checkpoints.epoch_end

    def stop_in_the_third(self, loop, record):
        if record.epoch == 2:
            raise KeyboardInterrupt
        return keep(self, loop, record)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(observers.Checkpoints, "epoch_end", stop_in_the_third)
        with pytest.raises(KeyboardInterrupt):
            train(replace(options, name="cut"))
    last = tmp_path / "cut" / "weights" / "last.pt"
    assert load_model(last).epoch == 1
    resume(last, workers=2)
    a, b = load_model(tmp_path / "whole" / "weights" / "last.pt"), load_model(last)
    assert all(torch.equal(a.state[k], b.state[k]) for k in a.state)
    rows = (tmp_path / "cut" / "results.csv").read_text().splitlines()
    assert [int(row.split(",")[0]) for row in rows[1:]] == [0, 1, 2]
    assert (
        rows[0]
        .replace(" ", "")
        .startswith(
            "epoch,train/box_loss,train/obj_loss,train/cls_loss,metrics/precision,metrics/recall,metrics/mAP_0.5,metrics/mAP_0.5:0.95,val/box_loss"
        )
    )
    for name in (
        "results.png",
        "labels.jpg",
        "train_batch0.jpg",
        "val_batch0_pred.jpg",
        "confusion_matrix.png",
        "PR_curve.png",
        "gammas.png",
        "opt.yaml",
        "hyp.yaml",
        "metrics.json",
    ):
        assert (tmp_path / "cut" / name).stat().st_size > 0, name
    with pytest.raises(InputError, match="is finished"):
        resume(last)
