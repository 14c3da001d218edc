"""Official checkpoints: what is read from those of every release, and what their contents are refused for."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from models.checkpoint import load_model, transfer
from models.modules import MODULES
from models.network import Network, fuse
from models.official import is_plain_zip, looks_official, read_official
from tests import official_files
from tests.helpers import stock
from tests.official_files import (
    ANCHORS,
    C3TR,
    ERAS,
    FOUND,
    HUB,
    NC,
    STRIDES,
    TINY,
    DetectionModel,
    Model,
    SegmentationModel,
    assert_same_state,
    data_pkl,
    make_model,
    refusal,
    save,
    stripped,
    tiny,
    unstripped,
    with_pickle,
)
from utils.errors import InputError

# --- what is read ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Model, DetectionModel])
def test_reads_stripped(tmp_path: Path, kind: type[Model]) -> None:
    model = tiny(kind, grid_buffer=kind is Model)
    path = save(stripped(model), tmp_path / "best.pt")
    checkpoint = read_official(path)
    assert_same_state(checkpoint, model)
    assert "model.4.anchor_grid" not in checkpoint.state
    assert checkpoint.yaml == TINY
    assert (checkpoint.nc, checkpoint.names, checkpoint.stride) == (NC, ("cat", "dog"), STRIDES)
    assert torch.equal(checkpoint.anchors * torch.tensor(STRIDES).view(2, 1, 1), torch.tensor(ANCHORS))
    norms = {f"model.{index}.bn" for index in range(4)}
    assert checkpoint.bn_eps == dict.fromkeys(norms, 1e-3)
    assert checkpoint.bn_momentum == dict.fromkeys(norms, 0.03)
    acts = ("SiLU", "LeakyReLU(0.1)", "Hardswish", "Identity")
    assert checkpoint.activations == {f"model.{index}": act for index, act in enumerate(acts)}
    assert (checkpoint.epoch, checkpoint.best_fitness, checkpoint.fused) == (-1, None, False)


def test_reads_unstripped_and_prefers_ema(tmp_path: Path) -> None:
    raw, ema = tiny(), tiny()
    ema.model[0].conv.weight.data += 1
    optimizer = {
        "state": {0: {"momentum_buffer": torch.ones(8, 3, 3, 3)}},
        "param_groups": [{"lr": 0.1, "momentum": np.float64(0.8), "params": [0]}],  # as numpy's interpolation leaves it
    }
    top = stripped(raw) | {
        "epoch": 7, "best_fitness": np.array([0.25]), "ema": ema, "updates": 3, "optimizer": optimizer,
        "opt": {"weights": "a.pt", "save_dir": pathlib.PurePosixPath("runs/train/exp")}, "date": "2022-11-22",
        "git": {"remote": None}, "size": torch.Size((1, 2)),
    }  # fmt: skip
    checkpoint = read_official(save(top, tmp_path / "last.pt"))
    assert_same_state(checkpoint, ema)
    assert (checkpoint.epoch, checkpoint.best_fitness) == (7, 0.25)


@pytest.mark.parametrize("fitness", [0.5, np.float64(0.5), np.float32(0.5), np.array([0.5]), np.array(0.5)])
def test_reads_every_kind_of_fitness(tmp_path: Path, fitness: object) -> None:
    path = save(stripped(tiny()) | {"best_fitness": fitness}, tmp_path / "a.pt")
    assert read_official(path).best_fitness == 0.5


def test_reads_numpy_under_both_module_names(tmp_path: Path) -> None:
    path = save(stripped(tiny()) | {"best_fitness": np.array([0.5])}, tmp_path / "a.pt")
    pickled = data_pkl(path)
    assert b"cnumpy._core.multiarray\n" in pickled or b"cnumpy.core.multiarray\n" in pickled
    for name in (b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"):
        renamed = pickled.replace(b"cnumpy._core.", b"cnumpy.core.").replace(b"cnumpy.core.multiarray\n", name)
        assert read_official(with_pickle(path, renamed, tmp_path / "b.pt")).best_fitness == 0.5


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ({1: "dog", 0: "cat"}, ("cat", "dog")),
        ({"1": "dog", "0": "cat"}, ("cat", "dog")),
        ({1: "dog"}, ("class0", "dog")),
        (("cat", 7), ("cat", "7")),
        (None, ("class0", "class1")),
    ],
)
def test_names(tmp_path: Path, names: object, expected: tuple[str, ...]) -> None:
    model = tiny()
    model.names = names
    assert read_official(save(stripped(model), tmp_path / "a.pt")).names == expected
    del model.names
    assert read_official(save(stripped(model), tmp_path / "a.pt")).names == ("class0", "class1")


def test_tensors_that_are_views(tmp_path: Path) -> None:
    model = tiny()
    flat = torch.randn(8 * 8 * 9 + 5).half()
    first, second = model.model[1], model.model[2]
    first.conv.weight = nn.Parameter(flat[5:].view(3, 3, 8, 8).permute(3, 2, 0, 1))  # offset, not contiguous
    second.conv.weight = nn.Parameter(flat[:576].view(8, 8, 3, 3))  # overlaps the same storage
    model.model[3].bn = first.bn  # a module, hence its tensors, under two names
    model.model[0].conv.weight.data = model.model[0].conv.weight.data.to(memory_format=torch.channels_last)
    path = save(stripped(model), tmp_path / "a.pt")
    checkpoint = read_official(path)
    assert_same_state(checkpoint, model)
    assert all(tensor.is_contiguous() for tensor in checkpoint.state.values())
    checkpoint.state["model.1.conv.weight"].zero_()
    assert torch.equal(checkpoint.state["model.2.conv.weight"], second.conv.weight.float())


def test_buffers_that_are_not_persistent_are_left_out(tmp_path: Path) -> None:
    model = tiny()
    model.model[0].register_buffer("cache", torch.ones(3), persistent=False)
    assert_same_state(read_official(save(stripped(model), tmp_path / "a.pt")), model)


def test_fused(tmp_path: Path) -> None:
    model = official_files.fuse(tiny())
    checkpoint = read_official(save(stripped(model), tmp_path / "a.pt"))
    assert checkpoint.fused
    assert checkpoint.bn_eps == {}
    assert_same_state(checkpoint, model)


def test_other_protocol(tmp_path: Path) -> None:
    model = tiny()
    save(stripped(model), tmp_path / "a.pt", pickle_protocol=4)
    assert_same_state(read_official(tmp_path / "a.pt"), model)
    assert looks_official(tmp_path / "a.pt")


def test_looks_official(tmp_path: Path) -> None:
    official = save(stripped(tiny()), tmp_path / "official.pt")
    ours = save({"format": 1, "note": "models.yolo", "state": {"a": torch.ones(2)}}, tmp_path / "ours.pt")
    text = tmp_path / "text.pt"
    text.write_text("models.yolo")
    paths = (official, ours, text, tmp_path / "none.pt")
    assert [looks_official(path) for path in paths] == [True, False, False, False]
    assert [is_plain_zip(path) for path in paths] == [True, True, False, False]
    with pytest.raises(InputError, match="checkpoint of this project"):
        read_official(ours)


def test_real_checkpoint() -> None:
    path = os.environ.get("YOLOV5N_PT")
    if not path:
        pytest.skip("YOLOV5N_PT does not name the official YOLOv5n v6.0 checkpoint")
    checkpoint = read_official(Path(path))
    assert looks_official(Path(path))
    assert len(checkpoint.state) == 349
    buffers = ("running_mean", "running_var", "num_batches_tracked", "anchors")
    parameters = (tensor for key, tensor in checkpoint.state.items() if not key.endswith(buffers))
    assert sum(tensor.numel() for tensor in parameters) == 1_872_157
    assert (checkpoint.anchors * torch.tensor([8.0, 16.0, 32.0]).view(3, 1, 1)).flatten(1).tolist() == official_files.P5
    assert (checkpoint.nc, len(checkpoint.names), checkpoint.names[0]) == (80, 80, "person")
    assert checkpoint.stride == (8, 16, 32)
    assert (set(checkpoint.bn_eps.values()), set(checkpoint.bn_momentum.values())) == ({1e-3}, {0.03})
    assert set(checkpoint.activations.values()) == {"SiLU"}
    assert (checkpoint.epoch, checkpoint.fused) == (-1, False)
    assert checkpoint.best_fitness == pytest.approx(0.2676, abs=1e-4)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda model: model, "holds no dict"),
        (lambda model: model.state_dict(), "plain state_dict"),
        (lambda model: {"model": model.state_dict()}, "no pickled module"),
        (lambda model: {"epoch": 1}, "'model' is missing"),
        (lambda model: {"model": model, "ema": ({}, 1)}, "'ema' is missing or no pickled module"),
        (lambda model: {"model": model.model}, "torch.nn.modules.container.Sequential"),
        (lambda model: stripped(model) | {"best_fitness": "high"}, "best_fitness"),
    ],
)
def test_other_contents(tmp_path: Path, make: Callable, said: str) -> None:
    assert said in refusal(save(make(tiny()), tmp_path / "a.pt"))


def test_segmentation_model(tmp_path: Path) -> None:
    path = save(stripped(tiny(SegmentationModel)), tmp_path / "a.pt")
    assert "models.yolo.SegmentationModel" in refusal(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda model: setattr(model.model[4], "nc", 3), "5 + 3 classes"),
        (lambda model: setattr(model.model[4], "nc", None), "number of classes"),
        (lambda model: setattr(model, "names", ["cat"]), "1 class names for 2 classes"),
        (lambda model: setattr(model, "names", {"cat": 0, "dog": 1}), "keys are no numbers"),
        (lambda model: setattr(model, "names", {0: "cat", 2: "dog"}), r"names the class [2], but it has 2 classes"),
        (lambda model: setattr(model, "names", ["cat", "a\nb"]), "not plain texts of one line"),
        (lambda model: setattr(model, "stride", torch.tensor([8.0, 0.0])), "not positive"),
        (lambda model: delattr(model.model[4], "anchors"), "buffer 'anchors'"),
        (lambda model: delattr(model, "yaml"), "no architecture dict"),
        (lambda model: model.yaml.pop("head"), "'head' of its yaml is no list"),
        (lambda model: model.yaml["head"].append([-1, 1]), "malformed rows"),
        (lambda model: model.yaml["head"].insert(0, [-1, 10**6, "Conv", [8]]), "asks for 1000004 modules"),
        (lambda model: model.yaml["backbone"][0][3].append(10**9), "more than texts, small numbers"),
        (lambda model: setattr(model.model[0].bn, "eps", float("nan")), "model.0.bn has no positive number 'eps'"),
        (lambda model: model.yaml.update(nc=torch.ones(1)), "more than texts"),
        (lambda model: delattr(model.model[0].bn, "eps"), "model.0.bn has no positive number 'eps'"),
        (lambda model: model.model.__delitem__(4), "0 Detect layers"),
        (lambda model: model.model[4].anchors.fill_(float("nan")), "anchors are not finite"),
        (lambda model: model.yaml.update({None: 1}), "malformed keys"),
        (lambda model: setattr(model, "names", "cd"), "neither a list"),
        (lambda model: setattr(model.model[0], "_buffers", []), "malformed _buffers"),
        (lambda model: model.model[0]._buffers.update(cache="x"), "malformed _buffers"),
        (lambda model: model.model[0]._buffers.update({"x" * 200: torch.ones(1)}), "malformed _buffers"),
    ],
)
def test_contradictions(tmp_path: Path, change: Callable, said: str) -> None:
    model = tiny()
    change(model)
    assert said in refusal(save(stripped(model), tmp_path / "a.pt"))


# --- every release, as a network ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("era", ERAS)
def test_every_release_gives_its_own_logits(era: str, tmp_path: Path) -> None:
    """Stripped and with optimizer: equal to what the pickled modules compute, and with the era's own constants."""
    model = make_model(ERAS[era])
    images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    kept = stripped(model, ERAS[era])
    files = {save(kept, tmp_path / "best.pt"): -1, save(unstripped(model, ERAS[era]), tmp_path / "last.pt"): 1}
    with torch.no_grad():
        wanted = model.float().eval()(images)
        for path, epoch in files.items():
            checkpoint, loaded = read_official(path), load_model(path)
            assert checkpoint.epoch == epoch
            assert checkpoint.best_fitness == (0.25 if epoch == 1 or ERAS[era].keeps_fitness else None)
            assert all(torch.equal(a, b) for a, b in zip(loaded.network()(images), wanted))
            assert (loaded.names, len(loaded.blocks) > 60) == (("shape0", "shape1", "shape2"), True)
            norms = [(b.bn_eps, b.bn_momentum) for b in loaded.blocks if b.has_gamma]
            assert set(norms) == {(1e-3, 0.03)} and len(norms) == sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())


