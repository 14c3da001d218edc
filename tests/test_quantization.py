"""Rounding to 8 bits: where it acts, what it leaves alone, and that it is the same folded, copied, saved and in every runtime's form."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from engine.ema import Ema
from models.blocks import Blocks
from models.checkpoint import Model, load_model, save_model, stripped
from models.network import Network, fuse
from models.quantization import AVERAGING, FORMS, QuantScheme, Ranges, grid, quant_plan, quantize, weight_scales
from tests.helpers import alive, random_blocks, small, stock, with_module
from utils.errors import InputError

AFFINE = QuantScheme()
MOVES = ("route", "upsample", "maxpool", "zeropad", "focus")


def images(seed: int = 0, count: int = 2, size: int = 64) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def quantized(blocks: Blocks, scheme: QuantScheme = AFFINE) -> Network:
    """A network at work, with ranges of two batches."""
    network = alive(blocks, calm=True)
    quantize(network, scheme)
    network.freeze_norms()
    network.train()
    with torch.no_grad():
        for seed in (1, 2):
            network(images(seed))
    return network.eval()


def outputs(network: Network, x: Tensor) -> dict[int, Tensor]:
    """The output of every block."""
    found: dict[int, Tensor] = {}
    for i, op in enumerate(network._ops):

        def keep(*inputs: Tensor, i: int = i, op=op) -> Tensor:
            found[i] = op(*inputs)
            return found[i]

        network._ops[i] = keep
    with torch.no_grad():
        network(x)
    return found


# ---- the grids -----------------------------------------------------------------------------------------------------------------


def test_grid_holds_zero_and_its_ends() -> None:
    low, high = torch.tensor([-0.3, 0.5, -4.0, 0.0]), torch.tensor([6.0, 2.0, -1.0, 0.0])
    scale, zero = grid(low, high, symmetric=False)
    assert zero.tolist() == [round(0.3 / (6.3 / 255)), 0, 255, 0]
    assert torch.allclose(scale[:3], torch.tensor([6.3, 2.0, 4.0]) / 255)
    scale, zero = grid(low, high, symmetric=True)
    assert zero.tolist() == [0] * 4 and torch.allclose(scale[:3], torch.tensor([6.0, 2.0, 4.0]) / 127)


def test_weights_are_rounded_per_channel_and_zeros_stay_zero() -> None:
    network = quantized(small())
    weight = torch.randn(8, 4, 3, 3) * torch.logspace(-6, 2, 8).view(-1, 1, 1, 1)
    weight[:, 1] = 0
    rounded = network.quantization.rounded_weight(weight)
    steps = rounded / weight_scales(weight).view(-1, 1, 1, 1)
    assert torch.allclose(steps, steps.round(), atol=1e-4) and steps.abs().max() <= 127.001
    assert ((rounded - weight).abs() <= weight_scales(weight).view(-1, 1, 1, 1) * 0.5001).all()
    assert (rounded[:, 1] == 0).all()
    assert torch.allclose(network.quantization.rounded_weight(rounded), rounded, rtol=1e-6)


def test_a_channel_of_zeros_is_left_at_zero() -> None:
    network = quantized(small())
    assert torch.equal(network.quantization.rounded_weight(torch.zeros(2, 3, 1, 1)), torch.zeros(2, 3, 1, 1))


def test_reduced_range_has_seven_bits() -> None:
    network = quantized(small(), QuantScheme(reduce_range=True))
    weight = torch.randn(4, 4, 3, 3)
    steps = network.quantization.rounded_weight(weight) / weight_scales(weight, 63).view(-1, 1, 1, 1)
    assert steps.abs().max().round() == 63


# ---- where they stand ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["n", "s"])
def test_plan_of_a_stock_model(size: str) -> None:
    blocks = stock(size)
    plan = quant_plan(blocks, QuantScheme())
    convolutions = [i for i, b in enumerate(blocks) if b.kind == "convolutional"]
    heads = [i for i in convolutions if blocks[i].name.startswith("model.24.m")]
    assert plan.convolutions == set(convolutions)
    assert len(heads) == 3 and all(plan.output[i] is None for i in heads)  # the head's maps stay in float
    assert all(plan.output[i] is not None and plan.inner[i] is not None for i in convolutions if i not in heads)
    assert plan.output[0] is not None
    for i, block in enumerate(blocks):
        if block.kind in MOVES:
            assert {plan.output[j] for j in block.inputs} == {plan.output[i]}, f"block {i} mixes grids"
    adds = [b for b in blocks if b.kind == "shortcut"]
    assert len(adds) == 7 and all(plan.output[j] is not None for b in adds for j in b.inputs)
    assert {blocks[i].name for i in plan.branches} == {
        b for b in (blocks[i].name for i in convolutions) if b.endswith("cv2") and ".m." in b
    } - {blocks[i].name for i in convolutions if blocks[i].name.startswith(("model.13.m", "model.17.m", "model.20.m", "model.23.m"))}


@pytest.mark.parametrize("seed", range(25))
def test_every_rounded_value_has_at_most_256_levels_and_moving_keeps_them(seed: int) -> None:
    network = quantized(random_blocks(seed))
    plan = network.quantization.plan
    for i, y in outputs(network, images(3)).items():
        point = plan.output[i]
        if point is not None and network.blocks[i].kind != "yolo":
            assert len(y.unique()) <= 256
            again = network.quantization._fake(y, *network.quantization.parameters_of(point))
            assert torch.equal(again, y), f"block {i} ({network.blocks[i].kind}) is off its grid"


def test_modules_and_ignore() -> None:
    blocks = small()
    some = quant_plan(blocks, QuantScheme(modules=("model.2", "model.14.m.0")))
    assert {blocks[i].name for i in some.convolutions} == {b.name for b in blocks if b.name.startswith("model.2.")} | {"model.14.m.0"}
    most = quant_plan(blocks, QuantScheme(ignore=("model.0", "model.14")))
    assert not {"model.0", "model.14.m.0", "model.14.m.1"} & {blocks[i].name for i in most.convolutions}
    network = quantized(blocks, QuantScheme(ignore=("model.0",)))
    reference = alive(blocks, calm=True)
    assert torch.equal(network.model._modules["0"].conv.weight, reference.model._modules["0"].conv.weight)
    assert "input.0" not in network.quantization.plan.members  # only the stem reads the image


def test_a_convolution_may_be_named_with_what_holds_it() -> None:
    blocks = small()
    assert quant_plan(blocks, QuantScheme(ignore=("model.0.conv",))) == quant_plan(blocks, QuantScheme(ignore=("model.0",)))
    focus = with_module("Focus", [24, 3])
    for path in ("model.2.0", "model.2.0.conv"):
        ignored = {
            focus[i].name
            for i in quant_plan(focus, QuantScheme()).convolutions - quant_plan(focus, QuantScheme(ignore=(path,))).convolutions
        }
        assert ignored == {"model.2.0.conv"}


def test_paths_that_name_nothing_are_errors() -> None:
    with pytest.raises(InputError, match=r"model\.2\.cv9: the model has no convolution under that path; did you mean model\.2\.cv"):
        quant_plan(small(), QuantScheme(ignore=("model.2.cv9",)))
    quant_plan(stock("n"), QuantScheme(modules=tuple(f"model.{i}" for i in range(24))))  # 11 is an upsample; so recipes list them
    with pytest.raises(InputError, match="no convolution is left to quantise"):
        quant_plan(small(), QuantScheme(ignore=("model",)))


# ---- the network around it -----------------------------------------------------------------------------------------------------


def test_nothing_changes_before_a_range_is_known() -> None:
    network, reference = alive(small()), alive(small())
    keys = list(network.state_dict())
    parameters = dict(network.named_parameters())
    quantize(network, QuantScheme())
    assert [k for k in network.state_dict() if not k.startswith("quantization.")] == keys == list(network.weights())
    assert all(p is parameters[k] for k, p in network.named_parameters())
    for a, b in zip(network(images()), reference(images())):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "blocks", [small(), with_module("BottleneckCSP", [24]), with_module("SPP", [24, [3, 5]]), *map(random_blocks, range(6))]
)
@pytest.mark.parametrize("form", FORMS)
def test_folding_the_norms_changes_nothing(blocks: Blocks, form: str) -> None:
    """Not even with negative gammas, whose channels are turned round; a rounding that falls the other way moves a value by one step. (An int32
    bias, which only a folded network has, is left out.)"""
    network = quantized(blocks)
    network.quantization.form = replace(FORMS[form], bias=False)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data[::3] *= -1
    x = images(5)
    with torch.no_grad():
        for a, b in zip(network(x), fuse(network)(x)):
            assert (a - b).abs().mean() < 0.01 * a.std()


def test_rounding_moves_the_logits_but_little() -> None:
    network, reference = quantized(small()), alive(small(), calm=True)
    x = images(5)
    with torch.no_grad():
        for a, b in zip(network(x), reference(x)):
            assert 1e-3 < (a - b).abs().mean() / b.std() < 0.1


def test_forms_differ_and_more_rounding_is_further_from_float() -> None:
    network, reference = quantized(small()), alive(small(), calm=True)
    gaps = {}
    with torch.no_grad():
        for name, form in FORMS.items():
            network.quantization.form = form
            gaps[name] = sum(float((a - b).abs().mean()) for a, b in zip(network(images(5)), reference(images(5))))
    assert 0 < gaps["openvino"] == gaps["tensorrt"] < gaps["onnxruntime"]


def test_copies_are_equal_and_apart() -> None:
    network = quantized(small())
    twin = copy.deepcopy(network)
    for a, b in zip(network(images()), twin(images())):
        assert torch.equal(a, b)
    twin.quantization.low += 1
    assert not torch.equal(twin.quantization.low, network.quantization.low)


def test_ranges_follow_what_passes_in_training_alone() -> None:
    network = alive(small())
    quantize(network, QuantScheme())
    q = network.quantization
    network(images())
    assert torch.isinf(q.low[1:]).all() and not q.observed
    network.train()
    seen: list[Tensor] = []
    stem = next(m for m, name in enumerate(q.plan.members) if name == "model.0.pre")
    observe = q._observe
    q._observe = lambda member, x: (seen.append(x) if member == stem else None, observe(member, x))
    network(images(0))
    first = q.high[stem].clone()
    assert first == seen[0].max() and q.low[stem] == seen[0].min().clamp(min=-8)
    network(0.5 * images(1))
    assert torch.isclose(q.high[stem], first + AVERAGING * (seen[1].max() - first))
    assert (q.low[0], q.high[0]) == (0, 1)  # an image's bytes, whatever is in it
    before = q.low.clone(), q.high.clone()
    network.eval()
    network(7 * images(2))
    network.train()
    q.observing = False
    network(7 * images(3))
    assert torch.equal(before[0], q.low) and torch.equal(before[1], q.high)


def test_what_is_flat_below_takes_no_levels() -> None:
    network = quantized(small())
    plan, q = network.quantization.plan, network.quantization
    pre = [m for m, name in enumerate(plan.members) if name.endswith(".pre")]
    assert pre and all(plan.floors[m] == -8 for m in pre) and (q.low[pre] >= -8).all()
    assert all(plan.floors[m] == -math.inf for m in range(len(plan.members)) if m not in pre)


def test_gradients_pass_straight_through() -> None:
    network = quantized(small()).train()
    sum(y.square().mean() for y in network(images())).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all() and parameter.grad.abs().sum() > 0, name


def test_frozen_norms_stay_frozen() -> None:
    network = alive(small())
    network.freeze_norms()
    network.train()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    sum(y.mean() for y in network(images())).backward()
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert all(m.weight.grad is not None for m in network.modules() if isinstance(m, nn.BatchNorm2d))
    assert network.training and not any(m.training for m in copy.deepcopy(network).modules() if isinstance(m, nn.BatchNorm2d))


def test_autocast_leaves_the_rounding_alone() -> None:
    network = quantized(small())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        under = network(images())
    for a, b in zip(under, network(images())):
        assert a.dtype == torch.float32 and torch.equal(a, b)


def test_average_copies_ranges() -> None:
    network = alive(small())
    quantize(network, QuantScheme())
    ema = Ema(network)
    network.train()
    for seed in range(3):
        network(images(seed))
        ema.update(network)
    assert torch.equal(ema.network.quantization.low, network.quantization.low)
    assert ema.network.quantization.observed


def test_twice_is_an_error() -> None:
    with pytest.raises(InputError, match="cannot be quantised twice"):
        quantize(quantized(small()), QuantScheme())


# ---- checkpoints ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", [QuantScheme(), QuantScheme(True, True, ("model",), ("model.0", "model.14.m.1"))])
def test_checkpoint_gives_the_same_network_to_the_bit(tmp_path: Path, scheme: QuantScheme) -> None:
    network = quantized(small(), scheme)
    model = Model(network.blocks, network.weights(), ("a", "b", "c"), 64, quantization=network.quantization.saved())
    save_model(tmp_path / "q.pt", stripped(model))
    loaded = load_model(tmp_path / "q.pt")
    assert loaded.quantization == model.quantization
    for a, b in zip(network(images()), loaded.network()(images())):
        assert torch.equal(a, b)


def test_checkpoint_of_a_network_that_observed_nothing_yet(tmp_path: Path) -> None:
    network = alive(small())
    quantize(network, QuantScheme())
    save_model(tmp_path / "q.pt", Model(network.blocks, network.weights(), ("a", "b", "c"), quantization=network.quantization.saved()))
    assert not load_model(tmp_path / "q.pt").network().quantization.observed


def test_broken_quantisation_in_a_checkpoint(tmp_path: Path) -> None:
    network = quantized(small())
    saved = network.quantization.saved()
    model = Model(network.blocks, network.weights(), ("a", "b", "c"))
    few = Ranges(saved.scheme, {k: v for k, v in saved.ranges.items() if k != "model.1"})
    for broken, message in (
        (few, r"no range of model\.1 is known"),
        (Ranges(replace(saved.scheme, ignore=("model.99",)), saved.ranges), r"model\.99: the model has no convolution"),
    ):
        save_model(tmp_path / "q.pt", replace(model, quantization=broken))
        with pytest.raises(InputError, match=message):
            load_model(tmp_path / "q.pt")
    content = torch.load(tmp_path / "q.pt", weights_only=True)
    content["extensions"] = {"quantization": {"scheme": {"bits": 4}, "ranges": {}}}
    torch.save(content, tmp_path / "q.pt")
    with pytest.raises(InputError, match=r"q\.pt: its quantisation cannot be understood"):
        load_model(tmp_path / "q.pt")
