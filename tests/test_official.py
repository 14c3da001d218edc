"""Official checkpoints: faithful reading of benign files, and refusal, without side effects, of hostile ones.

The files are written here by `torch.save` from throwaway classes that carry the qualified names of the official ones.
"""

from __future__ import annotations

import builtins
import functools
import io
import os
import pathlib
import pickle
import struct
import sys
import types
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from models.official import ALLOWED, OfficialCheckpoint, is_zip_pickle, looks_official, read_official
from utils.errors import InputError

NC = 2
STRIDES = (8.0, 16.0)
ANCHORS = (((10.0, 13.0), (16.0, 30.0)), ((30.0, 61.0), (62.0, 45.0)))
YAML = {"nc": NC, "depth_multiple": 0.33, "anchors": [[10, 13]], "backbone": [[-1, 1, "Conv", [8, 3, 2]]], "ch": 3}


class Conv(nn.Module):
    def __init__(self, c1: int, c2: int, act: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c1, c2, 3, bias=False)
        self.bn = nn.BatchNorm2d(c2, eps=1e-3, momentum=0.03)
        self.act = act

    def forward_fuse(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.conv(x))


class Detect(nn.Module):
    def __init__(self, anchor_grid: bool) -> None:
        super().__init__()
        anchors = torch.tensor(ANCHORS)
        self.nc, self.nl, self.na, self.stride = NC, 2, 2, torch.tensor(STRIDES)
        self.register_buffer("anchors", anchors / self.stride.view(-1, 1, 1))
        if anchor_grid:
            self.register_buffer("anchor_grid", anchors.view(2, 1, 2, 1, 1, 2))
        self.m = nn.ModuleList(nn.Conv2d(8, 2 * (NC + 5), 1) for _ in range(2))
        self.grid = [torch.zeros(1, 1, 1, 1, 2).expand(1, 2, 4, 4, 2), torch.empty(0)]  # cached, overlapping or empty


class Model(nn.Module):
    def __init__(self, anchor_grid: bool = False) -> None:
        super().__init__()
        acts = (nn.SiLU(), nn.LeakyReLU(0.1, inplace=True), nn.Hardswish(), nn.Identity())
        layers = [Conv(3, 8, acts[0]), *(Conv(8, 8, act) for act in acts[1:]), Detect(anchor_grid)]
        self.model = nn.Sequential(*layers)
        self.yaml, self.names, self.stride = dict(YAML), ["cat", "dog"], torch.tensor(STRIDES)
        self.save, self.hyp, self.class_weights = [1], {"lr0": 0.01}, torch.ones(NC)


class DetectionModel(Model):
    pass


class SegmentationModel(Model):
    pass


HOMES = {
    "models.yolo": (Detect, Model, DetectionModel, SegmentationModel),
    "models.common": (Conv,),
}


@contextmanager
def official_names() -> Iterator[None]:
    """Let pickle find the classes above under the names they have in official files; then put everything back."""
    modules = {name: sys.modules.get(name) for name in HOMES}
    classes = {kind: kind.__module__ for kinds in HOMES.values() for kind in kinds}
    try:
        for name, kinds in HOMES.items():
            sys.modules[name] = types.ModuleType(name)
            for kind in kinds:
                kind.__module__ = name
                setattr(sys.modules[name], kind.__name__, kind)
        yield
    finally:
        for kind, module in classes.items():
            kind.__module__ = module
        for name, module in modules.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module


@pytest.fixture
def make_model() -> Callable[..., Model]:
    def make(kind: type[Model] = DetectionModel, **options: bool) -> Model:
        torch.manual_seed(0)
        model = kind(**options)
        for tensor in model.state_dict().values():
            if tensor.is_floating_point() and tensor.ndim < 3:
                tensor.uniform_(0.5, 1.5)
        return model.half()

    return make


def save(top: object, path: Path) -> Path:
    with official_names():
        torch.save(top, path)
    return path


def stripped(model: nn.Module) -> dict[str, object]:
    return {"epoch": -1, "best_fitness": None, "model": model, "ema": None, "updates": None, "optimizer": None}


def assert_same_state(checkpoint: OfficialCheckpoint, model: nn.Module) -> None:
    expected = {key: value for key, value in model.state_dict().items() if not key.endswith("anchor_grid")}
    assert list(checkpoint.state) == list(expected)
    for key, value in expected.items():
        wanted = value.float() if value.is_floating_point() else value
        assert checkpoint.state[key].dtype == wanted.dtype
        assert torch.equal(checkpoint.state[key], wanted), key


