"""Blocks, the yaml reader, the cfg format and the network they describe."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch

from models.blocks import Block, check, flops, parameters, resolutions, strides
from models.cfg import read_cfg_text, write_cfg
from models.checkpoint import read_structure, shapes_of
from models.convert import stock_cfgs
from models.network import Network, fuse, summary
from models.yaml_reader import from_spec, read_yaml
from tests.helpers import ROOT, SMALL_YAML, STOCK, alive, random_blocks, small, stock, with_module
from utils.errors import InputError

# Published by YOLOv5 for 80 classes: parameters, length of the state dict, GFLOPs of the convolutions at 640 px (2 x MACs).
PUBLISHED = {
    "n": (1872157, 349, 4.468),
    "s": (7235389, 349, 16.434),
    "m": (21190557, 481, None),
    "l": (46563709, 613, None),
    "x": (86749405, 745, None),
}
MODULES = [
    ("C3", [24]),
    ("C3", [24, False]),
    ("C2f", [24, True]),
    ("BottleneckCSP", [24]),
    ("SPP", [24]),
    ("SPPF", [24, 5]),
    ("GhostConv", [24]),
    ("GhostBottleneck", [24]),
    ("GhostBottleneck", [24, 3, 2]),
    ("C3Ghost", [24]),
    ("nn.ZeroPad2d", [[2, 0, 1, 1]]),
    ("nn.BatchNorm2d", []),
    ("Bottleneck", [24]),
]


@pytest.mark.parametrize("size", STOCK)
def test_stock_models_have_the_published_counts(size: str) -> None:
    blocks = stock(size)
    count, keys, gflops = PUBLISHED[size]
    assert sum(parameters(blocks)) == count
    assert len(shapes_of(blocks)) == keys
    assert gflops is None or round(sum(flops(blocks)) / 1e9, 3) == gflops
    assert strides(blocks) == (8, 16, 32)


def test_state_dict_keys_are_yolov5s() -> None:
    shapes = shapes_of(stock("n"))
    assert shapes["model.0.conv.weight"] == (16, 3, 6, 6)
    assert shapes["model.4.m.1.cv2.bn.running_var"] == (32,)
    assert shapes["model.9.cv2.conv.weight"] == (256, 512, 1, 1)
    assert shapes["model.24.anchors"] == (3, 3, 2)
    assert shapes["model.24.m.2.bias"] == (255,)
    assert shapes["model.23.cv3.bn.num_batches_tracked"] == ()


def test_shipped_cfgs_are_what_the_command_writes() -> None:
    written = stock_cfgs()
    assert set(written) == set((ROOT / "cfg").glob("*.cfg"))
    for path, text in written.items():
        assert path.read_text() == text, f"{path.name}: run python -m models.convert --stock"


@pytest.mark.parametrize("size", STOCK)
def test_cfg_round_trip_is_the_identity(size: str) -> None:
    blocks = stock(size)
    text = write_cfg(blocks)
    assert read_cfg_text(text) == blocks
    assert write_cfg(read_cfg_text(text)) == text
    assert read_cfg_text(text, classes=7) == stock(size, 7)


@pytest.mark.parametrize("seed", range(12))
def test_cfg_round_trip_of_random_blocks(seed: int) -> None:
    blocks = random_blocks(seed)
    assert read_cfg_text(write_cfg(blocks)) == blocks


@pytest.mark.parametrize(("module", "args"), MODULES)
def test_cfg_round_trip_of_every_module(module: str, args: list) -> None:
    blocks = with_module(module, args)
    assert read_cfg_text(write_cfg(blocks)) == blocks


def test_cfg_keeps_batch_norm_constants_float_anchors_and_level_order() -> None:
    blocks = list(small())
    blocks[3] = replace(blocks[3], bn_eps=1e-5, bn_momentum=0.1)
    blocks = [replace(b, anchors=tuple((w + 1 / 3, h) for w, h in b.anchors)) if b.kind == "yolo" else b for b in blocks]
    blocks = [replace(b, level=1 - b.level) if b.kind == "yolo" else b for b in blocks]
    assert read_cfg_text(write_cfg(tuple(blocks))) == tuple(blocks)


def test_yaml_and_cfg_give_equal_outputs() -> None:
    network, again = alive(small()), Network(read_cfg_text(write_cfg(small()))).eval()
    again.load_state_dict(network.state_dict())
    images = torch.rand(2, 3, 64, 96)
    assert all(torch.equal(a, b) for a, b in zip(network(images), again(images)))


def test_flops_equal_the_profilers_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    blocks = stock("n")
    network, images = Network(blocks).eval(), torch.rand(1, 3, 320, 320)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(images)
    assert counter.get_total_flops() == sum(flops(blocks, 320, 320))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # thop compares versions with a deprecated module
        from thop import profile
        from thop.vision.basic_hooks import zero_ops

        macs, _ = profile(network, (images,), custom_ops={torch.nn.BatchNorm2d: zero_ops}, verbose=False)
    assert 2 * macs == sum(flops(blocks, 320, 320))


def test_resolutions_are_the_networks() -> None:
    blocks = small()
    maps = Network(blocks)(torch.rand(1, 3, 64, 96))
    sizes = resolutions(blocks, 64, 96)
    heads = [i for i, b in enumerate(blocks) if b.kind == "yolo"]
    assert [tuple(m.shape[2:]) for m in maps] == [sizes[i] for i in heads]


@pytest.mark.parametrize(("module", "args"), MODULES)
def test_fusing_keeps_the_outputs(module: str, args: list) -> None:
    network = alive(with_module(module, args))
    images = torch.rand(2, 3, 64, 64)
    for a, b in zip(network(images), fuse(network)(images)):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_an_intermediate_is_freed_at_its_last_use() -> None:
    network = alive(small())
    seen = []
    for index, op in enumerate(network._ops):
        network._ops[index] = lambda *xs, op=op: seen.append(len(xs)) or op(*xs)
    with torch.no_grad():
        assert len(network(torch.rand(1, 3, 64, 64))) == 2
    assert len(seen) == len(network.blocks) - 1


def test_summary_is_a_tree_with_totals() -> None:
    text = summary(stock("n"))
    assert "1,872,157 parameters, 4.468 GFLOPs" in text
    assert "  model.2.m.0 " in text and "model.2.m.0.cv2" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backbone": [[-1, 1, "Cnov", [8, 3, 2]]]}, "did you mean Conv"),
        ({"backbone": [[-1, 1, "C3TR", [8]]]}, "my.yaml: layer 0: C3TR is attention, which convolutional blocks cannot hold"),
        ({"backbone": [[-1, 1, "C3x", [8]]]}, "'C3x' is not one this project can build"),
        ({"backbone": [[-1, 1, "Conv", [8, [1, 3]]]]}, "must be equal along both axes"),
        ({"backbone": [[-1, 1, "Conv", [8, 3, 1, None, 1, 2]]]}, "2 after the groups"),
        ({"backbone": [[-1, 1, "nn.ZeroPad2d", [[0, 1]]]]}, "ZeroPad2d takes a whole number or"),
        ({"activation": "nn.LeakyReLU(0.2)"}, "activation 'nn.LeakyReLU(0.2)' is not known"),
        ({"csp_activation": "nn.Tanh()"}, "csp_activation 'nn.Tanh()' is not known"),
        ({"channel_multiple": 0.5}, "channel_multiple must be a positive whole number"),
        ({"nc": 0}, "nc must be a positive"),
        ({"anchors": "auto"}, "anchors must be"),
        ({"activation": "__import__('os').system('true')"}, "activation"),
        ({"depth": 1}, "unknown key 'depth'"),
        ({"head": None}, "head must be a list"),
        ({"depth_multiple": "big"}, "depth_multiple must be a positive number, got 'big'"),
        ({"backbone": [[-1, 1, "Conv", []]]}, "the first argument must be the output channels"),
        ({"backbone": [["x", 1, "Conv", [8]]]}, "from and repeats must be whole numbers"),
        ({"head": []}, "no detection level"),
    ],
)
def test_a_wrong_yaml_is_named(change: dict, message: str) -> None:
    with pytest.raises(InputError, match=message.replace("(", r"\(").replace(")", r"\)")):
        from_spec(SMALL_YAML | change, "my.yaml")


def test_integer_anchors_are_placeholders_per_level() -> None:
    heads = [b for b in from_spec(SMALL_YAML | {"anchors": 3}, "x") if b.kind == "yolo"]
    assert [b.anchors for b in heads] == [((0.0, 1.0), (2.0, 3.0), (4.0, 5.0))] * 2


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("filters=8", "filter=8", "unknown key 'filter' in .convolutional.; did you mean filters"),
        ("[upsample]", "[upsmaple]", "unknown section .upsmaple.; did you mean upsample"),
        ("filters=24", "filters=25", "its input has 25 channels"),
        ("name=model.1\n", "name=model.0\n", "used twice"),
        ("stride=2", "stride=two", "stride=two must be a whole number"),
        ("layers=-1,-", "layers=-1,-90", "points at no earlier section"),
        ("new_coords=1\n", "", "say how boxes are decoded"),
        ("activation=silu", "activation=sillu", "did you mean silu"),
    ],
)
def test_a_wrong_cfg_is_named_with_its_line(old: str, new: str, message: str) -> None:
    text = write_cfg(small())
    assert old in text
    with pytest.raises(InputError, match=f"my.cfg.*{message}"):
        read_cfg_text(text.replace(old, new, 1), "my.cfg")


def test_decoding_and_pads_of_a_pool_are_kept() -> None:
    blocks = [replace(b, exp=b.level == 0, scale_x_y=1.05) if b.kind == "yolo" else b for b in small()]
    pool = next(i for i, b in enumerate(blocks) if b.kind == "maxpool")
    blocks[pool] = replace(blocks[pool], size=2, padding=0, pads=(0, 1, 0, 1))
    assert read_cfg_text(write_cfg(check(blocks))) == tuple(blocks)


def test_blocks_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match="different resolutions"):
        check([
            Block("input", channels=3), Block("convolutional", "a", (0,), 4, 3, 2, 1), Block("convolutional", "b", (0,), 4),
            Block("route", "", (1, 2), 8),
        ])  # fmt: skip
    with pytest.raises(InputError, match="unknown kind"):
        check([Block("input", channels=3), Block("attention", "a", (0,), 4)])


def test_missing_yaml_file_is_an_input_error(tmp_path) -> None:
    path = tmp_path / "m.yaml"
    path.write_text("nc: 3\n")
    with pytest.raises(InputError, match="not a model yaml"):
        read_yaml(path)


def test_models_that_ship_are_found_by_name(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert read_structure("yolov5s.yaml") == stock("s")
    assert read_structure("yolov5n6.yaml") == read_structure(ROOT / "models" / "hub" / "yolov5n6.yaml")
    assert read_structure("yolov5n.cfg", 3) == stock("n", 3)
    (tmp_path / "yolov5s.yaml").write_text((ROOT / "models" / "yolov5n.yaml").read_text())
    assert read_structure("yolov5s.yaml") == stock("n"), "a file that is there comes first"
