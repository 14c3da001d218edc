"""Hostile, damaged and foreign files: refused in one line, without side effects and without great cost."""

from __future__ import annotations

import builtins
import functools
import io
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from models.checkpoint import load_model
from models.inert import ALLOWED
from models.official import is_plain_zip, looks_official, read_official
from tests.official_files import assert_same_state, bare_pickle, data_pkl, refusal, save, stripped, tiny, with_pickle
from utils.errors import InputError

# --- hostile pickles ------------------------------------------------------------------------------------------------


class Call:
    """Pickles as a call of `function` with `arguments`, and then, if given, as a state to be set on the result."""

    def __init__(self, function: Callable, *arguments: object, state: object = None) -> None:
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> tuple:
        return self.reduced


def test_shell_command(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    top = stripped(tiny()) | {"opt": Call(os.system, f"touch {canary}")}
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
def test_gadgets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gadget: object, asked: str) -> None:
    monkeypatch.chdir(tmp_path)
    message = refusal(save(stripped(tiny()) | {"opt": gadget}, tmp_path / "a.pt"))
    assert asked in message
    assert not (tmp_path / "canary").exists()


def test_setstate_of_a_module_is_only_stored(tmp_path: Path) -> None:
    """A module's `__setstate__` is code of its class; here the state must not even be written into the instance."""
    model = tiny()
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
        (b"0", "takes more values than it has"),
        (b"](0a", "takes more values than it has"),  # the mark is popped, and the list appended to nothing
        (b"", "damaged"),
    ],
)
def test_malformed_pickles(tmp_path: Path, code: bytes, said: str) -> None:
    assert said in refusal(bare_pickle(b"\x80\x02" + code + b".", tmp_path / "a.pt"))


def nested_tuples(depth: int) -> bytes:
    """A memoised tuple of twice the one before, 2^depth parts in few bytes; it ends on the stack."""
    code = b"K\x01\x85q\x00"
    for index in range(depth):
        code += b"0h" + bytes([index]) + b"h" + bytes([index]) + b"\x86q" + bytes([index + 1])
    return code


@pytest.mark.parametrize(
    "code",
    [
        nested_tuples(60) + b"q\xff0}h\xffNs",
        nested_tuples(60) + b"q\xff0}(h\xffNu",
        nested_tuples(60) + b"q\xff0\x8f(h\xff\x90",
        b"}(" + b"".join(b"\x8a\x09" + ((2**61 - 1) * (k + 8)).to_bytes(9, "little") + b"N" for k in range(2000)) + b"u",
    ],
    ids=["setitem", "setitems", "set", "colliding integers"],
)
def test_keys_that_take_for_ever_to_hash(tmp_path: Path, code: bytes) -> None:
    path = bare_pickle(b"\x80\x02" + code + b".", tmp_path / "a.pt")
    assert "hashing them could take for ever" in refusal(path)
    assert not is_plain_zip(path), "torch does not get it either"


def test_the_replay_pops_marks_as_pickle_does(tmp_path: Path) -> None:
    """Else a nested tuple could pass for another value. `a` is the key in pickle's eyes: the mark, not the tuple, is popped."""
    code = b"}" + nested_tuples(3) + b"(00" + pickled_text("a") + b"Ns"
    path = bare_pickle(b"\x80\x02" + code + b".", tmp_path / "a.pt")
    assert pickle.loads(b"\x80\x02" + code + b".") == {"a": None}
    assert "no dict" not in refusal(path) and "hash" not in refusal(path)
    assert is_plain_zip(path)


def test_short_pickles_that_would_grow(tmp_path: Path) -> None:
    """Texts that are encoded, joined or collected again and again stay as they are: what is shared is never copied."""
    text = pickled_text("x" * (1 << 20)) + b"q\x000"
    many = text + b"](" + (b"c_codecs\nencode\nh\x00" + pickled_text("latin1") + b"\x86R") * 2000 + b"e"
    joined = text + b"](" + (b"cpathlib\nPosixPath\nh\x00h\x00\x86R") * 2000 + b"e"
    for code in (many, joined):
        assert "holds no dict" in refusal(bare_pickle(b"\x80\x02" + code + b".", tmp_path / "a.pt"))
    items = b"](" + b"".join(b"K" + bytes([k]) for k in range(5)) + b"eq\x000"
    assert "a few texts" in refusal(bare_pickle(b"\x80\x02" + items + b"c__builtin__\nset\nh\x00\x85R.", tmp_path / "a.pt"))
    classes = b"".join(b"cmodels.common\nA%d\n" % k for k in range(300))
    assert "more than 200 classes" in refusal(bare_pickle(b"\x80\x02](" + classes + b"e.", tmp_path / "a.pt"))


def test_random_damage_is_one_line(tmp_path: Path) -> None:
    path = save(stripped(tiny()) | {"best_fitness": np.array([0.5])}, tmp_path / "a.pt")
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
def test_views_out_of_bounds(tmp_path: Path, offset: int, size: tuple, stride: tuple, said: str) -> None:
    model = tiny()
    storage = torch.storage.TypedStorage(wrap_storage=torch.ones(2).untyped_storage(), dtype=torch.half, _internal=True)
    model.model[0].bn._buffers["running_mean"] = FakeTensor(storage, offset, size, stride)
    assert said in refusal(save(stripped(model), tmp_path / "a.pt"))


def test_storages_that_contradict_their_entries(tmp_path: Path) -> None:
    path = save(stripped(tiny()), tmp_path / "a.pt")
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