# --- benign files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Model, DetectionModel])
def test_reads_stripped(tmp_path: Path, make_model: Callable[..., Model], kind: type[Model]) -> None:
    model = make_model(kind, anchor_grid=kind is Model)
    path = save(stripped(model), tmp_path / "best.pt")
    checkpoint = read_official(path)
    assert_same_state(checkpoint, model)
    assert "model.4.anchor_grid" not in checkpoint.state
    assert checkpoint.yaml == YAML
    assert (checkpoint.nc, checkpoint.names, checkpoint.stride) == (NC, ("cat", "dog"), STRIDES)
    assert checkpoint.anchors_pixels == ANCHORS
    norms = {f"model.{index}.bn" for index in range(4)}
    assert checkpoint.bn_eps == dict.fromkeys(norms, 1e-3)
    assert checkpoint.bn_momentum == dict.fromkeys(norms, 0.03)
    acts = ("SiLU", "LeakyReLU(0.1)", "Hardswish", "Identity")
    assert checkpoint.activations == {f"model.{index}": act for index, act in enumerate(acts)}
    assert (checkpoint.epoch, checkpoint.best_fitness, checkpoint.fused) == (-1, None, False)


def test_reads_unstripped_and_prefers_ema(tmp_path: Path, make_model: Callable[..., Model]) -> None:
    raw, ema = make_model(), make_model()
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
def test_reads_every_kind_of_fitness(tmp_path: Path, make_model: Callable[..., Model], fitness: object) -> None:
    path = save(stripped(make_model()) | {"best_fitness": fitness}, tmp_path / "a.pt")
    assert read_official(path).best_fitness == 0.5


def test_reads_numpy_under_both_module_names(tmp_path: Path, make_model: Callable[..., Model]) -> None:
    path = save(stripped(make_model()) | {"best_fitness": np.array([0.5])}, tmp_path / "a.pt")
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
        (("cat", 7), ("cat", "7")),
        (None, ("class0", "class1")),
    ],
)
def test_names(tmp_path: Path, make_model: Callable[..., Model], names: object, expected: tuple[str, ...]) -> None:
    model = make_model()
    model.names = names
    assert read_official(save(stripped(model), tmp_path / "a.pt")).names == expected
    del model.names
    assert read_official(save(stripped(model), tmp_path / "a.pt")).names == ("class0", "class1")


def test_tensors_that_are_views(tmp_path: Path, make_model: Callable[..., Model]) -> None:
    model = make_model()
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


def test_buffers_that_are_not_persistent_are_left_out(tmp_path: Path, make_model: Callable[..., Model]) -> None:
    model = make_model()
    model.model[0].register_buffer("cache", torch.ones(3), persistent=False)
    assert_same_state(read_official(save(stripped(model), tmp_path / "a.pt")), model)


def test_fused(tmp_path: Path, make_model: Callable[..., Model]) -> None:
    model = make_model()
    for layer in model.model[:4]:
        layer.conv = nn.Conv2d(layer.conv.in_channels, 8, 3, bias=True).half()
        del layer.bn
        layer.forward = layer.forward_fuse  # pickled as a call of getattr
    checkpoint = read_official(save(stripped(model), tmp_path / "a.pt"))
    assert checkpoint.fused
    assert checkpoint.bn_eps == {}
    assert_same_state(checkpoint, model)


def test_other_protocol(tmp_path: Path, make_model: Callable[..., Model]) -> None:
    model = make_model()
    with official_names():
        torch.save(stripped(model), tmp_path / "a.pt", pickle_protocol=4)
    assert_same_state(read_official(tmp_path / "a.pt"), model)
    assert looks_official(tmp_path / "a.pt")


def test_looks_official(tmp_path: Path, make_model: Callable[..., Model]) -> None:
    official = save(stripped(make_model()), tmp_path / "official.pt")
    ours = save({"format": 1, "note": "models.yolo", "state": {"a": torch.ones(2)}}, tmp_path / "ours.pt")
    text = tmp_path / "text.pt"
    text.write_text("models.yolo")
    paths = (official, ours, text, tmp_path / "none.pt")
    assert [looks_official(path) for path in paths] == [True, False, False, False]
    assert [is_zip_pickle(path) for path in paths] == [True, True, False, False]
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
    assert checkpoint.anchors_pixels == (
        ((10, 13), (16, 30), (33, 23)),
        ((30, 61), (62, 45), (59, 119)),
        ((116, 90), (156, 198), (373, 326)),
    )
    assert (checkpoint.nc, len(checkpoint.names), checkpoint.names[0]) == (80, 80, "person")
    assert checkpoint.stride == (8, 16, 32)
    assert (set(checkpoint.bn_eps.values()), set(checkpoint.bn_momentum.values())) == ({1e-3}, {0.03})
    assert set(checkpoint.activations.values()) == {"SiLU"}
    assert (checkpoint.epoch, checkpoint.fused) == (-1, False)
    assert checkpoint.best_fitness == pytest.approx(0.2676, abs=1e-4)