@pytest.mark.parametrize("name", HUB)
def test_other_architectures_give_their_own_logits(name: str, tmp_path: Path) -> None:
    model = make_model(HUB[name])
    path = save(stripped(model, HUB[name]), tmp_path / "best.pt")
    assert_same_state(read_official(path), model)
    if not {"C3Ghost", "ZeroPad2d"} <= MODULES.keys():
        pytest.skip("this version builds neither")
    images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(load_model(path).network()(images), model.float().eval()(images)))


def test_the_activations_of_the_eras() -> None:
    assert {era: ERAS[era].act_name for era in ERAS} == {
        "v3.1": "Hardswish", "v5.0": "SiLU", "v6.0 as released": "SiLU", "v6.0": "SiLU", "v6.1": "SiLU", "v6.2": "SiLU", "v7.0": "SiLU",
        "v7.0 LeakyReLU": "LeakyReLU",
    }  # fmt: skip


@pytest.mark.parametrize("era", ["v5.0", "v6.1", "v7.0"])
def test_anchors_are_those_of_the_buffer(era: str, tmp_path: Path) -> None:
    """In half precision and with the stride, whatever the yaml says; v5.0's second buffer, in pixels, says the same."""
    model = make_model(ERAS[era])
    loaded = load_model(save(stripped(model, ERAS[era]), tmp_path / "a.pt"))
    strides = torch.tensor([8.0, 16.0, 32.0]).view(3, 1, 1)
    wanted = model.head.anchors.float() * strides
    assert torch.equal(loaded.network().anchors, wanted)
    assert torch.equal(loaded.network().state_dict()["model.24.anchors"], model.head.anchors.float())
    if ERAS[era].found:
        assert 0 < (wanted - FOUND).abs().max() < 0.04, "rounded to half precision"
    else:
        assert wanted.flatten(1).tolist() == official_files.P5
        assert torch.equal(model.head.anchor_grid.float().view(3, 3, 2), wanted)


