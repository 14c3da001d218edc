"""Recipes drive the training: masks, phases, quantisation, distillation, errors, and resuming to the same run."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from engine import observers
from engine.loop import Loop
from engine.objectives import DistillationObjective, DistillOptions
from engine.observers import Checkpoints, EarlyStopping
from engine.options import TrainOptions
from engine.recipe.distill import RecipeDistillation
from engine.recipe.document import recipe_of
from engine.recipe.modifiers import (
    PRUNING,
    DistillationModifier,
    GlobalMagnitudePruningModifier,
    Modifier,
    QuantizationModifier,
    Recipe,
    TrainableParamsModifier,
)
from engine.recipe.phases import Phases
from engine.recipe.pruner import MagnitudePruner
from engine.recipe.run import heaviest_phase, warn_of_regrowth
from engine.recipe.schedule import Clock, RecipeSchedule
from engine.recipe.selectors import prunable
from engine.recipe.trainable import TrainableTransition
from engine.recipe.transition import QuantizationTransition, activation_bytes, scheme_of
from engine.seams import EpochRecord, Observer, Seams
from engine.session import resume, train
from models.checkpoint import Model, load_model, save_model
from models.network import Network
from models.quantization import QuantScheme, quantize
from tests.helpers import ROOT, SMALL_YAML, alive, small, stock, without_pictures_and_timings, write_dataset
from tests.test_training import make_loop
from utils.device import Precision
from utils.errors import InputError
from utils.loss import DetectionLoss

BOTH = """
version: 1.1.0
modifiers:
  - !EpochRangeModifier
    start_epoch: 0.0
    end_epoch: 6.0
  - !SetLearningRateModifier
    start_epoch: 0.0
    learning_rate: 0.004
  - !GMPruningModifier
    init_sparsity: 0.05
    final_sparsity: 0.8
    start_epoch: 0.5
    end_epoch: 2.0
    update_frequency: 0.5
    params: __ALL_PRUNABLE__
  - !LearningRateFunctionModifier
    start_epoch: 2.0
    end_epoch: 6.0
    lr_func: cosine
    init_lr: 0.004
    final_lr: 0.0005
  - !QuantizationModifier
    start_epoch: 2.5
    freeze_bn_stats_epoch: 4.0
    disable_quantization_observer_epoch: 4.5
"""


class Place:
    """A folder with data, a model, a checkpoint of it and a hyp file that takes a step per batch."""

    def __init__(self, root: Path) -> None:
        self.root, self.data = root, write_dataset(root / "data", images=8)
        (root / "small.yaml").write_text(yaml.safe_dump(SMALL_YAML))
        hyp = yaml.safe_load((ROOT / "data/hyps/hyp.scratch-low.yaml").read_text())
        (root / "hyp.yaml").write_text(yaml.safe_dump(hyp | {"nbs": 4, "warmup_epochs": 0}))
        network = alive(small())
        save_model(root / "start.pt", Model(network.blocks, network.state_dict(), ("a", "b", "c"), 64))

    def recipe(self, text: str, name: str = "recipe.yaml") -> str:
        path = self.root / name
        path.write_text(text)
        return str(path)

    def options(self, name: str, recipe: str = "", **changes: object) -> TrainOptions:
        common = TrainOptions(
            str(self.data), weights=f"{self.root}/start.pt", hyp=f"{self.root}/hyp.yaml", epochs=3, batch_size=4, imgsz=64, workers=0, device="cpu",
            optimizer="AdamW", seed=1, noautoanchor=True, project=str(self.root), name=name, patience=0, recipe=recipe and self.recipe(recipe, f"{name}.yaml"),
        )  # fmt: skip
        return replace(common, **changes)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("recipes"))


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    without_pictures_and_timings(monkeypatch)


@pytest.fixture(scope="module")
def both(place: Place) -> Path:
    """The run of `BOTH`, with every epoch's checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        without_pictures_and_timings(patch)
        return train(place.options("both", BOTH, save_period=1))


def zeros(state: dict[str, torch.Tensor]) -> dict[str, int]:
    return {k: int((v == 0).sum()) for k, v in state.items() if v.dim() == 4 and k.endswith("conv.weight") or ".m." in k and v.dim() == 4}