# --- hostile pickles ------------------------------------------------------------------------------------------------


class Call:
    """Pickles as a call of `function` with `arguments`, and then, if given, as a state to be set on the result."""

    def __init__(self, function: Callable, *arguments: object, state: object = None) -> None:
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> tuple:
        return self.reduced


def refusal(path: Path) -> str:
    """Return the one line with which `path` is refused, without its name."""
    with pytest.raises(InputError) as caught:
        read_official(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


def data_pkl(path: Path) -> bytes:
    with zipfile.ZipFile(path) as file:
        return next(file.read(name) for name in file.namelist() if name.endswith("/data.pkl"))


def with_pickle(source: Path, pickled: bytes, target: Path, **entries: bytes) -> Path:
    """Copy the checkpoint `source` with another `data.pkl` and other or further entries."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            short = name.partition("/")[2]
            if short not in entries:
                new.writestr(f"archive/{short}", pickled if short == "data.pkl" else old.read(name))
        for short, content in entries.items():
            new.writestr(f"archive/{short}", content)
    return target


def bare_pickle(pickled: bytes, path: Path) -> Path:
    """Write a zip whose only entry is `data.pkl`."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", pickled)
    return path


def test_shell_command(tmp_path: Path, make_model: Callable[..., Model]) -> None:
    canary = tmp_path / "canary"
    top = stripped(make_model()) | {"opt": Call(os.system, f"touch {canary}")}
    path = save(top, tmp_path / "a.pt")
    assert f"{os.system.__module__}.system" in refusal(path)
    assert not canary.exists()
    assert looks_official(path)
    assert not canary.exists()


@pytest.mark.parametrize(
    ("gadget", "asked"),
    [
        (Call(eval, "open('canary', 'w')"), "__builtin__.eval"),
        (Call(exec, "open('canary', 'w')"), "__builtin__.exec"),
        (Call(open, "canary", "w"), "io.open"),
        (functools.partial(open, "canary", "w"), "functools.partial"),
        (Call(builtins.__import__, "antigravity"), "__builtin__.__import__"),
        (Call(getattr, "text", "upper"), "builtins.getattr"),
        (Call(torch.storage._load_from_bytes, b"x"), "torch.storage._load_from_bytes"),
        (Call(torch.load, "canary"), "torch.serialization.load"),
        (nn.Tanh(), "torch.nn.modules.activation.Tanh"),
        (np.array(["a"], dtype=object), "object dtype"),
        (Call(np.dtype, "O8", False, True), "object dtype"),
        (Call(set, ((1,),)), "set of other things"),
    ],
)
def test_gadgets(tmp_path: Path, make_model: Callable[..., Model], monkeypatch: pytest.MonkeyPatch, gadget: object, asked: str) -> None:
    monkeypatch.chdir(tmp_path)
    message = refusal(save(stripped(make_model()) | {"opt": gadget}, tmp_path / "a.pt"))
    assert asked in message
    assert not (tmp_path / "canary").exists()


def test_setstate_of_a_module_is_only_stored(tmp_path: Path, make_model: Callable[..., Model]) -> None:
    """A module's `__setstate__` is code of its class; here the state must not even be written into the instance."""
    model = make_model()
    state = model.model[0].__dict__ | {"__class__": "x", "__setstate__": "x", "state": "x", "path": "os.system"}
    model.model[0].__dict__.update(state)
    checkpoint = read_official(save(stripped(model), tmp_path / "a.pt"))
    assert_same_state(checkpoint, model)


def pickled_text(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text.encode())) + text.encode()


BUILD_TARGETS = {
    "stub class": b"cmodels.common\nConv\n",
    "stub": b"cmodels.common\nConv\n)\x81",
    "function": b"ctorch._utils\n_rebuild_tensor_v2\n",
    "storage type": b"ctorch\nHalfStorage\n",
    "ndarray": b"cnumpy\nndarray\n",
    "dtype": b"cnumpy\ndtype\n" + pickled_text("f8") + b"\x85R",
    "list": b"]",
}


