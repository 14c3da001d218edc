"""Classifiers: in the block graph, in pruning, trained by the loop of detection on an image folder, measured, and refused where boxes are wanted."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml

from data.digit_folders import FolderOptions, generate
from engine.classify import Accuracy, ClassificationObjective
from models.blocks import Block, Blocks, check, image_multiple, is_classifier, parameters, strides
from models.cfg import read_cfg_text, write_cfg
from models.checkpoint import Model, load_model, save_model, shapes_of
from models.darknet import darknet_obstacles, write_pair
from models.network import Network, fuse
from models.yaml_reader import from_spec
from pruning.criteria import gamma_scores, scores_of
from pruning.policy import select_masks
from pruning.spaces import KeepReason, find_spaces
from tests.helpers import SMALL_CLASSIFIER, SMALL_YAML, STOCK, alive, stock, write_dataset, write_folder
from tests.test_pruning import POLICIES, assert_oracle, random_mask
from utils.augment import AugmentOptions
from utils.dataset import DatasetOptions
from utils.errors import InputError
from utils.image_folder import ClassificationDataset, augmented, cut_square, read_image_folders, scan_folder


def call(script: str, *args: object) -> None:
    importlib.import_module(script).main([str(a) for a in args])


# ---- the block graph -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", STOCK)
def test_stock_backbones_hold_the_detectors_layers_0_to_8(size: str) -> None:
    detector, backbone = shapes_of(stock(size)), shapes_of(stock(f"{size}b"))
    own = {key: shape for key, shape in detector.items() if int(key.split(".")[1]) <= 8}
    width = own["model.8.cv3.bn.weight"][0]
    assert backbone == own | {"model.10.linear.weight": (1000, width, 1, 1), "model.10.linear.bias": (1000,)}
    blocks = stock(f"{size}b")
    assert is_classifier(blocks) and not is_classifier(stock(size))
    assert strides(blocks) == () and image_multiple(blocks) == 32
    stated = (Path(__file__).parent.parent / "models" / f"yolov5{size}b.yaml").read_text()
    assert f"{sum(parameters(blocks)):,} parameters at 1000 classes" in stated


@pytest.mark.parametrize("size", STOCK)
def test_cfg_round_trip_of_classifiers(size: str) -> None:
    blocks = stock(f"{size}b", 10)
    assert read_cfg_text(write_cfg(blocks)) == blocks
    assert read_cfg_text(write_cfg(blocks), classes=7) == stock(f"{size}b", 7)


def test_pooling_and_the_linear_layer_are_torchs() -> None:
    network = alive(stock("nb", 5))
    seen: list[torch.Tensor] = []
    network.get_submodule("model.8.cv3").register_forward_hook(lambda module, inputs, output: seen.append(output))
    images = torch.rand(2, 3, 64, 96)
    (logits,) = network(images)
    linear = network.get_submodule("model.10.linear")
    wanted = F.linear(F.adaptive_avg_pool2d(seen[0], 1).flatten(1), linear.weight.flatten(1), linear.bias)
    assert logits.shape == (2, 5, 1, 1) and network.classes == 5 and network.levels == ()
    torch.testing.assert_close(logits.flatten(1), wanted)
    torch.testing.assert_close(fuse(network)(images)[0], logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head": [[-1, 1, "Classify", ["nc"]]]}, "classes are scored once per image; pool before it"),
        ({"head": [[-1, 1, "nn.AdaptiveAvgPool2d", [2]], [-1, 1, "Classify", ["nc"]]]}, "AdaptiveAvgPool2d to 2; only to 1"),
        ({"head": [[-1, 1, "nn.AdaptiveAvgPool2d", [1]]]}, "no detection level and is no classifier: a yaml ends with Detect or Classify"),
        ({"head": SMALL_CLASSIFIER["head"] + [[5, 1, "nn.AdaptiveAvgPool2d", [1]], [-1, 1, "Classify", ["nc"]]]}, "or classifies .one softmax"),
        ({"head": [[[5], 1, "Detect", ["nc", "anchors"]]]}, "anchors must be a list"),
    ],
)  # fmt: skip
def test_a_wrong_classifier_is_named(change: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        from_spec(SMALL_CLASSIFIER | change, "my.yaml")


def test_filters_that_do_not_fit_the_classes_are_named() -> None:
    blocks = list(from_spec(SMALL_CLASSIFIER, "small"))
    blocks[-1] = replace(blocks[-1], classes=4)
    with pytest.raises(InputError, match="3 channels, but 4 classes need filters=4"):
        check(blocks)


def test_opencv_reads_the_darknet_pair_and_gives_the_softmax(tmp_path: Path) -> None:
    blocks = stock("nb", 5)
    network = alive(blocks)
    assert darknet_obstacles(blocks) == []
    weights = write_pair(Model(blocks, network.state_dict(), tuple("abcde")), tmp_path / "n.cfg", 64, 96)
    again = load_model(weights)
    assert is_classifier(again.blocks) and again.names == tuple("abcde")
    torch.testing.assert_close(again.network()(torch.ones(1, 3, 64, 96))[0], network(torch.ones(1, 3, 64, 96))[0], atol=1e-4, rtol=1e-3)
    reader = cv2.dnn.readNetFromDarknet(str(tmp_path / "n.cfg"), str(weights))
    images = torch.rand(1, 3, 64, 96)
    reader.setInput(images.numpy())
    torch.testing.assert_close(torch.from_numpy(reader.forward()), network(images)[0].softmax(1).detach(), atol=1e-5, rtol=1e-4)


# ---- pruning -------------------------------------------------------------------------------------------------------------------


def oracle_blocks() -> Blocks:
    return stock("nb", 6)


@pytest.mark.parametrize("policy", POLICIES)
def test_oracle_of_every_script_on_a_classifier(policy: str) -> None:
    blocks = oracle_blocks()
    network, spaces = _loud(blocks), find_spaces(blocks)
    selection = select_masks(spaces, gamma_scores(blocks, network.state_dict()), POLICIES[policy])
    assert not selection.mask.all()
    assert_oracle(blocks, network, selection.mask, spaces)


@pytest.mark.parametrize("criterion", ["l1", "l2", "fpgm"])
def test_oracle_of_filter_criteria_on_a_classifier(criterion: str) -> None:
    blocks = oracle_blocks()
    network, spaces = _loud(blocks), find_spaces(blocks)
    mask = select_masks(spaces, scores_of(blocks, network.state_dict(), criterion), POLICIES["slim_prune"]).mask
    assert_oracle(blocks, network, mask, spaces)


@pytest.mark.parametrize("seed", range(3))
def test_oracle_on_random_masks_of_a_classifier(seed: int) -> None:
    blocks = oracle_blocks()
    spaces = find_spaces(blocks)
    assert_oracle(blocks, _loud(blocks, seed), random_mask(spaces, seed), spaces)


def test_the_logits_stay_whole() -> None:
    blocks = oracle_blocks()
    spaces = find_spaces(blocks)
    head = next(i for i, b in enumerate(blocks) if b.name == "model.10.linear")
    (space,) = [s for s in spaces.spaces if head in s.producers]
    assert space.keep is KeepReason.FEEDS_YOLO


def _loud(blocks: Blocks, seed: int = 0) -> Network:
    """`alive`, with a linear layer whose logits differ: a mean over the map moves them little otherwise."""
    network = alive(blocks, seed)
    with torch.no_grad():
        network.get_submodule("model.10.linear").weight.mul_(10)
    return network


# ---- data ----------------------------------------------------------------------------------------------------------------------


def test_a_folder_is_read_by_its_class_folders(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "data")
    folders = read_image_folders(root)
    assert folders.names == ("kind0", "kind1", "kind2")
    (root / "val" / "kind1" / "bad.jpg").write_bytes(b"no image")
    labels = scan_folder(folders.folder("val"), folders.names)
    assert len(labels) == 18 and labels.corrupt == 1 and "bad.jpg: image ignored" in labels.messages[0]
    assert [rows[0, 0] for rows in labels.labels] == [0] * 6 + [1] * 6 + [2] * 6
    assert folders.folder("test") == root / "val", "val stands in for a test split that is not there"


def test_a_yaml_names_the_classes_in_its_own_order(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "data")
    path = tmp_path / "d.yaml"
    path.write_text(f"path: {root}\ntrain: train\nval: val\nnames: [kind2, kind0, kind1]\n")
    folders = read_image_folders(path)
    labels = scan_folder(folders.folder("train"), folders.names)
    assert {p.parent.name: int(rows[0, 0]) for p, rows in zip(labels.images, labels.labels)} == {"kind2": 0, "kind0": 1, "kind1": 2}
    path.write_text(f"path: {root}\ntrain: train\nval: val\nnames: [kind2, kind0]\n")
    with pytest.raises(InputError, match="kind1 is none of the 2 classes"):
        read_image_folders(path)


def test_other_layouts_are_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="has no class folders; a classifier's data is a folder with train/CLASS"):
        read_image_folders(tmp_path / "empty")
    (tmp_path / "train" / "a").mkdir(parents=True)
    folders = read_image_folders(tmp_path)
    with pytest.raises(InputError, match="has no split 'val'"):
        folders.folder("val")
    with pytest.raises(InputError, match="no usable image"):
        scan_folder(folders.folder("train"), folders.names)


def test_evaluation_cuts_the_middle_square_and_training_varies_it() -> None:
    image = np.arange(40 * 60 * 3, dtype=np.uint8).reshape(40, 60, 3)
    assert np.array_equal(cut_square(image, 1.0, 0.5, 0.5, 40), image[:, 10:50])
    assert np.array_equal(cut_square(image, 0.5, 0, 1, 20), image[20:, :20])
    still = AugmentOptions(0, 0, 0, scale=0, fliplr=0)
    square = image[:, 10:50]
    assert np.array_equal(augmented(square, 40, np.random.default_rng(0), still), square)
    flipped = AugmentOptions(0, 0, 0, scale=0, fliplr=1)
    assert np.array_equal(augmented(square, 40, np.random.default_rng(0), flipped), square[:, ::-1])


def test_samples_depend_on_seed_epoch_and_image_alone(tmp_path: Path) -> None:
    labels = scan_folder(write_folder(tmp_path / "d") / "train", ("kind0", "kind1", "kind2"))
    dataset = ClassificationDataset(labels, DatasetOptions(64, AugmentOptions(), seed=3))
    first, again, later = dataset[0, 4], dataset[0, 4], dataset[1, 4]
    assert torch.equal(first.image, again.image) and not torch.equal(first.image, later.image)
    assert first.image.shape == (3, 64, 64) and first.labels.tolist() == [[0, 0, 0.5, 0.5, 1, 1]]


def test_the_generator_gives_the_same_bytes_and_separate_scans(tmp_path: Path) -> None:
    options = FolderOptions(size=32, share=0.05)
    for name in ("a", "b"):
        generate(tmp_path / name, options)
    files = {p.relative_to(tmp_path / "a"): p.read_bytes() for p in (tmp_path / "a").rglob("*.jpg")}
    assert files == {p.relative_to(tmp_path / "b"): p.read_bytes() for p in (tmp_path / "b").rglob("*.jpg")}
    assert len({path.stem for path in files}) == len(files), "no scan is in both splits"
    assert {path.parent.name for path in files if path.parts[0] == "train"} == set("0123456789")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x").touch()
    with pytest.raises(InputError, match="is not a generated dataset"):
        generate(tmp_path / "mine", options)


# ---- objective and figures -----------------------------------------------------------------------------------------------------


def test_the_loss_is_cross_entropy_with_smoothing() -> None:
    logits, targets = torch.randn(4, 3, 1, 1), torch.tensor([[i, c, 0.5, 0.5, 1, 1] for i, c in enumerate((0, 2, 1, 1))])
    total, parts = ClassificationObjective(0.1)(lambda images: [logits], torch.zeros(4, 3, 8, 8), targets)
    log_p, smooth = logits.flatten(1).log_softmax(1), torch.full((4, 3), 0.1 / 3)
    smooth[torch.arange(4), targets[:, 1].long()] += 0.9
    torch.testing.assert_close(total, -(smooth * log_p).sum(1).mean())
    assert parts.tolist() == [float(total)]


def test_accuracy_counts_top1_and_top5() -> None:
    found = Accuracy(np.zeros((8, 8)))
    logits = torch.arange(7, 0, -1.0).repeat(4, 1)  # class 0 first, 6 last
    found.add(logits, torch.tensor([0, 4, 5, 0]))
    assert (found.images, found.top1, found.top5) == (4, 2, 3) and found.fitness == 0.5
    assert found.matrix[0, 0] == 2 and found.matrix[0, 4] == 1 and found.matrix.sum() == 4
    both = found.merged([found])
    assert both.images == 8 and both.metrics() == found.metrics()


# ---- scripts -------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data/`, `small.yaml` and a trained classifier `base/weights/last.pt`."""
    root = tmp_path_factory.mktemp("classify")
    write_folder(root / "data")
    (root / "small.yaml").write_text(yaml.safe_dump(SMALL_CLASSIFIER))
    call("train", "--cfg", root / "small.yaml", "--epochs", 2, "--name", "base", *common(root))
    return root