# ---- a run of pruning and quantisation -----------------------------------------------------------------------------------------


def test_zeros_are_exact_in_every_epoch_of_network_and_ema(both: Path) -> None:
    before: dict[str, torch.Tensor] = {}
    for epoch, share in zip(range(1, 7), (0.05, None, 0.8, 0.8, 0.8, 0.8)):
        model = load_model(both / "weights" / f"epoch{epoch}.pt")
        raw, ema = model.training["network"], model.state
        assert zeros({k: raw[k] for k in ema}) == zeros(ema), "the EMA has the zeros of the network"
        for name, count in zeros(ema).items():
            if share is not None:
                assert count == math.floor(ema[name].numel() * share + 0.5), (epoch, name)
            assert not (before.get(name, ema[name] != 0) & (ema[name] != 0)).any() or name not in before, "masks only grow"
            before[name] = ema[name] == 0
    for name in ("best.pt", "last.pt", "best_dense.pt"):
        assert (both / "weights" / name).exists() == (name != "best_dense.pt"), "the ramp starts in the first epoch"


def test_what_was_saved_is_counted_and_the_recipe_stands_beside_it(both: Path) -> None:
    report = json.loads((both / "sparsity.json").read_text())
    assert report["target"] == pytest.approx(0.8) and report["files"][0]["file"] == "best.pt"
    assert report["files"][0]["recipe"]["sparsity"] == pytest.approx(0.8, abs=1e-3)
    saved = recipe_of((both / "recipe.yaml").read_text(), "recipe.yaml")
    assert saved == recipe_of(BOTH, "both.yaml")
    assert load_model(both / "weights/best.pt").options["epochs"] == 6


def test_phases_keep_their_own_best_and_quantisation_is_in_the_files_that_have_it(both: Path) -> None:
    names = {path.name for path in (both / "weights").glob("best*.pt")}
    assert names == {"best.pt", "best_pruned.pt"}
    assert load_model(both / "weights/best_pruned.pt").quantization is None
    best = load_model(both / "weights/best.pt")
    assert best.quantization is not None and best.quantization.ranges and best.epoch == -1
    phases = [load_model(both / "weights" / f"epoch{i}.pt").training["phase"] for i in range(1, 7)]
    assert phases == ["pruning", "pruning", "pruned", "pruned_quantized", "pruned_quantized", "pruned_quantized"]
    rates = [[float(c) for c in row.split(",")][-3:] for row in (both / "results.csv").read_text().splitlines()[1:]]
    expected = [0.004, 0.004, *(0.0005 + 0.0035 * (1 + math.cos(math.pi * (e + 0.5 - 2) / 4)) / 2 for e in (2, 3, 4, 5))]
    assert rates == [pytest.approx([rate] * 3, rel=1e-4) for rate in expected], "the rate at each epoch's last batch, for every role"


def test_norms_and_ranges_stop_when_the_recipe_says_so(both: Path) -> None:
    epochs = [load_model(both / "weights" / f"epoch{i}.pt").training["network"] for i in (4, 5, 6)]
    mean, low = "model.0.bn.running_mean", "quantization.low"
    assert torch.equal(epochs[0][mean], epochs[1][mean]) and torch.equal(epochs[1][mean], epochs[2][mean]), "frozen from epoch 5 on"
    assert not torch.equal(epochs[0][low], epochs[1][low]) and torch.equal(epochs[1][low], epochs[2][low]), "4.5 rounds up to epoch 6"
    weight = "model.0.bn.weight"
    assert not torch.equal(epochs[1][weight], epochs[2][weight]), "gammas go on learning"


def cut(place: Place, options: TrainOptions, after: int) -> Path:
    """Train, but be interrupted before epoch number `after` (0-based) is saved."""
    keep = observers.Checkpoints.epoch_end

    def stop(self: Checkpoints, loop: Loop, record: EpochRecord) -> bool:
        if record.epoch == after:
            raise KeyboardInterrupt
        return keep(self, loop, record)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(observers.Checkpoints, "epoch_end", stop)
        with pytest.raises(KeyboardInterrupt):
            train(options)
    return place.root / options.name


