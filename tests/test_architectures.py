"""Every stock yaml: published counts, shapes, cfg round trip, one training step and evaluation, and the pruning oracle.

Full-size models are counted on the meta device. What computes runs on the same rows at an eighth of the width and a third of the depth;
`benchmarks/architectures.py` runs the oracle at full size.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

from engine.evaluate import EvaluateOptions, evaluate
from engine.loop import Loop, LoopOptions
from engine.objectives import DetectionObjective
from engine.optim import build_optimizer
from engine.options import TrainOptions
from engine.schedule import ScheduleOptions, YoloSchedule
from engine.seams import EpochRecord, Observer, Seams
from engine.session import train
from models import checkpoint
from models.blocks import Block, Blocks, check, flops, image_multiple, parameters, strides
from models.cfg import read_cfg_text, write_cfg
from models.checkpoint import load_model, shapes_of
from models.network import Network
from models.yaml_reader import from_spec, read_yaml
from pruning.masked import zero_gamma
from pruning.policy import select_masks
from pruning.spaces import KeepReason, find_spaces
from pruning.surgery import fold_constants, prune
from tests.helpers import ROOT, alive, with_module, write_dataset
from tests.test_pruning import POLICIES, assert_oracle, random_mask
from utils.anchors import autoanchor
from utils.data_config import read_data
from utils.dataset import DatasetOptions, DetectionDataset, make_loader
from utils.device import Precision
from utils.errors import InputError
from utils.labels import scan_labels
from utils.loss import DetectionLoss

# Published by YOLOv5 at 80 classes: parameters, length of the state dict, GFLOPs at 640 px (2 x MACs as thop counts them), and strides.
P5, P6 = (8, 16, 32), (8, 16, 32, 64)
PUBLISHED = {
    "yolov5n": (1_872_157, 349, 4.6, P5),
    "yolov5s": (7_235_389, 349, 16.6, P5),
    "yolov5m": (21_190_557, 481, 49.2, P5),
    "yolov5l": (46_563_709, 613, 109.6, P5),
    "yolov5x": (86_749_405, 745, 206.3, P5),
    "yolov5n6": (3_246_940, 459, 4.7, P6),
    "yolov5s6": (12_626_620, 459, 17.0, P6),
    "yolov5m6": (35_731_932, 627, 50.3, P6),
    "yolov5l6": (76_770_172, 795, 111.8, P6),
    "yolov5x6": (140_794_780, 963, 210.5, P6),
    "yolov3": (61_949_149, 439, 156.6, P5),
    "yolov3-spp": (62_998_749, 445, 157.5, P5),
    "yolov3-tiny": (8_852_366, 71, 13.3, (16, 32)),
    "yolov5-p2": (47_493_372, 711, 126.3, (4, 8, 16, 32)),
    "yolov5-p34": (5_331_518, 311, 15.1, (8, 16)),
    "yolov5-p6": (76_770_172, 795, 111.8, P6),
    "yolov5-p7": (144_281_723, 977, 116.5, (8, 16, 32, 64, 128)),
    "yolov5-panet": (46_563_709, 613, 109.6, P5),
    "yolov5-fpn": (41_117_565, 547, 100.3, P5),
    "yolov5-bifpn": (46_825_853, 613, 110.4, P5),
    "yolov5s-LeakyReLU": (7_235_389, 349, 16.6, P5),
    "yolov5s-ghost": (3_897_605, 529, 8.9, P5),
    # One key less than published: `anchor_grid`, the anchors once more in pixels, is no longer kept.
    "yolov5s-v5.0": (7_276_605, 361, 17.2, P5),
    "yolov5s6-v5.0": (12_667_836, 471, 17.5, P6),
    "yolov5s-v3.0": (7_468_157, None, None, P5),
    "yolov5s-v3.1": (7_468_157, None, None, P5),
}
# The same rows at other multiples: depth, width, parameters, keys.
OLDER = [
    ("yolov5s-v5.0", 0.67, 0.75, 21_375_645, 505),
    ("yolov5s-v5.0", 1.0, 1.0, 47_056_765, 649),
    ("yolov5s-v5.0", 1.33, 1.25, 87_775_965, 793),
    ("yolov5s6-v5.0", 0.67, 0.75, 35_917_020, 651),
    ("yolov5s6-v5.0", 1.0, 1.0, 77_263_228, 831),
    ("yolov5s6-v5.0", 1.33, 1.25, 141_821_340, 1011),
    ("yolov5s-v3.0", 0.67, 0.75, 21_805_053, None),
    ("yolov5s-v3.0", 1.0, 1.0, 47_818_749, 657),
    ("yolov5s-v3.0", 1.33, 1.25, 88_965_245, None),
]
# One model stands for those that have the same rows and differ in their multiples or anchors alone.
DISTINCT = [
    name
    for name in PUBLISHED
    if name not in "yolov5s yolov5m yolov5l yolov5x yolov5-panet yolov5s6 yolov5m6 yolov5l6 yolov5x6 yolov5-p6".split()
]
CPU = Precision(torch.device("cpu"))


def file_of(name: str) -> Path:
    paths = [ROOT / "models" / folder / f"{name}.yaml" for folder in ("", "hub")]
    return next(p for p in paths if p.exists())


def spec_of(name: str, depth: float | None = None, width: float | None = None) -> dict:
    spec = yaml.safe_load(file_of(name).read_text())
    return spec | {k: v for k, v in (("depth_multiple", depth), ("width_multiple", width)) if v is not None}


@cache
def full(name: str) -> Blocks:
    return read_yaml(file_of(name))


@cache
def narrow(name: str) -> Blocks:
    """The same rows with few channels and repeats, for 3 classes."""
    return from_spec(spec_of(name, 0.33, 0.125), name, 3)


def small_image(blocks: Blocks) -> int:
    """A side of which the coarsest map still has two cells."""
    return 2 * image_multiple(blocks)


@cache
def narrow_alive(name: str) -> Network:
    return alive(narrow(name), size=small_image(narrow(name)))


# ---- structure -----------------------------------------------------------------------------------------------------------------


def test_every_yaml_that_ships_is_in_the_table() -> None:
    shipped = {p.stem for p in (ROOT / "models").rglob("*.yaml")}
    assert shipped == set(PUBLISHED) | {f"yolov5{size}b" for size in "nsmlx"}, "the classifiers: tests/test_classify.py"


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_counts(name: str) -> None:
    count, keys, gflops, levels = PUBLISHED[name]
    blocks = full(name)
    assert sum(parameters(blocks)) == count
    assert keys is None or len(shapes_of(blocks)) == keys
    assert strides(blocks) == levels
    # thop counts batch norms and the like too, so its figure is a little larger than that of the convolutions alone.
    assert gflops is None or 0.96 * gflops < sum(flops(blocks)) / 1e9 < gflops
    stated = re.search(r"# ([\d,]+) parameters", file_of(name).read_text())
    assert stated is None or int(stated[1].replace(",", "")) == count, "the yaml's own header"


@pytest.mark.parametrize(("name", "depth", "width", "count", "keys"), OLDER)
def test_published_counts_of_the_other_sizes_of_older_layouts(name: str, depth: float, width: float, count: int, keys: int | None) -> None:
    blocks = from_spec(spec_of(name, depth, width), name)
    assert sum(parameters(blocks)) == count
    assert keys is None or len(shapes_of(blocks)) == keys


@pytest.mark.parametrize("name", PUBLISHED)
def test_cfg_round_trip(name: str) -> None:
    blocks = full(name)
    text = write_cfg(blocks)
    assert read_cfg_text(text) == blocks
    assert read_cfg_text(text, classes=7) == read_yaml(file_of(name), 7)


@pytest.mark.parametrize("name", DISTINCT)
def test_maps_of_the_full_size(name: str) -> None:
    """Channels and cells of every level, at full size but without memory."""
    blocks = full(name)
    side = small_image(blocks)
    with torch.device("meta"):
        maps = Network(blocks)(torch.empty(1, 3, side, 2 * side))
    assert [tuple(m.shape) for m in maps] == [(1, 255, side // s, 2 * side // s) for s in strides(blocks)]


@pytest.mark.parametrize(
    ("name", "key", "shape"),
    [
        ("yolov5n6", "model.33.m.3.weight", (255, 256, 1, 1)),
        ("yolov5n6", "model.33.anchors", (4, 3, 2)),
        ("yolov3", "model.2.cv1.conv.weight", (32, 64, 1, 1)),  # one bottleneck: no index
        ("yolov3", "model.4.1.cv2.conv.weight", (128, 64, 3, 3)),  # two in a row
        ("yolov3", "model.6.7.cv2.bn.running_var", (256,)),
        ("yolov3-tiny", "model.13.conv.weight", (1024, 512, 3, 3)),
        ("yolov5s-ghost", "model.2.m.0.conv.0.cv1.conv.weight", (8, 32, 1, 1)),
        ("yolov5s-ghost", "model.2.m.0.conv.2.cv2.conv.weight", (16, 1, 5, 5)),
        ("yolov5s-ghost", "model.1.cv2.bn.weight", (32,)),
        ("yolov5s-v5.0", "model.0.conv.conv.weight", (32, 12, 3, 3)),
        ("yolov5s-v5.0", "model.8.cv2.conv.weight", (512, 1024, 1, 1)),
        ("yolov5s-v3.1", "model.2.cv3.weight", (32, 32, 1, 1)),
        ("yolov5s-v3.1", "model.2.bn.running_mean", (64,)),
    ],
)
def test_state_dict_keys_are_yolov5s(name: str, key: str, shape: tuple) -> None:
    assert shapes_of(full(name))[key] == shape


def test_activations_of_the_eras() -> None:
    def acts(name: str, kind: str) -> set[str]:
        return {b.activation for b in full(name) if b.kind == kind and b.has_gamma}

    assert acts("yolov5s-LeakyReLU", "convolutional") == {"leaky"}
    assert (acts("yolov5s-v3.0", "convolutional"), acts("yolov5s-v3.0", "batchnorm")) == ({"leaky"}, {"leaky"})
    assert (acts("yolov5s-v3.1", "convolutional"), acts("yolov5s-v3.1", "batchnorm")) == ({"hardswish"}, {"leaky"})
    assert acts("yolov5s-v5.0", "convolutional") == {"silu"}
    assert acts("yolov5s-ghost", "convolutional") == {"silu", "linear"}
    spec = spec_of("yolov5s-v3.0") | {"activation": "nn.LeakyReLU(negative_slope=0.1, inplace=True)"}
    assert from_spec(spec, "spelled out") == full("yolov5s-v3.0")


def test_kernels_written_for_both_axes_and_other_channel_multiples() -> None:
    spec = spec_of("yolov3")
    spec["head"][1] = [-1, 1, "Conv", [512, [1, 1]]]  # as YOLOv5 up to v6.0 wrote it
    assert from_spec(spec, "v6.0") == full("yolov3")
    widths = {b.channels for b in from_spec(spec_of("yolov5n", width=0.3) | {"channel_multiple": 4}, "x") if b.name == "model.0"}
    assert widths == {20}  # 64 * 0.3 = 19.2


# ---- what convolutional blocks cannot hold -------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["C3TR", "TransformerBlock"])
def test_attention_is_refused_from_a_yaml_and_from_a_checkpoint(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of("yolov5s")
    spec["backbone"][8] = [-1, 3, module, [1024]]
    with pytest.raises(InputError, match=f"t.yaml: layer 8: {module} is attention"):
        from_spec(spec, "t.yaml")
    monkeypatch.setattr(checkpoint.official, "read_official", lambda path: SimpleNamespace(yaml=spec, nc=80))
    with pytest.raises(InputError, match=f"t.pt .its yaml.: layer 8: {module} is attention"):
        checkpoint._from_official(Path("t.pt"))


def test_maps_that_differ_by_a_border_are_refused() -> None:
    spec = spec_of("yolov3-tiny")
    spec["backbone"][11] = [-1, 1, "nn.ZeroPad2d", [0]]
    spec["head"][5] = [[-1, 8], 1, "Concat", [1]]
    with pytest.raises(InputError, match=r"tiny: block model.18: its inputs have different resolutions \(14x14 and 16x16"):
        from_spec(spec, "tiny")


# ---- zero padding --------------------------------------------------------------------------------------------------------------


def padded(classes: int = 2) -> Blocks:
    """A detector whose only border is that of a zeropad of the tiny model's kind."""
    conv = {"activation": "silu", "batch_norm": True}
    blocks = [
        Block("input", channels=3), Block("convolutional", "model.0", (0,), 16, 4, 4, **conv), Block("convolutional", "model.1", (1,), 16, **conv),
        Block("zeropad", "model.2", (2,), 16, pads=(0, 1, 0, 1)), Block("maxpool", "model.3", (3,), 16, 2, 1),
        Block("convolutional", "model.4", (4,), 12, **conv), Block("convolutional", "model.5.m.0", (5,), 3 * (classes + 5), bias=True),
        Block("yolo", "model.5", (6,), 3 * (classes + 5), anchors=((8.0, 9.0), (16.0, 12.0), (30.0, 40.0)), classes=classes),
    ]  # fmt: skip
    return check(blocks)