def test_strides_that_are_missing_follow_from_the_yaml(tmp_path: Path) -> None:
    model = make_model(ERAS["v5.0"])
    del model.stride, model.head.stride
    path = save(stripped(model, ERAS["v5.0"]), tmp_path / "a.pt")
    assert read_official(path).stride is None
    assert load_model(path).network().anchors.flatten(1).tolist() == official_files.P5
    model.stride = torch.tensor([8.0, 16.0, 64.0])
    with pytest.raises(InputError, match=r"strides \(8.0, 16.0, 64.0\); its yaml gives \(8, 16, 32\)"):
        load_model(save(stripped(model), tmp_path / "b.pt"))


def test_classes_are_those_of_the_head(tmp_path: Path) -> None:
    """Also where the yaml still says 80, and where it has keys that we do not know."""
    model = make_model(ERAS["v6.0"], nc=5)
    model.yaml |= {"nc": 80, "comment": "mine", "path": "x"}
    loaded = load_model(save(stripped(model), tmp_path / "a.pt"))
    assert (loaded.network().classes, len(loaded.names)) == (5, 5)


@pytest.mark.parametrize("era", ["v5.0", "v6.0", "v7.0 LeakyReLU"])
def test_fused_files_give_the_logits_of_the_unfused(era: str, tmp_path: Path) -> None:
    model = make_model(ERAS[era]).float().eval()
    loaded = load_model(save(stripped(official_files.fuse(model), ERAS[era]), tmp_path / "a.pt"))
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        for network in (loaded.network(), fuse(loaded.network())):
            for got, wanted in zip(network(images), model(images)):
                assert torch.allclose(got, wanted, atol=1e-4 * float(wanted.abs().max()))