def same(a: Path, b: Path) -> None:
    for name in sorted(p.name for p in (a / "weights").glob("*.pt")):
        one, two = load_model(a / "weights" / name), load_model(b / "weights" / name)
        assert one.state.keys() == two.state.keys() and one.quantization == two.quantization, name
        assert not [k for k in one.state if not torch.equal(one.state[k], two.state[k])], name
    assert (a / "results.csv").read_bytes() == (b / "results.csv").read_bytes()
    one, two = (json.loads((folder / "sparsity.json").read_text()) for folder in (a, b))
    assert one["target"] == two["target"] and [f["layers"] for f in one["files"]] == [f["layers"] for f in two["files"]]


@pytest.mark.parametrize("after", [1, 3, 4], ids=["in the ramp", "at the start of quantisation", "in quantisation"])
def test_an_interrupted_run_resumes_to_the_same_masks_ranges_and_weights(place: Place, both: Path, after: int) -> None:
    options = place.options(f"cut{after}", BOTH, save_period=1)
    folder = cut(place, options, after)
    Path(options.recipe).unlink()  # the checkpoint carries it
    assert resume(folder / "weights/last.pt") == folder
    same(both, folder)


# ---- in the loop ---------------------------------------------------------------------------------------------------------------


def recipe_loop(*modifiers: Modifier, epochs: int = 3, batches: int = 4, accumulate: int = 1, **kwargs: object) -> Loop:
    """The loop of tests/test_training.py with the seams of `modifiers`."""
    loop = make_loop(epochs=epochs, batches=batches, accumulate=accumulate, **kwargs)
    recipe = Recipe(modifiers)
    pruning = recipe.of(*PRUNING)
    pruner = MagnitudePruner(pruning, loop.network, epochs, batches) if pruning else None
    loop.schedule = RecipeSchedule(loop.schedule, loop.optimizer, recipe, batches, epochs, accumulate, 0.9, Clock(), pruner)
    loop.seams = Seams(masks=[pruner] if pruner else [], transitions=[Phases(recipe, batches, epochs)])
    if recipe.of(QuantizationModifier):
        loop.seams.transitions.append(QuantizationTransition(recipe, loop.network.blocks, False))
    if recipe.of(TrainableParamsModifier):
        loop.seams.transitions.append(TrainableTransition(recipe, loop.network))
    return loop


GMP = GlobalMagnitudePruningModifier(0.0, 2.0, 0.05, 0.8)
QAT = QuantizationModifier(1.0)


def test_gradients_are_masked_before_clipping_and_weights_after_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    loop, log = recipe_loop(GMP, epochs=1, batches=1), []
    (pruner,) = loop.seams.masks
    for owner, name, word in (
        (loop.schedule, "batch", "schedule"), (pruner, "update", "update"), (pruner, "mask_gradients", "mask gradients"), (pruner, "apply", "apply"),
        (nn.utils, "clip_grad_norm_", "clip"), (loop.optimizer, "step", "step"), (loop.ema, "update", "ema"),
    ):  # fmt: skip
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, _f=original, _w=word, **k: (log.append(_w), _f(*a, **k))[1])
    loop.run()
    assert log == ["schedule", "update", "apply", "mask gradients", "clip", "step", "apply", "ema", "apply"]


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("precision", [None, torch.bfloat16], ids=["float32", "bfloat16"])
def test_masks_hold_under_accumulation_and_amp(accumulate: int, precision: torch.dtype | None) -> None:
    """With 4 batches and steps of 3 the last batch of an epoch is no step; the zeros that its update makes are in the EMA all the same."""
    loop = recipe_loop(
        replace(GMP, end_epoch=3.0, update_frequency=-1.0), accumulate=accumulate, precision=Precision(torch.device("cpu"), precision)
    )
    seen: list[float] = []

    class Look(Observer):
        def batch_end(self, loop: Loop, *args: object) -> None:
            weights = [p for p in loop.network.parameters() if p.dim() == 4]
            seen.append(sum(int((p == 0).sum()) for p in weights) / sum(p.numel() for p in weights))

        def epoch_end(self, loop: Loop, record: EpochRecord) -> bool:
            pairs = zip(loop.network.parameters(), loop.ema.network.parameters())
            assert all(torch.equal(a == 0, b == 0) for a, b in pairs if a.dim() == 4)
            return False

    loop.seams.observers.append(Look())
    loop.run()
    wanted = [0.05 + (1 - (1 - step / 12) ** 3) * 0.75 for step in range(12)]
    assert seen[:-1] == pytest.approx(wanted[:-1], abs=1e-4) and seen[-1] == pytest.approx(0.8, abs=1e-4), "the last batch ends the ramp"