def test_a_zero_padded_pool_is_not_a_padded_pool() -> None:
    x = torch.randn(1, 4, 6, 6)
    network = Network(padded())
    pooled = network._ops[4](network._ops[3](x))
    assert pooled.shape == x.shape
    wide = torch.zeros(1, 4, 7, 7)
    wide[..., :6, :6] = x
    assert torch.equal(pooled, wide.unfold(2, 2, 1).unfold(3, 2, 1).amax((4, 5)))
    assert pooled[..., 5, :].min() >= 0, "zeros win over the negative values of an activation"


def test_constants_fold_through_a_zeropad_exactly_but_for_its_border() -> None:
    blocks = padded()
    network, spaces = alive(blocks), find_spaces(blocks)
    mask, state = random_mask(spaces, 0), network.state_dict()
    zeroed = Network(blocks).eval()
    zeroed.load_state_dict(zero_gamma(blocks, state, spaces, mask))
    small_blocks, small_state = prune(blocks, fold_constants(blocks, state, spaces, mask), spaces, mask)
    pruned = Network(small_blocks).eval()
    pruned.load_state_dict(small_state)
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        gap = (zeroed(images)[0] - pruned(images)[0]).abs().amax((0, 1))
    assert gap[:-1, :-1].max() < 1e-4
    assert gap[-1].max() > 1e-2 and gap[:, -1].max() > 1e-2


