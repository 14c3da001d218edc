"""The import of vision_toolbox's DarknetYOLOv5 backbones: a module with its names, written from their description, gives the same outputs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from engine.backbone_run import BackboneOptions, backbone_cut, combined
from engine.prune_run import PruneOptions
from models.blocks import Blocks, is_classifier
from models.checkpoint import Model, load_model
from models.network import Network
from models.vision_toolbox import import_backbone, main, new_name, read_tensors
from models.yaml_reader import from_spec
from pruning.backbone import backbone_end
from tests.helpers import SMALL_YAML, alive
from utils.errors import InputError


class Unit(nn.Module):
    """Convolution, norm (under either name), ReLU."""

    def __init__(self, c1: int, c2: int, k: int, s: int, norm: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c1, c2, k, s, (k - 1) // 2, bias=False)
        self.add_module(norm, nn.BatchNorm2d(c2))
        self.norm_name = norm

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(getattr(self, self.norm_name)(self.conv(x)))


class Bottleneck(nn.Module):
    def __init__(self, c: int, norm: str) -> None:
        super().__init__()
        self.conv1, self.conv2 = Unit(c, c, 1, 1, norm), Unit(c, c, 3, 1, norm)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.conv1(x))


class Stage(nn.Module):
    def __init__(self, c1: int, c2: int, n: int, norm: str) -> None:
        super().__init__()
        self.conv = Unit(c1, c2, 3, 2, norm)
        self.conv1, self.conv2 = Unit(c2, c2 // 2, 1, 1, norm), Unit(c2, c2 // 2, 1, 1, norm)
        self.blocks = nn.Sequential(*(Bottleneck(c2 // 2, norm) for _ in range(n)))
        self.out_conv = Unit(c2, c2, 1, 1, norm)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.out_conv(torch.cat((self.conv1(x), self.blocks(self.conv2(x))), 1))


class Backbone(nn.Module):
    """Widths and depths of a small one; `stages` as many as asked for."""

    def __init__(self, norm: str = "bn", widths: tuple[int, ...] = (16, 24, 32, 48, 64), depths: tuple[int, ...] = (1, 2, 3, 1)) -> None:
        super().__init__()
        self.stem = Unit(3, widths[0], 6, 2, norm)
        self.stages = nn.Sequential(*(Stage(a, b, n, norm) for a, b, n in zip(widths, widths[1:], depths)))

    def forward(self, x: Tensor) -> Tensor:
        return self.stages(self.stem(x))


def living(norm: str = "bn", **sizes: tuple[int, ...]) -> Backbone:
    """With random gamma and beta, and running statistics of data."""
    torch.manual_seed(0)
    backbone = Backbone(norm, **sizes)
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.3, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            module.momentum = None
    with torch.no_grad():
        for _ in range(3):
            backbone.train()(torch.rand(4, 3, 64, 64))
    return backbone.eval()


def features(model: Model, images: Tensor) -> Tensor:
    """What the pooling reads."""
    network, seen = model.network(), []
    last = model.blocks[backbone_end(model.blocks) - 1]
    network.get_submodule(last.name).register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        network(images)
    return seen[0]


@pytest.mark.parametrize("norm", ["bn", "norm"])
@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_outputs_are_equal(norm: str, prefix: str) -> None:
    theirs = living(norm)
    tensors = {prefix + k: v for k, v in theirs.state_dict().items()} | ({"fc.weight": torch.zeros(3)} if prefix else {})
    model = import_backbone(tensors, 7)
    images = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        wanted = theirs(images)
    assert wanted.std() > 0.1
    torch.testing.assert_close(features(model, images), wanted, atol=1e-5, rtol=1e-4)
    assert is_classifier(model.blocks) and model.network()(images)[0].shape == (2, 7, 1, 1)


def test_the_halves_the_relu_and_the_epsilon_each_matter() -> None:
    """Leaving out any of the three changes the outputs: the test above would see it."""
    theirs, images = living(), torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        for module in theirs.modules():  # a small variance, so that the epsilon counts
            if isinstance(module, nn.BatchNorm2d):
                module.running_var.mul_(0.01)
        wanted = theirs(images)
    model = import_backbone(theirs.state_dict(), 3)
    torch.testing.assert_close(features(model, images), wanted, atol=1e-3, rtol=1e-3)
    plain = {new_name(k): v for k, v in theirs.state_dict().items()}
    cv3 = {k: v for k, v in plain.items() if k.endswith("cv3.conv.weight")}
    wrong = [
        Model(model.blocks, model.state | cv3, model.names),
        Model(_with(model.blocks, activation="silu"), model.state, model.names),
        Model(_with(model.blocks, bn_eps=1e-3), model.state, model.names),
    ]
    for other in wrong:
        assert (features(other, images) - wanted).abs().max() > 0.01 * wanted.abs().max()


def _with(blocks: Blocks, **fields: object) -> Blocks:
    return tuple(replace(b, **fields) if b.has_gamma else b for b in blocks)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("stem.conv.weight", "model.0.conv.weight"),
        ("stem.norm.running_var", "model.0.bn.running_var"),
        ("stages.0.conv.bn.weight", "model.1.bn.weight"),
        ("stages.0.conv1.conv.weight", "model.2.cv2.conv.weight"),
        ("stages.3.conv2.conv.weight", "model.8.cv1.conv.weight"),
        ("stages.2.blocks.1.conv2.norm.bias", "model.6.m.1.cv2.bn.bias"),
        ("stages.1.out_conv.bn.num_batches_tracked", "model.4.cv3.bn.num_batches_tracked"),
        ("stages.1.fc.weight", None),
        ("head.weight", None),
    ],
)
def test_names(theirs: str, ours: str | None) -> None:
    assert new_name(theirs) == ours


def test_the_command_writes_a_checkpoint(tmp_path: Path) -> None:
    theirs = living("norm")
    torch.save({"state_dict": theirs.state_dict()}, tmp_path / "b.pth")
    main([str(tmp_path / "b.pth"), "--out", str(tmp_path / "out" / "b.pt"), "--classes", "4"])
    model = load_model(tmp_path / "out" / "b.pt")
    assert model.names == ("class0", "class1", "class2", "class3")
    assert {(b.activation, b.bn_eps, b.bn_momentum) for b in model.blocks if b.has_gamma} == {("relu", 1e-5, 0.1)}
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():  # a stripped file holds its convolutions in half precision
        torch.testing.assert_close(features(model, images), theirs(images), atol=0.05, rtol=0.02)


def test_it_goes_into_a_detector_with_its_relu() -> None:
    rows = [
        [-1, 1, "Conv", [16, 6, 2, 2]],
        [-1, 1, "Conv", [24, 3, 2]],
        [-1, 3, "C3", [24]],
        [-1, 1, "Conv", [32, 3, 2]],
        [-1, 6, "C3", [32]],
    ]
    head = [[-1, 1, "SPPF", [32, 5]], [[5], 1, "Detect", ["nc", "anchors"]]]
    spec = SMALL_YAML | {"width_multiple": 1.0, "backbone": rows, "head": head, "anchors": SMALL_YAML["anchors"][:1]}
    detector = Model(from_spec(spec, "d", 2), {}, ("a", "b"))
    backbone = import_backbone(living(widths=(16, 24, 32), depths=(1, 2)).state_dict(), 5)
    options = BackboneOptions(PruneOptions("b.pt", "d", "p_", cfg="d.yaml"))
    model = combined(backbone, detector, options, fresh=True)
    cut = backbone_cut(model, options)
    end = backbone_end(cut.blocks)
    assert {b.activation for b in cut.blocks[:end] if b.has_gamma} == {"relu"} and {b.bn_eps for b in cut.blocks[:end] if b.has_gamma} == {
        1e-5
    }
    network = Network(cut.blocks).eval()
    network.load_state_dict(dict(cut.state))
    images = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(network(images)[0], cut.masked(images)[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {k: v for k, v in s.items() if not k.startswith("stem")}, "holds no tensor stem.conv.weight"),
        (lambda s: s | {"stages.0.attention.weight": torch.zeros(1)}, "stages.0.attention.weight .and 0 more. is no name of a"),
        (lambda s: {k: v for k, v in s.items() if "stages.1.conv1.conv" not in k}, "model.4.cv2"),
        (lambda s: s | {"stages.0.out_conv.bn.bias": torch.zeros(5)}, "is no DarknetYOLOv5 backbone: model.2.cv3.bn.bias is 24 in the structure and 5"),
    ],
)  # fmt: skip
def test_what_is_no_such_backbone_is_named(change, message: str) -> None:
    with pytest.raises(InputError, match=message):
        import_backbone(change(living().state_dict()), 3, "b.pth")


def test_files_that_hold_no_tensors_are_refused(tmp_path: Path) -> None:
    torch.save(alive, tmp_path / "code.pth")
    with pytest.raises(InputError, match="no file of tensors alone"):
        read_tensors(tmp_path / "code.pth")
    torch.save({"a": 1}, tmp_path / "plain.pth")
    with pytest.raises(InputError, match="holds no state dict"):
        read_tensors(tmp_path / "plain.pth")