def test_quantisation_trains_in_float32_from_a_fresh_ema() -> None:
    loop = recipe_loop(QAT, precision=Precision(torch.device("cpu"), torch.bfloat16), batches=2)
    seen: list[tuple] = []

    class Look(Observer):
        def batch_end(self, loop: Loop, index: int, *args: object) -> None:
            seen.append((loop.network.quantization is not None, loop.precision.autocast_dtype, loop.ema.updates, loop.phase))

    loop.seams.observers.append(Look())
    loop.run()
    assert seen == [(False, torch.bfloat16, n, "dense") for n in (1, 2)] + [(True, None, n, "quantized") for n in (1, 2, 3, 4)]
    assert not loop.scaler.is_enabled() and loop.ema.network.quantization.observed
    ours, theirs = (n.quantization.state_dict() for n in (loop.network, loop.ema.network))
    assert all(torch.equal(ours[k], theirs[k]) for k in ours), "ranges are copied, not averaged"


def test_validation_does_not_move_the_ranges() -> None:
    loop, ranges = recipe_loop(replace(QAT, start_epoch=0.0), epochs=1), []

    def evaluator(network: Network) -> tuple[float, dict[str, float]]:
        before = network.quantization.low.clone()
        network.eval()(torch.rand(2, 3, 64, 64) * 9)
        ranges.append((before, network.quantization.low.clone()))
        return 0.5, {}

    loop.evaluator = evaluator
    loop.run()
    assert ranges and all(torch.equal(a, b) and torch.isfinite(a).all() for a, b in ranges)


def test_a_new_phase_looks_for_its_best_afresh_and_stopping_waits_for_the_last_event() -> None:
    loop = recipe_loop(QAT, epochs=4)
    fitness = iter([0.9, 0.1, 0.2, 0.1])
    loop.evaluator = lambda network: (next(fitness), {})
    records: list[EpochRecord] = []
    loop.seams.observers.append(type("Keep", (Observer,), {"epoch_end": lambda self, loop, record: records.append(record) or False})())
    loop.run()
    assert [(r.phase, r.is_best) for r in records] == [("dense", True), ("quantized", True), ("quantized", True), ("quantized", False)]
    stopping = EarlyStopping(2, least=6)
    falling = [replace(records[0], epoch=i, fitness=0.9 - i / 10, phase="dense" if i < 5 else "quantized") for i in range(9)]
    assert [stopping.epoch_end(loop, record) for record in falling] == [False] * 7 + [True] * 2, "two epochs after the phase began"
    waiting = EarlyStopping(2, least=6)
    assert [waiting.epoch_end(loop, replace(record, phase="")) for record in falling] == [False] * 6 + [True] * 3


def test_frozen_parameters_stand_still_and_get_their_own_flags_back() -> None:
    loop = recipe_loop(TrainableParamsModifier(0.5, 1.5, params=("re:model.0",), trainable=False), epochs=4, batches=1)
    name, other = "model.0.conv.weight", "model.1.conv.weight"
    loop.network.get_parameter(other).requires_grad_(False)  # as --freeze does
    loop.seams.transitions[-1] = TrainableTransition(
        Recipe((TrainableParamsModifier(0.5, 1.5, params=("re:model.0",), trainable=False),)), loop.network
    )
    seen: list[tuple[bool, torch.Tensor]] = []

    class Look(Observer):
        def epoch_end(self, loop: Loop, record: EpochRecord) -> bool:
            parameter = loop.network.get_parameter(name)
            seen.append((parameter.requires_grad, parameter.detach().clone()))
            return False

    loop.seams.observers.append(Look())
    loop.run()
    assert [flag for flag, _ in seen] == [True, False, True, True], "0.5 rounds up to epoch 1, 1.5 to 2"
    assert torch.equal(seen[0][1], seen[1][1]) and not torch.equal(seen[1][1], seen[2][1])
    assert not loop.network.get_parameter(other).requires_grad
    with pytest.raises(InputError, match="leaves no parameter to train from epoch 1 on"):
        TrainableTransition(Recipe((TrainableParamsModifier(1.0, params=("__ALL__",), trainable=False),)), loop.network)