@pytest.mark.parametrize("target", BUILD_TARGETS.values(), ids=BUILD_TARGETS)
@pytest.mark.parametrize("slots", [True, False])
def test_build_reaches_only_stand_ins(tmp_path: Path, target: bytes, slots: bool) -> None:
    """A state (None, {name: value}) would be set with setattr on what has no `__setstate__` of its own."""
    state = b"}" + b"".join(pickled_text(name) + b"Ns" for name in ("run", "dtype", "path", "code"))
    state = b"N" + state + b"\x86" if slots else state
    before = {name: getattr(value, "run", getattr(value, "dtype", None)) for name, value in ALLOWED.items()}
    refusal(bare_pickle(b"\x80\x02" + target + state + b"b.", tmp_path / "a.pt"))
    after = {name: getattr(value, "run", getattr(value, "dtype", None)) for name, value in ALLOWED.items()}
    assert before == after


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (b"(ios\nsystem\n", "INST"),
        (b"\x82\x01", "EXT1"),
        (b"\x96\xff\xff\xff\xff\x00\x00\x00\x00", "damaged"),  # a bytearray of 4 GB is declared
        (b"}r\xff\xff\xff\x7f", "numbers more objects"),  # a memo of 2^31 entries
        (b"cposix\nsys\ttem\x1b\n)R", r"posix.sys\ttem\x1b"),
        (b"cmodels.common\n__class__.x\n)R", "models.common.__class__.x"),
        (b"cmodels.common\nConv\nX\x01\x00\x00\x00x\x85R", "damaged"),
        (b"X\x01\x00\x00\x00xQ", "malformed storage"),
        (b"cmodels.common\nConv\n)\x81]b", "models.common.Conv has a state that is no dict"),
        (b"ctorch._utils\n_rebuild_parameter\n]\x85R", "parameter without a tensor"),
        (b"ctorch\nSize\n]\x85R", "malformed torch.Size"),
        (b"cnumpy.core.multiarray\nscalar\n]]\x86R", "malformed numpy scalar"),
        (b"cnumpy.core.multiarray\n_reconstruct\n)R(K\x01)]\x89]tb", "malformed numpy array"),
        (b"cnumpy\ndtype\nX\x02\x00\x00\x00f8\x85R(K\x03X\x01\x00\x00\x00>tb", "not little-endian"),
        (b"c_codecs\nencode\nX\x01\x00\x00\x00xX\x05\x00\x00\x00rot13\x86R", "_codecs.encode"),
        (b"cpathlib\nPosixPath\n]\x85R", "malformed path"),
        (b"h\x07", "damaged"),
        (b"", "damaged"),
    ],
)
def test_malformed_pickles(tmp_path: Path, code: bytes, said: str) -> None:
    assert said in refusal(bare_pickle(b"\x80\x02" + code + b".", tmp_path / "a.pt"))


def test_random_damage_is_one_line(tmp_path: Path, make_model: Callable[..., Model]) -> None:
    path = save(stripped(make_model()) | {"best_fitness": np.array([0.5])}, tmp_path / "a.pt")
    pickled, random = data_pkl(path), np.random.default_rng(0)
    outcomes = set()
    for _ in range(50):
        damaged = bytearray(pickled)
        for position in random.integers(0, len(damaged), 3):
            damaged[position] = random.integers(0, 256)
        try:
            read_official(with_pickle(path, bytes(damaged), tmp_path / "b.pt"))
            outcomes.add("read")
        except InputError as error:
            assert "\n" not in str(error)
            outcomes.add("refused")
    assert "refused" in outcomes


# --- hostile tensors ------------------------------------------------------------------------------------------------


class FakeTensor:
    """Pickles as a tensor with whatever view of `storage` is wanted."""

    def __init__(self, storage: torch.storage.TypedStorage, offset: object, size: object, stride: object) -> None:
        self.arguments = (storage, offset, size, stride, False, None)

    def __reduce__(self) -> tuple:
        return torch._utils._rebuild_tensor_v2, self.arguments