# ---- pruning -------------------------------------------------------------------------------------------------------------------


def oracle(name: str, mask: np.ndarray) -> None:
    blocks = narrow(name)
    side = image_multiple(blocks)
    assert_oracle(blocks, narrow_alive(name), mask, find_spaces(blocks), (side, 2 * side))


@pytest.mark.parametrize("name", DISTINCT)
def test_oracle_on_a_random_mask(name: str) -> None:
    oracle(name, random_mask(find_spaces(narrow(name)), 1))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", DISTINCT)
def test_oracle_of_every_policy(name: str, policy: str) -> None:
    blocks = narrow(name)
    rng = np.random.default_rng(0)
    scores = {i: rng.random(b.channels) for i, b in enumerate(blocks) if b.has_gamma}
    selection = select_masks(find_spaces(blocks), scores, POLICIES[policy])
    assert not selection.mask.all()
    oracle(name, selection.mask)


@pytest.mark.parametrize(("module", "args"), [("GhostBottleneck", [24, 3, 2]), ("nn.ZeroPad2d", [[2, 0, 1, 1]]), ("nn.BatchNorm2d", [])])
def test_oracle_of_modules_that_no_stock_yaml_has(module: str, args: list) -> None:
    blocks = with_module(module, args)
    spaces = find_spaces(blocks)
    assert_oracle(blocks, alive(blocks), random_mask(spaces, 3), spaces)