# ---- distillation --------------------------------------------------------------------------------------------------------------


def test_distillation_acts_from_start_to_end_in_the_shares_that_hardness_gives() -> None:
    network, teacher, clock = alive(small()), alive(small(), seed=5), Clock()
    loss = DetectionLoss(network.anchors, network.strides, 3, 64)
    images, targets = torch.rand(2, 3, 64, 64), torch.tensor([[0, 1, 0.4, 0.5, 0.3, 0.4]])
    objective = RecipeDistillation(loss, teacher, network.anchors, [DistillationModifier(1.0, 2.0, hardness=0.3, temperature=1.0)], clock)
    task, parts = loss(network(images), targets)
    whole, _ = DistillationObjective(loss, teacher, network.anchors)(network, images, targets)
    for clock.epoch, hardness in ((0.9, 0.0), (1.0, 0.3), (1.99, 0.3), (2.0, 0.0)):
        total, items = objective(network, images, targets)
        assert total.item() == pytest.approx(((1 - hardness) * task + hardness * (whole - task)).item(), rel=1e-5)
        assert torch.allclose(items[:3], parts) and (items[3] > 0) == (hardness > 0)


def test_temperature_scales_the_divergences_and_not_the_boxes() -> None:
    network, teacher = alive(small()), alive(small(), seed=5)
    loss, images = DetectionLoss(network.anchors, network.strides, 3, 64), torch.rand(1, 3, 64, 64)
    maps, wanted = network(images), teacher(images)

    def term(**weights: float) -> float:
        options = DistillOptions(**{"box": 0.0, "obj": 0.0, "cls": 0.0} | weights)
        return float(DistillationObjective(loss, teacher, network.anchors, options).term(maps, images)[0])

    def bernoulli(logits: torch.Tensor) -> torch.Tensor:
        p = logits.double().sigmoid()
        return torch.stack((p, 1 - p))

    expected = 0.0
    for mine, theirs in zip(maps, wanted):
        s, t = (m.view(1, 3, 8, *m.shape[2:])[:, :, 4] for m in (mine, theirs))
        p, q = bernoulli(t / 3), bernoulli(s / 3)
        expected += float(9 * (p * (p / q).log()).sum() / t.double().sigmoid().sum()) / len(maps)
    assert term(obj=1.0, temperature=3.0) == pytest.approx(expected, rel=1e-3)
    assert term(box=2.0, temperature=3.0) == term(box=2.0)
    assert term(cls=2.0, temperature=3.0) != pytest.approx(term(cls=2.0), rel=1e-3)


def test_distillation_goes_with_pruning_and_quantisation_and_self_is_the_start(place: Place) -> None:
    text = BOTH + "  - !DistillationModifier\n    start_epoch: 1.0\n    hardness: 0.4\n"
    options = place.options("distilled", text, recipe_teacher=f"{place.root}/start.pt")
    folder = train(options)
    names, *rows = [row.replace(" ", "").split(",") for row in (folder / "results.csv").read_text().splitlines()]
    part = [float(row[names.index("train/distill_loss")]) for row in rows]
    assert part[0] == 0 and min(part[1:]) > 0 and len(part) == 6
    best = load_model(folder / "weights/best.pt")
    assert best.quantization is not None
    assert sum(zeros(best.state).values()) == pytest.approx(0.8 * sum(best.state[k].numel() for k in zeros(best.state)), rel=1e-3)