@pytest.mark.parametrize(
    ("offset", "size", "stride", "said"),
    [
        (0, (5,), (1,), "beyond storage"),
        (1, (4,), (1,), "beyond storage"),
        (0, (2, 2), (1, 3), "beyond storage"),
        (2**40, (1,), (1,), "beyond storage"),
        (-1, (2,), (1,), "malformed tensor"),
        (4, (2,), (-1,), "malformed tensor"),
        (0, (2, 2), (1,), "malformed tensor"),
        (0, (2.0,), (1,), "malformed tensor"),
        (0, (2**40, 2**40), (0, 0), "its tensors claim"),
        (0, (5,), (0,), "larger than its storage"),
        (0, (0,), (1,), "is empty"),
    ],
)
def test_views_out_of_bounds(tmp_path: Path, make_model: Callable[..., Model], offset: int, size: tuple, stride: tuple, said: str) -> None:
    model = make_model()
    storage = torch.storage.TypedStorage(wrap_storage=torch.ones(2).untyped_storage(), dtype=torch.half, _internal=True)
    model.model[0].bn._buffers["running_mean"] = FakeTensor(storage, offset, size, stride)
    assert said in refusal(save(stripped(model), tmp_path / "a.pt"))


def test_storages_that_contradict_their_entries(tmp_path: Path, make_model: Callable[..., Model]) -> None:
    path = save(stripped(make_model()), tmp_path / "a.pt")
    pickled, other = data_pkl(path), tmp_path / "b.pt"
    assert "its entry has 3" in refusal(with_pickle(path, pickled, other, **{"data/0": b"abc"}))
    assert "big-endian" in refusal(with_pickle(path, pickled, other, byteorder=b"big"))
    wider = pickled.replace(b"HalfStorage", b"LongStorage", 1)
    assert "declares" in refusal(with_pickle(path, wider, other))


@pytest.mark.parametrize(
    ("key", "numel", "said"),
    [
        ("../data.pkl", b"K\x04", "malformed storage"),
        ("7", b"K\x04", "no entry data/7"),
        ("\u0663", b"K\x04", "malformed storage"),  # a digit, but not an ASCII one
        ("0", b"J\xff\xff\xff\xff", "malformed storage"),
        ("0", b"G" + struct.pack(">d", 4.0), "malformed storage"),
        ("0", b"J\xff\xff\xff\x7f", "its entry has 8"),
    ],
)
def test_storages_that_do_not_exist(tmp_path: Path, key: str, numel: bytes, said: str) -> None:
    pid = b"(" + pickled_text("storage") + b"ctorch\nHalfStorage\n" + pickled_text(key) + pickled_text("cpu") + numel
    path = bare_pickle(b"\x80\x02" + pid + b"tQ.", tmp_path / "a.pt")
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("archive/data/0", bytes(8))
    assert said in refusal(path)


def test_many_names_for_one_storage(tmp_path: Path, make_model: Callable[..., Model]) -> None:
    """A small file must not become a large model."""
    model = make_model()
    shared = nn.Parameter(torch.zeros(1 << 16).half())
    for index in range(200):
        model.model[0].register_parameter(f"copy{index}", shared)
    path = save(stripped(model), tmp_path / "a.pt")
    assert "its tensors claim" in refusal(path)


def test_nested_sharing(tmp_path: Path, make_model: Callable[..., Model]) -> None:
    """Doubling at each level is 2^n modules or values, although the pickle is short."""
    model, inner, values = make_model(), nn.Identity(), [0]
    for _ in range(25):
        inner, values = nn.Sequential(inner, inner), [values, values]
    model.yaml["anchors"] = values
    assert "'yaml' is too large" in refusal(save(stripped(model), tmp_path / "a.pt"))
    model.model[0].add_module("doubled", inner)
    assert "more than 20000 modules" in refusal(save(stripped(model), tmp_path / "b.pt"))
    model.model[0].add_module("doubled", model.model)
    assert "deep" in refusal(save(stripped(model), tmp_path / "c.pt"))


# --- other files ----------------------------------------------------------------------------------------------------