def common(root: Path) -> list[object]:
    return ["--data", root / "data", "--img", 64, "--batch", 6, "--workers", 0, "--project", root, "--device", "cpu", "--no-amp"]


def test_training_leaves_a_run_like_that_of_a_detector(work: Path) -> None:
    run = work / "base"
    found = {p.name for p in run.iterdir()}
    assert {
        "weights",
        "hyp.yaml",
        "opt.yaml",
        "results.csv",
        "results.png",
        "train_batch0.jpg",
        "confusion_matrix.png",
        "metrics.json",
    } <= found
    header = [name.strip() for name in (run / "results.csv").read_text().splitlines()[0].split(",")]
    assert header[:5] == ["epoch", "train/cls_loss", "metrics/accuracy_top1", "metrics/accuracy_top5", "val/cls_loss"]
    model = load_model(run / "weights" / "last.pt")
    assert model.names == ("kind0", "kind1", "kind2") and model.training is None and is_classifier(model.blocks)


def test_one_run_equals_a_run_and_its_resumption(work: Path) -> None:
    from engine.options import TrainOptions
    from engine.session import resume, train

    class Stop(Exception):
        pass

    def stop(*args: object) -> None:
        raise Stop

    from engine.observers import EarlyStopping

    options = TrainOptions(
        str(work / "data"), cfg=str(work / "small.yaml"), epochs=2, batch_size=6, imgsz=64, workers=0, device="cpu", amp=False,
        project=str(work), name="cut", save_period=1,
    )  # fmt: skip
    original = EarlyStopping.epoch_end
    EarlyStopping.epoch_end = lambda self, loop, record: stop() if record.epoch == 1 else original(self, loop, record)
    try:
        with pytest.raises(Stop):
            train(options)
    finally:
        EarlyStopping.epoch_end = original
    resume(work / "cut" / "weights" / "last.pt")
    one, two = (load_model(work / name / "weights" / "last.pt").state for name in ("base", "cut"))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_val_gives_the_accuracy_that_training_ended_with(work: Path) -> None:
    call("val", "--weights", work / "base/weights/best.pt", "--data", work / "data", "--project", work, "--name", "val", "--device", "cpu")
    trained, again = (json.loads((work / name / "metrics.json").read_text()) for name in ("base", "val"))
    for key in ("task", "images", "accuracy_top1", "accuracy_top5", "params", "flops"):
        assert trained[key] == again[key]
    assert again["task"] == "classify" and again["images"] == 18 and again["accuracy_top5"] == 1