def test_the_flag_distill_leaves_the_teacher_to_a_recipe_that_says_when(place: Place) -> None:
    text = "modifiers:\n  - !DistillationModifier\n    start_epoch: 1.0\n    end_epoch: 2.0\n"
    folder = train(place.options("throughout", text, teacher=f"{place.root}/start.pt", strict=True, noval=True))
    names, *rows = [row.replace(" ", "").split(",") for row in (folder / "results.csv").read_text().splitlines()]
    part = [float(row[names.index("train/distill_loss")]) for row in rows]
    assert part[0] == part[2] == 0 and part[1] > 0


# ---- what is refused, and what is told -----------------------------------------------------------------------------------------

QAT_AT = "modifiers:\n  - !QuantizationModifier\n    start_epoch: {}\n"


@pytest.mark.parametrize(
    "text, changes, message",
    [
        (QAT_AT.format(50), {"epochs": 30}, r"yaml:2: QuantizationModifier starts at epoch 50, the run has 30 epochs: it would never act"),
        (QAT_AT.format(2.5), {}, "QuantizationModifier starts at epoch 2.5, the run has 3 epochs"),
        (QAT_AT.format(0) + QAT_AT.format(1)[len("modifiers:\n") :], {}, "a network cannot be quantised twice"),
        (QAT_AT.format(0) + "    submodules: ['modle']\n", {}, "QuantizationModifier: quantisation of modle: the model has no convolution under that path"),
        ("modifiers:\n  - !DistillationModifier {}\n", {}, "DistillationModifier needs a teacher: --t_weight TEACHER.pt, or self"),
        (QAT_AT.format(0), {"recipe_teacher": "start.pt"}, "has no DistillationModifier, so nothing would distil from it"),
        ("modifiers:\n  - !ConstantPruningModifier\n    params: ['model.0.conv.wieght']\n", {}, "model.0.conv.wieght"),
    ],
)  # fmt: skip
def test_what_does_not_go_with_the_run_is_refused_before_anything_is_written(place: Place, text: str, changes: dict, message: str) -> None:
    options = place.options("refused", text, **changes)
    with pytest.raises(InputError, match=message):
        train(options)
    assert not (place.root / "refused").exists()


def test_a_quantised_start_is_not_quantised_twice_but_trains_on_rounded(place: Place, both: Path) -> None:
    start = str(both / "weights/best.pt")
    with pytest.raises(
        InputError, match="is quantised already, and cannot be quantised twice; start from the checkpoint before quantisation"
    ):
        train(place.options("twice", QAT_AT.format(0), weights=start))
    hold = "modifiers:\n  - !ConstantPruningModifier\n    params: __ALL_PRUNABLE__\n"
    whole = train(place.options("on", hold, weights=start, epochs=2))
    before, after = load_model(start), load_model(whole / "weights/last.pt")
    assert after.quantization is not None and after.quantization.ranges.keys() == before.quantization.ranges.keys()
    assert after.quantization.ranges != before.quantization.ranges and zeros(after.state) == zeros(before.state)
    options = place.options("on_cut", hold, weights=start, epochs=2)
    resume(cut(place, options, 1))
    same(whole, place.root / "on_cut")


def test_a_quantised_start_keeps_its_structure(place: Place, both: Path, capsys: pytest.CaptureFixture) -> None:
    start, wide = str(both / "weights/best.pt"), place.root / "wide.yaml"
    wide.write_text(yaml.safe_dump(SMALL_YAML | {"width_multiple": 2.0}))
    with pytest.raises(InputError, match=r"wide\.yaml: is another structure than that of .*best\.pt, which is quantised"):
        train(place.options("wide", weights=start, cfg=str(wide)))
    with pytest.raises(InputError, match=r"best\.pt: is quantised; prune the checkpoint before quantisation"):
        train(place.options("sparse", weights=start, strict=True, sr=0.001))
    assert not (place.root / "wide").exists() and not (place.root / "sparse").exists()
    train(place.options("same", weights=start, cfg=str(place.root / "small.yaml"), epochs=1, noval=True))
    assert "is quantised: it is trained so, from its own ranges on" in capsys.readouterr().out
    assert load_model(place.root / "same/weights/last.pt").quantization.ranges