def test_many_names_for_one_storage(tmp_path: Path) -> None:
    """A small file must not become a large model."""
    model = tiny()
    shared = nn.Parameter(torch.zeros(1 << 16).half())
    for index in range(200):
        model.model[0].register_parameter(f"copy{index}", shared)
    path = save(stripped(model), tmp_path / "a.pt")
    assert "its tensors claim" in refusal(path)


def test_nested_sharing(tmp_path: Path) -> None:
    """Doubling at each level is 2^n modules or values, although the pickle is short."""
    model, inner, values = tiny(), nn.Identity(), [0]
    for _ in range(25):
        inner, values = nn.Sequential(inner, inner), [values, values]
    model.yaml["anchors"] = values
    assert "'yaml' is too large" in refusal(save(stripped(model), tmp_path / "a.pt"))
    model.model[0].add_module("doubled", inner)
    assert "more than 10000 modules" in refusal(save(stripped(model), tmp_path / "b.pt"))
    model.model[0].add_module("doubled", model.model)
    assert "deep" in refusal(save(stripped(model), tmp_path / "c.pt"))


# --- other files ----------------------------------------------------------------------------------------------------


def test_truncated(tmp_path: Path) -> None:
    path = save(stripped(tiny()), tmp_path / "a.pt")
    content = path.read_bytes()
    for tenth in range(10):
        path.write_bytes(content[: len(content) * tenth // 10])
        assert ("the file is empty" if tenth == 0 else "truncated or damaged") in refusal(path)
        assert not is_plain_zip(path)
        with pytest.raises(InputError, match="a.pt"):
            load_model(path)


def test_damage_anywhere_is_one_line(tmp_path: Path) -> None:
    """Three bytes of the file, the zip's own tables included, are other ones."""
    content, random, path = save(stripped(tiny()), tmp_path / "a.pt").read_bytes(), np.random.default_rng(1), tmp_path / "b.pt"
    outcomes = set()
    for k in range(40):
        damaged = bytearray(content)
        for position in random.integers(len(content) - 3000 if k % 2 else 0, len(content), 3):
            damaged[position] = random.integers(256)
        path.write_bytes(damaged)
        try:
            load_model(path)
            outcomes.add("read")
        except InputError as error:
            assert "\n" not in str(error)
            outcomes.add("refused")
    assert "refused" in outcomes


def test_bytes_that_changed(tmp_path: Path) -> None:
    model = tiny()
    path = save(stripped(model), tmp_path / "a.pt")
    weight = model.model[0].conv.weight.detach().numpy().tobytes()
    path.write_bytes(path.read_bytes().replace(weight, bytes(len(weight))))
    assert "is damaged" in refusal(path)


def test_sizes_beyond_the_file(tmp_path: Path) -> None:
    path = save(stripped(tiny()), tmp_path / "a.pt")
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


def test_entries_that_lie(tmp_path: Path) -> None:
    """Two of one name, several over the same bytes, and names that leave the folder."""
    path = save(stripped(tiny()), tmp_path / "a.pt")
    pickled, other = data_pkl(path), tmp_path / "b.pt"
    with_pickle(path, pickled, other)
    with zipfile.ZipFile(other, "a") as file, pytest.warns(UserWarning, match="Duplicate"):
        file.writestr("archive/data.pkl", b"cos\nsystem\n.")
    assert "two entries of one name" in refusal(other)
    assert not is_plain_zip(other)
    with_pickle(path, pickled, other, **{"data/900": bytes(1 << 16)})
    with zipfile.ZipFile(other, "a") as file:
        for index in range(901, 910):
            info = zipfile.ZipInfo(f"archive/data/{index}")
            source = file.getinfo("archive/data/900")
            info.header_offset, info.file_size, info.compress_size, info.CRC = source.header_offset, 1 << 16, 1 << 16, source.CRC
            file.filelist.append(info)
            file.NameToInfo[info.filename] = info
        file._didModify = True
    assert "more than the file holds" in refusal(other)
    assert_same_state(read_official(with_pickle(path, pickled, other, **{"../../evil": b"x"})), tiny())
    assert not list(tmp_path.parent.glob("**/evil"))


def test_what_torch_would_refuse_is_named(tmp_path: Path) -> None:
    """A pickle without a YOLOv5 class looks like ours; what it asks for is named all the same."""
    canary = tmp_path / "canary"
    path = save({"format": "yolo-prune 1", "x": Call(os.system, f"touch {canary}")}, tmp_path / "a.pt")
    with pytest.raises(InputError, match=rf"a\.pt: it asks for {os.system.__module__}\.system, which no YOLOv5 checkpoint needs"):
        load_model(path)
    assert not canary.exists()
    with pytest.raises(InputError, match="plain state_dict"):
        load_model(save(tiny().state_dict(), tmp_path / "b.pt"))
    with pytest.raises(InputError, match="'model' is missing"):
        load_model(save({"weights": torch.ones(2), "epoch": 1}, tmp_path / "c.pt"))


def test_files_that_are_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    assert "cannot be read" in refusal(path)
    assert "cannot be read" in refusal(tmp_path)
    path.write_bytes(b"")
    assert "empty" in refusal(path)
    path.write_text("\n<!DOCTYPE html><title>404</title>")
    assert "a web page, not a checkpoint" in refusal(path)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    assert "Git LFS pointer" in refusal(path)
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
    assert not is_plain_zip(path)