def test_sparsity_training_moves_the_gammas(work: Path) -> None:
    base = work / "base/weights/last.pt"
    call("train_sparsity", "--weights", base, "--epochs", 2, "--sr", 0.5, "--name", "sparse", *common(work))
    before, after = (
        np.concatenate(list(gamma_scores(m.blocks, m.state).values()))
        for m in (load_model(base), load_model(work / "sparse/weights/last.pt"))
    )
    assert after.mean() < before.mean()


def test_a_classifiers_backbone_starts_a_detector(work: Path, caplog: pytest.LogCaptureFixture) -> None:
    from models.checkpoint import transfer

    model, detector = load_model(work / "base/weights/last.pt"), Network(from_spec(SMALL_YAML, "small", 3))
    said = transfer(model.state, detector)
    own = [key for key in detector.state_dict() if int(key.split(".")[1]) <= 5]
    assert said == f"transferred {len(own)}/{len(detector.state_dict())} tensors"
    assert all(torch.equal(detector.state_dict()[key], model.state[key]) for key in own)


@pytest.mark.slow
def test_a_detector_is_trained_from_a_classifier_and_back(work: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = write_dataset(work / "boxes")
    (work / "detector.yaml").write_text(yaml.safe_dump(SMALL_YAML))
    flags = ["--epochs", 1, "--img", 64, "--batch", 4, "--workers", 0, "--project", work, "--device", "cpu"]
    call("train", "--weights", work / "base/weights/last.pt", "--cfg", work / "detector.yaml", "--data", data, "--name", "det", *flags)
    call(
        "train", "--weights", work / "det/weights/last.pt", "--cfg", work / "small.yaml", "--data", work / "data", "--name", "back", *flags
    )
    own = sum(int(key.split(".")[1]) <= 5 for key in load_model(work / "det/weights/last.pt").state)
    assert sum(said.startswith(f"transferred {own}/") for said in caplog.messages) == 2


@pytest.mark.parametrize(
    ("script", "args"),
    [
        ("detect", ["--source", "data/train/kind0/0.png"]),
        ("prune_detect", ["--source", "data/train/kind0/0.png"]),
        ("slim_prune", ["--data", "data"]),
        ("prune", ["--data", "data", "--dry-run"]),
        ("layer_prune", ["--data", "data"]),
        ("sensitivity", ["--data", "data"]),
    ],
)  # fmt: skip
def test_scripts_for_boxes_refuse_a_classifier(work: Path, script: str, args: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(work)
    with pytest.raises(InputError, match="last.pt: is a classifier, and this takes detectors; val.py measures classifiers"):
        call(script, "--weights", "base/weights/last.pt", *args, "--name", "refused")


@pytest.mark.parametrize("flag", ["--rect", "--quad", "--multi-scale", "--image-weights", "--single-cls", "--cache"])
def test_flags_for_boxes_are_refused_in_training(work: Path, flag: str) -> None:
    with pytest.raises(InputError, match=f"{flag} is for detectors, and this model is a classifier"):
        call("train", "--cfg", work / "small.yaml", flag, "--name", "refused", *common(work))


def test_val_refuses_other_classes_and_flags(work: Path, tmp_path: Path) -> None:
    weights = work / "base/weights/best.pt"
    with pytest.raises(InputError, match="has 3 classes, .* has 2; evaluate on the data"):
        call("val", "--weights", weights, "--data", write_folder(tmp_path / "two", nc=2), "--project", tmp_path)
    with pytest.raises(InputError, match="--save-json is for detectors"):
        call("val", "--weights", weights, "--data", work / "data", "--save-json", "--project", tmp_path)


def test_a_checkpoint_of_a_classifier_is_read_back(tmp_path: Path) -> None:
    blocks = stock("nb", 2)
    model = Model(blocks, alive(blocks).state_dict(), ("a", "b"))
    save_model(tmp_path / "c.pt", model)
    again = load_model(tmp_path / "c.pt")
    assert again.blocks == blocks and again.names == ("a", "b")
    assert Block("softmax", "model.10", (len(blocks) - 2,), 2, classes=2) == blocks[-1]