def test_attention_is_refused_by_name(tmp_path: Path) -> None:
    model = tiny()
    model.model[1] = C3TR(8, 8)
    with pytest.raises(InputError, match=r"its model.1 is a transformer block \(C3TR\), whose attention"):
        load_model(save(stripped(model), tmp_path / "a.pt"))


def test_activations_that_we_do_not_have_are_named(tmp_path: Path) -> None:
    for act, said in ((nn.ReLU6(), "ReLU6"), (nn.LeakyReLU(0.2), r"LeakyReLU\(0.2\)")):
        model = tiny()
        model.model[2].act = act
        with pytest.raises(InputError, match=rf"model.2 has the activation {said}, which this project does not have; known: SiLU"):
            load_model(save(stripped(model), tmp_path / "a.pt"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda yaml: yaml["backbone"][0].__setitem__(2, "CrossConv"), "layer 0: module 'CrossConv'"),
        (lambda yaml: yaml["backbone"][0][3].__setitem__(0, 16), "disagree: model.0.bn"),
        (lambda yaml: yaml["backbone"][0][3].__setitem__(1, "three"), "layer 0: Conv does not take the arguments"),
        (lambda yaml: yaml["backbone"][0][3].__setitem__(0, 10**6), "disagree: model.0.bn"),
        (lambda yaml: yaml.update(depth_multiple=True), "malformed rows"),
        (lambda yaml: yaml["head"].insert(0, [-1, 1, "nn.Upsample", ["None", "two", "nearest"]]), "describes no network (ValueError"),
    ],
)
def test_yamls_that_do_not_fit(tmp_path: Path, change: Callable, said: str) -> None:
    model = tiny()
    model.yaml = deepcopy(TINY)
    change(model.yaml)
    with pytest.raises(InputError) as caught:
        load_model(save(stripped(model), tmp_path / "a.pt"))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_transfer_counts_what_fits() -> None:
    """YOLOv5n has 349 tensors; for other classes its six output tensors start anew, for other anchors the buffer does."""
    state = Network(stock("n")).state_dict()
    assert transfer(state, Network(stock("n"))) == "transferred 349/349 tensors"
    other = Network(stock("n", 3))
    before = {key: value.clone() for key, value in other.state_dict().items()}
    assert transfer(state, other) == "transferred 343/349 tensors"
    heads = [key for key in before if ".24.m." in key]
    assert len(heads) == 6 and all(torch.equal(other.state_dict()[key], before[key]) for key in heads)
    assert torch.equal(other.state_dict()["model.0.conv.weight"], state["model.0.conv.weight"])
    state["model.24.anchors"] = state["model.24.anchors"] + 1
    assert transfer(state, Network(stock("n"))) == "transferred 348/349 tensors"


def test_a_checkpoint_of_ours_that_lacks_entries_is_refused(tmp_path: Path) -> None:
    torch.save({"format": "yolo-prune 1", "cfg": ""}, tmp_path / "x.pt")
    with pytest.raises(InputError, match="without best_fitness, epoch.*incomplete"):
        load_model(tmp_path / "x.pt")