@pytest.mark.parametrize("name", DISTINCT)
def test_all_but_image_and_head_can_be_pruned_in_whole_multiples_of_8(name: str) -> None:
    blocks = from_spec(spec_of(name, width=0.5), name)
    spaces = find_spaces(blocks)
    assert {s.keep for s in spaces.spaces} == {None, KeepReason.INPUT, KeepReason.FEEDS_YOLO}
    rng = np.random.default_rng(0)
    scores = {i: rng.random(b.channels) for i, b in enumerate(blocks) if b.has_gamma}
    selection = select_masks(spaces, scores, POLICIES["slim_prune_8x"])
    for index, block in enumerate(blocks):
        if block.has_gamma:
            kept = int(selection.of(spaces, index).sum())
            assert kept % 8 == 0 or kept == block.channels, block.name


# ---- training and evaluation ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("shapes"), images=2, size=64)


class _Records(Observer):
    def __init__(self) -> None:
        self.records: list[EpochRecord] = []

    def epoch_end(self, loop: Loop, record: EpochRecord) -> bool:
        self.records.append(record)
        return False


@pytest.mark.parametrize("name", DISTINCT)
def test_one_step_of_training_and_an_evaluation(name: str, data: Path) -> None:
    """With placeholder anchors too: nothing is matched to them, and nothing is infinite."""
    torch.manual_seed(0)
    blocks = narrow(name)
    network = Network(blocks)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    config = read_data(data)
    options = DatasetOptions(image_multiple(blocks), stride=network.max_stride, batch_size=2)
    loader = make_loader(DetectionDataset(scan_labels(config.train, config.nc), options), 0)
    loss = DetectionLoss(network.anchors, network.strides, 3, options.imgsz)

    def evaluator(network: Network) -> tuple[float, dict[str, float]]:
        evaluation = evaluate(network, loader, CPU, EvaluateOptions(progress=False), loss)
        assert all(np.isfinite([*evaluation.metrics().values(), *evaluation.losses]))
        return evaluation.fitness, {"images": evaluation.images}

    optimizer = build_optimizer(network, "SGD", 0.01, 0.9, 0.0)
    schedule = YoloSchedule(optimizer, ScheduleOptions(1, 0.01, 0.1, 0.9, 0, 0.8, 0.1, 1))
    seen = _Records()
    loop = Loop(network, DetectionObjective(loss), optimizer, schedule, loader, evaluator, CPU, LoopOptions(1), Seams(observers=[seen]))
    loop.run()
    assert seen.records[0].metrics == {"images": 2} and all(np.isfinite(list(seen.records[0].losses.values())))
    after = network.state_dict()
    still = [k for k in before if k.endswith("conv.weight") and torch.equal(before[k], after[k])]
    assert not still, "every convolution learns"