def test_truncated(tmp_path: Path, make_model: Callable[..., Model]) -> None:
    path = save(stripped(make_model()), tmp_path / "a.pt")
    content = path.read_bytes()
    for length in (10, len(content) // 2, len(content) - 5):
        path.write_bytes(content[:length])
        assert "truncated or damaged" in refusal(path)
        assert not is_zip_pickle(path)


def test_bytes_that_changed(tmp_path: Path, make_model: Callable[..., Model]) -> None:
    model = make_model()
    path = save(stripped(model), tmp_path / "a.pt")
    weight = model.model[0].conv.weight.detach().numpy().tobytes()
    path.write_bytes(path.read_bytes().replace(weight, bytes(len(weight))))
    assert "is damaged" in refusal(path)


def test_sizes_beyond_the_file(tmp_path: Path, make_model: Callable[..., Model]) -> None:
    path = save(stripped(make_model()), tmp_path / "a.pt")
    with zipfile.ZipFile(path) as file:
        size = next(info.file_size for info in file.infolist() if info.filename.endswith("data.pkl"))
    content = bytearray(path.read_bytes())
    directory = content.index(b"PK\x01\x02")
    assert struct.unpack_from("<II", content, directory + 20) == (size, size)
    struct.pack_into("<II", content, directory + 20, 2**32 - 2, 2**32 - 2)
    path.write_bytes(content)
    assert "more than the file holds" in refusal(path)
    assert not looks_official(path)


def test_compressed_entries(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", bytes(1 << 20))
    assert "compressed" in refusal(path)
    assert "no YOLOv5 checkpoint needs so many" in refusal(bare_pickle(bytes(9 << 20), path))


def test_files_that_are_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    assert "cannot be read" in refusal(path)
    assert "cannot be read" in refusal(tmp_path)
    path.write_bytes(b"")
    assert "empty" in refusal(path)
    path.write_text("[net]\nwidth=640\n")
    assert "not a zip" in refusal(path)
    torch.save({"model": 1}, path, _use_new_zipfile_serialization=False)
    assert "before torch 1.6" in refusal(path)
    path.write_bytes(pickle.dumps({"model": 1}))
    assert "before torch 1.6" in refusal(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("readme.txt", "no pickle here")
    assert "one data.pkl" in refusal(path)
    with zipfile.ZipFile(path, "w"):
        pass
    assert "one data.pkl" in refusal(path)


def test_torchscript(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    for name, content in {"data.pkl": b"\x80\x02N.", "constants.pkl": b"\x80\x02).", "code/__torch__.py": b""}.items():
        with zipfile.ZipFile(buffer, "a") as file:
            file.writestr(f"model/{name}", content)
    path = tmp_path / "a.torchscript"
    path.write_bytes(buffer.getvalue())
    assert "TorchScript" in refusal(path)
    assert not is_zip_pickle(path)


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
def test_other_contents(tmp_path: Path, make_model: Callable[..., Model], make: Callable, said: str) -> None:
    assert said in refusal(save(make(make_model()), tmp_path / "a.pt"))


def test_segmentation_model(tmp_path: Path, make_model: Callable[..., Model]) -> None:
    path = save(stripped(make_model(SegmentationModel)), tmp_path / "a.pt")
    assert "models.yolo.SegmentationModel" in refusal(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda model: setattr(model.model[4], "nc", 3), "5 + 3 classes"),
        (lambda model: setattr(model.model[4], "nc", None), "number of classes"),
        (lambda model: setattr(model, "names", ["cat"]), "1 class names for 2 classes"),
        (lambda model: setattr(model, "names", {"cat": 0, "dog": 1}), "keys are no numbers"),
        (lambda model: setattr(model, "stride", torch.tensor([8.0])), "buffer 'anchors'"),
        (lambda model: setattr(model, "stride", torch.tensor([8.0, 0.0])), "not positive"),
        (lambda model: delattr(model.model[4], "anchors"), "buffer 'anchors'"),
        (lambda model: delattr(model, "yaml"), "no architecture dict"),
        (lambda model: model.yaml.update(nc=torch.ones(1)), "more than texts"),
        (lambda model: delattr(model.model[0].bn, "eps"), "model.0.bn has no number 'eps'"),
        (lambda model: model.model.__delitem__(4), "0 Detect layers"),
        (lambda model: model.model[4].anchors.fill_(float("nan")), "anchors are not finite"),
        (lambda model: model.yaml.update({None: 1}), "malformed keys"),
        (lambda model: setattr(model, "names", "cd"), "neither a list"),
        (lambda model: setattr(model.model[0], "_buffers", []), "malformed _buffers"),
        (lambda model: model.model[0]._buffers.update(cache="x"), "malformed _buffers"),
        (lambda model: model.model[0]._buffers.update({"x" * 200: torch.ones(1)}), "malformed _buffers"),
    ],
)
def test_contradictions(tmp_path: Path, make_model: Callable[..., Model], change: Callable, said: str) -> None:
    model = make_model()
    change(model)
    assert said in refusal(save(stripped(model), tmp_path / "a.pt"))