def test_a_sparse_start_without_anything_that_holds_it_is_warned_of(place: Place, both: Path, capsys: pytest.CaptureFixture) -> None:
    start = str(both / "weights/best_pruned.pt")
    train(place.options("regrown", weights=start, epochs=1, noval=True))
    out = capsys.readouterr()
    assert "80.0% of the weights of 32 parameters" in out.out + out.err
    assert "are zero, and nothing in this run holds them from the start: they will grow back" in out.out + out.err


RAMP = "init_sparsity: 0.8, final_sparsity: 0.9, start_epoch: {start}, end_epoch: 3, update_frequency: 1, params: [], mask_type: {mask}"


@pytest.mark.parametrize(
    "modifier, said",
    [
        ("!ConstantPruningModifier {params: __ALL_PRUNABLE__}", ""),
        ("!ConstantPruningModifier {params: __ALL_PRUNABLE__, start_epoch: 1}", "80.0% of the weights of 32 parameters (model.0.conv.weight first)"),
        ("!ConstantPruningModifier {params: ['re:model.[1-9]']}", "80.0% of the weights of model.0.conv.weight are zero, and nothing in this run holds them"),
        ("!ConstantPruningModifier {params: ['re:model.[0-9]']}\n  - !ConstantPruningModifier {params: ['re:.*m.0'], start_epoch: 2}", ""),
        (f"!GMPruningModifier {{{RAMP.format(start=-1, mask='unstructured')}}}", ""),
        (f"!GMPruningModifier {{{RAMP.format(start=0.5, mask='unstructured')}}}", "80.0% of the weights of 32 parameters"),
        (f"!GMPruningModifier {{{RAMP.format(start=0, mask='block4')}}}", "80.0% of the weights of model.0.conv.weight are zero"),
    ],
)  # fmt: skip
def test_zeros_that_are_not_held_from_the_start_are_warned_of(modifier: str, said: str, capsys: pytest.CaptureFixture) -> None:
    loop = recipe_loop(*recipe_of(f"modifiers:\n  - {modifier}\n", "r.yaml").modifiers)
    for name in prunable(loop.network):
        flat = loop.network.get_parameter(name).data.view(-1)
        flat[: round(flat.numel() * 0.8)] = 0
    warn_of_regrowth(loop, "s.pt")
    warned = [line for line in capsys.readouterr().out.splitlines() if "grow back" in line]
    assert len(warned) == bool(said) and all(said in line for line in warned)


def test_memory_is_told_from_the_blocks_and_layers_without_weights_are_passed_over() -> None:
    network = Network(small()).train()
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor)
        return tensor

    for quantised, told in enumerate(activation_bytes(network.blocks, 128, 2, autocast=False)):
        if quantised:
            quantize(network, QuantScheme())
        kept.clear()
        own = {p.untyped_storage().data_ptr() for p in network.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            maps = network(torch.rand(2, 3, 128, 128))
        measured = sum(size for pointer, (size, _) in kept.items() if pointer not in own)
        assert maps and told == pytest.approx(measured, rel=0.4)
    blocks = stock("s")
    everything = tuple(f"model.{i}" for i in range(25))
    m = QuantizationModifier(modules=everything, ignore=("Concat", "Upsample", "model.24"))
    scheme = scheme_of(m, blocks)
    assert scheme.ignore == ("model.24",) and set(everything) - set(scheme.modules) == {f"model.{i}" for i in (11, 12, 15, 16, 19, 22)}


def test_a_batch_is_tried_on_the_phase_that_takes_most_memory() -> None:
    """`--batch-size -1` with a recipe that quantises: float32 and rounded, in a copy."""
    network, precision = alive(small()), Precision(torch.device("cpu"), torch.bfloat16)
    recipe = Recipe((QAT,))
    tried, beside = heaviest_phase(recipe, network, precision)
    assert tried.quantization is not None and network.quantization is None and beside.autocast_dtype is None
    assert heaviest_phase(None, network, precision) == (network, precision) == heaviest_phase(Recipe(()), network, precision)