def test_placeholder_anchors_are_replaced_whatever_their_recall() -> None:
    rng = np.random.default_rng(0)
    placeholders = np.arange(6, dtype=float).reshape(1, 3, 2).repeat(2, 0)
    for wh in (rng.uniform(2, 60, (200, 2)), rng.uniform(2, 5, (3, 2))):  # few labels, which the placeholders (2, 3) and (4, 5) fit
        found = autoanchor(placeholders, wh, 4.0)
        assert found.shape == placeholders.shape and found.min() > 1
        assert not np.array_equal(found, placeholders)
    assert autoanchor(placeholders, np.zeros((5, 2)), 4.0) is placeholders, "without a label there is nothing to go by"


@pytest.mark.slow
def test_training_a_yaml_with_placeholder_anchors(tmp_path: Path, data: Path) -> None:
    spec = spec_of("yolov5-p34", 0.33, 0.125)
    path = tmp_path / "p34.yaml"
    path.write_text(yaml.safe_dump(spec))
    folder = train(TrainOptions(
        weights="", cfg=str(path), data=str(data), imgsz=64, epochs=1, batch_size=2, workers=0, device="cpu", project=str(tmp_path), name="run",
    ))  # fmt: skip
    anchors = [b.anchors for b in load_model(folder / "weights" / "last.pt").blocks if b.kind == "yolo"]
    areas = [w * h for level in anchors for w, h in level]
    assert min(min(pair) for level in anchors for pair in level) > 1
    assert areas == sorted(areas)
