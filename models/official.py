"""Reads official YOLOv5 `.pt` files (v5.0 to v7.0) without running anything that is in them.

Such a file is a zip that `torch.save` wrote: a pickle of whole modules (`data.pkl`) beside raw tensor bytes
(`data/<n>`). Unpickling may call whatever the pickle names, so here it reaches only the inert stand-ins below: modules
become `_Stub`s that keep their attributes as a dict, tensors become `_TensorRef`s that are read later, and any other
name is refused.

Owns: the container, the allow-list, the facts of the pickled model. Not: building a model from them, nor our own
checkpoints. The file is long because the argument for its safety should be readable in one place.

How an opcode is kept harmless: GLOBAL ends in `find_class` below; REDUCE can call `_Function`s and argument-free
`_Stub` classes, nothing else on the stack is callable; BUILD calls the `__setstate__` that every stand-in defines, and
fails on plain values; opcodes that allocate what they merely declare are refused before the unpickler starts.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import re
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, BadZipFile, ZipFile, ZipInfo

import numpy as np
import torch

from utils.errors import InputError

# An official data.pkl is 0.1 to 1 MB. The bound matters because one pickled byte can become some 200 bytes of objects.
MAX_PICKLE_BYTES = 8 << 20
MAX_MODULES = 20_000
MAX_DEPTH = 32
MAX_PLAIN_VALUES = 100_000
MAX_NAME = 128

OPCODES = frozenset(
    "PROTO FRAME STOP MARK POP POP_MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE "
    "SHORT_BINUNICODE BINBYTES SHORT_BINBYTES EMPTY_LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 "
    "EMPTY_DICT SETITEM SETITEMS EMPTY_SET ADDITEMS BINGET LONG_BINGET BINPUT LONG_BINPUT MEMOIZE GLOBAL STACK_GLOBAL "
    "BINPERSID REDUCE NEWOBJ BUILD".split()
)
YOLO_MODULES = frozenset({"models.yolo", "models.common", "models.experimental"})
TORCH_MODULES = frozenset(
    f"torch.nn.modules.{name}"
    for name in (
        "activation.SiLU activation.LeakyReLU activation.Hardswish activation.ReLU activation.MultiheadAttention "
        "batchnorm.BatchNorm2d container.Sequential container.ModuleList conv.Conv2d conv.ConvTranspose2d "
        "linear.Identity linear.Linear linear.NonDynamicallyQuantizableLinear linear._LinearWithBias "
        "padding.ZeroPad2d pooling.MaxPool2d upsampling.Upsample"
    ).split()
)
DETECTION_MODELS = frozenset({"models.yolo.Model", "models.yolo.DetectionModel"})


@dataclass(frozen=True)
class OfficialCheckpoint:
    """What an official checkpoint says, as tensors and plain values.

    `state` has the keys of the pickled model's `state_dict` (`model.0.conv.weight`) without `anchor_grid`, floating
    tensors as float32, integers as they are. Module paths, the keys of `bn_eps`, `bn_momentum` and `activations`, are
    spelled likewise (`model.0.bn`, `model.0`). `stride` and `anchors_pixels` run over the levels, anchors are (w, h).
    """

    yaml: dict[str, Any]
    names: tuple[str, ...]
    nc: int
    stride: tuple[float, ...]
    anchors_pixels: tuple[tuple[tuple[float, float], ...], ...]
    state: dict[str, torch.Tensor]
    bn_eps: dict[str, float]  # attributes of the pickled BatchNorm2d, which no state_dict holds
    bn_momentum: dict[str, float]
    activations: dict[str, str]  # module with an `act` -> "SiLU", "LeakyReLU(0.1)", "Hardswish", "Identity"
    epoch: int  # -1 once training has finished and the file was stripped
    best_fitness: float | None
    fused: bool  # batch norms are folded into biased convolutions


def read_official(path: Path) -> OfficialCheckpoint:
    """Read the official YOLOv5 checkpoint at `path`, its `ema` if it has one, else its `model`.

    Raises `InputError` if the file is no such checkpoint, is damaged, or asks for anything outside the allow-list.
    """
    try:
        with _open_archive(path) as archive:
            return _checkpoint(_unpickle(archive), archive)
    except _Refused as reason:
        raise InputError(f"{path}: {reason}") from reason


def is_zip_pickle(path: Path) -> bool:
    """Tell whether `path` is a zip written by `torch.save`, official or ours (TorchScript archives are not)."""
    try:
        with _open_archive(path):
            return True
    except _Refused:
        return False


def looks_official(path: Path) -> bool:
    """Tell whether the pickle at `path` names a class of `models.yolo`, by reading its opcodes without running them.

    Our own checkpoints, dicts of tensors and plain values, name none. Never raises: False for whatever is unreadable.
    """
    try:
        with _open_archive(path) as archive:
            pickled = archive.read_pickle()
        return b"models.yolo" in pickled and "models.yolo" in _named_modules(pickled)
    except (_Refused, ValueError):
        return False


def _named_modules(pickled: bytes) -> Iterator[str]:
    """Yield the module of every GLOBAL and, where it is spelled out just before, of every STACK_GLOBAL."""
    texts = ("", "")
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name == "GLOBAL":
            yield argument.split(" ")[0]
        elif opcode.name == "STACK_GLOBAL":
            yield texts[0]
        elif isinstance(argument, str):
            texts = (texts[1], argument)


# --- stand-ins: all that a pickle can reach -------------------------------------------------------------------------


class _Refused(Exception):
    """Why the file is refused; `read_official` puts the file's name in front."""


class _Sealed:
    """Base of the stand-ins. Without `__setstate__`, BUILD would write into the instance, frozen or not."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        raise _Refused("its pickle is damaged: it sets the state of something that has none")


class _Stub(_Sealed):
    """A pickled module: `path` is the class it names, `state` its attributes, which are never interpreted as code."""

    __slots__ = ("state",)
    path = ""

    def __new__(cls) -> _Stub:
        stub = super().__new__(cls)
        stub.state = {}
        return stub

    def __setstate__(self, state: object) -> None:
        _require(type(state) is dict, f"its pickle is damaged: {self.path} has a state that is no dict")
        self.state = state


class _Function(_Sealed):
    """One of our functions under a name that the pickle uses; an instance, since a function's attributes can be set."""

    __slots__ = ("run",)

    def __init__(self, run: Callable[..., object]) -> None:
        self.run = run

    def __call__(self, *args: object) -> object:
        return self.run(*args)


class _Dict(dict):
    """An OrderedDict; BUILD would set the attribute `_metadata` of a state_dict, of no use here."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        pass


class _Method(_Sealed):
    """A bound method of a stub, which nobody can call; a fused Conv keeps its other `forward` that way."""

    __slots__ = ()


@dataclass(frozen=True)
class _StorageType(_Sealed):
    dtype: torch.dtype


@dataclass(frozen=True)
class _Storage(_Sealed):
    """The entry `data/<key>`, known to hold `numel` elements of `dtype`."""

    key: str
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True)
class _TensorRef(_Sealed):
    """A view of a storage, in elements, known to lie within it (with stride 0 it may hold more than the storage)."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.size) * self.storage.dtype.itemsize


class _NumpyDtype(_Sealed):
    """A plain numeric dtype such as `f8`; an object dtype, which holds further pickles, cannot be expressed."""

    __slots__ = ("code",)

    def __init__(self, code: str) -> None:
        self.code = code

    def __setstate__(self, state: object) -> None:
        little = type(state) is tuple and len(state) >= 2 and state[1] in ("<", "|", "=")
        _require(little, f"it holds a numpy {self.code} that is not little-endian; save it on a little-endian machine")


class _NumpyArray(_Sealed):
    """The raw bytes of a numpy array or scalar."""

    __slots__ = ("code", "raw")

    def __init__(self, code: str = "f8", raw: bytes = b"") -> None:
        self.code, self.raw = code, raw

    def __setstate__(self, state: object) -> None:
        well_formed = type(state) is tuple and len(state) == 5 and type(state[2]) is _NumpyDtype
        _require(well_formed and type(state[4]) is bytes, "its pickle is damaged: it holds a malformed numpy array")
        self.code, self.raw = state[2].code, state[4]


def _require(condition: bool, reason: str) -> None:
    if not condition:
        raise _Refused(reason)


def _is_number(value: object) -> bool:
    """Tell whether `value` is a float or a 64-bit int; Python's own ints need not fit a float."""
    return type(value) is float or (type(value) is int and abs(value) < 1 << 63)


def _is_sizes(value: object) -> bool:
    return type(value) is tuple and len(value) <= 8 and all(type(item) is int and 0 <= item < 1 << 48 for item in value)


def _rebuild_tensor(storage: object, offset: object, size: object, stride: object, *_: object) -> _TensorRef:
    """Stand in for `torch._utils._rebuild_tensor_v2`; what follows (gradient flag, hooks, metadata) is dropped."""
    typed = type(storage) is _Storage and type(offset) is int and _is_sizes(size) and _is_sizes(stride)
    _require(typed and offset >= 0 and len(size) == len(stride), "its pickle is damaged: it holds a malformed tensor")
    last = offset + sum((length - 1) * step for length, step in zip(size, stride))
    inside = math.prod(size) == 0 or last < storage.numel
    _require(inside, f"its tensor of size {list(size)} reaches beyond storage {storage.key}, {storage.numel} elements")
    return _TensorRef(storage, offset, size, stride)


def _rebuild_parameter(data: object, *_: object) -> _TensorRef:
    _require(type(data) is _TensorRef, "its pickle is damaged: it holds a parameter without a tensor")
    return data


def _numpy_dtype(code: object, *_: object) -> _NumpyDtype:
    known = type(code) is str and re.fullmatch("f[248]|[iu][1248]|b1", code) is not None
    _require(known, "it holds a numpy array of another dtype than a plain number (an object dtype could run code)")
    return _NumpyDtype(code)


def _numpy_scalar(dtype: object, raw: object) -> _NumpyArray:
    typed = type(dtype) is _NumpyDtype and type(raw) is bytes
    _require(typed, "its pickle is damaged: it holds a malformed numpy scalar")
    return _NumpyArray(dtype.code, raw)


def _encode(text: object, encoding: object) -> bytes:
    """Protocol 2 has no bytes: they are a text that is to be encoded as latin-1."""
    known = type(text) is str and encoding in ("latin1", "latin-1")
    _require(known, "its pickle is damaged: it asks for _codecs.encode with another encoding than latin1")
    return text.encode("latin-1")


def _set(items: object = ()) -> set:
    # Restricted to plain keys: hashing nested tuples can take exponential time.
    plain = type(items) is list and all(type(item) in (str, int) for item in items)
    _require(plain or items == (), "its pickle is damaged: it holds a set of other things than texts and numbers")
    return set(items)


def _path(*parts: object) -> str:
    _require(all(type(part) is str for part in parts), "its pickle is damaged: it holds a malformed path")
    return "/".join(parts)


def _size(sizes: object = ()) -> tuple[int, ...]:
    _require(_is_sizes(sizes), "its pickle is damaged: it holds a malformed torch.Size")
    return sizes


def _bound_method(owner: object, name: object) -> _Method:
    """Stand in for `getattr`: it looks nothing up, and serves only the pickled form of a module's bound method."""
    method = isinstance(owner, _Stub) and type(name) is str
    _require(method, "it asks for builtins.getattr, which no YOLOv5 checkpoint needs for this; nothing was run")
    return _Method()


def _allowed_names() -> dict[str, object]:
    """Return what each allowed name outside the module classes stands for."""
    storages = {
        "Half": torch.float16, "BFloat16": torch.bfloat16, "Float": torch.float32, "Double": torch.float64,
        "Char": torch.int8, "Byte": torch.uint8, "Short": torch.int16, "Int": torch.int32, "Long": torch.int64,
        "Bool": torch.bool,
    }  # fmt: skip
    allowed: dict[str, object] = {f"torch.{name}Storage": _StorageType(dtype) for name, dtype in storages.items()}
    allowed["torch._utils._rebuild_tensor_v2"] = _Function(_rebuild_tensor)
    allowed["torch._utils._rebuild_parameter"] = _Function(_rebuild_parameter)
    allowed["torch.Size"] = _Function(_size)
    allowed["collections.OrderedDict"] = _Function(lambda: _Dict())
    allowed["_codecs.encode"] = _Function(_encode)
    allowed["numpy.ndarray"] = _Sealed()
    allowed["numpy.dtype"] = _Function(_numpy_dtype)
    for core in ("numpy.core", "numpy._core"):
        # The arguments of `_reconstruct` are those of an empty array; the state that follows holds everything.
        allowed[f"{core}.multiarray._reconstruct"] = _Function(lambda *_: _NumpyArray())
        allowed[f"{core}.multiarray.scalar"] = _Function(_numpy_scalar)
    for builtins in ("builtins", "__builtin__"):
        allowed[f"{builtins}.set"] = _Function(_set)
        allowed[f"{builtins}.getattr"] = _Function(_bound_method)
    for module in ("pathlib", "pathlib._local"):
        for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"):
            allowed[f"{module}.{name}"] = _Function(_path)
    return allowed


ALLOWED = _allowed_names()


# --- the container --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Archive:
    """The entries of an open checkpoint, named without the leading folder; `size` is that of the file in bytes."""

    file: ZipFile
    size: int
    entries: dict[str, ZipInfo]
    storages: dict[_Storage, torch.Tensor] = field(default_factory=dict)  # read once, however many tensors share it

    def entry(self, name: str) -> ZipInfo:
        """Return the entry `name`, known to lie in the file as plain bytes, so that reading it cannot inflate."""
        info = self.entries.get(name)
        if info is None:
            raise _Refused(f"it has no entry {name}; the file is incomplete")
        plain = info.compress_type == ZIP_STORED and not info.flag_bits & 1 and info.compress_size == info.file_size
        _require(plain, f"its entry {name} is compressed, which torch.save never does")
        inside = 0 <= info.header_offset <= self.size - info.file_size
        _require(inside, f"its entry {name} declares {info.file_size} bytes, more than the file holds")
        return info

    def read(self, name: str) -> bytes:
        info = self.entry(name)
        try:
            return self.file.read(info)
        except (BadZipFile, OSError, ValueError, RuntimeError, EOFError, struct.error) as error:
            raise _Refused(f"its entry {name} is damaged; copy or download the file again") from error

    def read_pickle(self) -> bytes:
        size = self.entry("data.pkl").file_size
        _require(size <= MAX_PICKLE_BYTES, f"its data.pkl has {size} bytes; no YOLOv5 checkpoint needs so many")
        return self.read("data.pkl")

    def tensor(self, ref: _TensorRef) -> torch.Tensor:
        """Return a copy of the tensor, contiguous and of the dtype in the file."""
        whole = 0 < math.prod(ref.size) <= ref.storage.numel
        _require(whole, f"its tensor of size {list(ref.size)} is empty or larger than its storage {ref.storage.key}")
        if ref.storage not in self.storages:
            raw = bytearray(self.read(f"data/{ref.storage.key}"))
            self.storages[ref.storage] = torch.frombuffer(raw, dtype=ref.storage.dtype, count=ref.storage.numel)
        view = self.storages[ref.storage].as_strided(ref.size, ref.stride, ref.offset)
        return view.clone(memory_format=torch.contiguous_format)


@contextmanager
def _open_archive(path: Path) -> Iterator[_Archive]:
    """Open the zip at `path` if it is one that `torch.save` wrote."""
    size = _check_head(path)
    try:
        file = ZipFile(path)
    except (BadZipFile, OSError, ValueError, NotImplementedError, OverflowError, struct.error) as error:
        raise _Refused("the zip is truncated or damaged; copy or download the file again") from error
    with file:
        yield _Archive(file, size, _torch_entries(file))


def _check_head(path: Path) -> int:
    """Return the file's size in bytes; refuse what does not begin like a zip."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(4)
    except OSError as error:
        raise _Refused(f"the file cannot be read ({error.strerror})") from error
    _require(size > 0, "the file is empty")
    legacy = "the file is a pickle stream from before torch 1.6; load it where it comes from and torch.save it again"
    _require(not head.startswith(b"\x80"), legacy)
    _require(head.startswith(b"PK"), "the file is no PyTorch checkpoint (it is not a zip)")
    return size


def _torch_entries(file: ZipFile) -> dict[str, ZipInfo]:
    names = file.namelist()
    roots = {name.removesuffix("/data.pkl") for name in names if name.endswith("/data.pkl") and name.count("/") == 1}
    _require(len(roots) == 1, "the zip is no PyTorch checkpoint (it should have one data.pkl in one folder)")
    root = roots.pop() + "/"
    entries = {info.filename.removeprefix(root): info for info in file.infolist() if info.filename.startswith(root)}
    script = "constants.pkl" in entries or any(name.startswith("code/") for name in entries)
    _require(not script, "the file is a TorchScript archive; give the checkpoint that it was exported from")
    return entries


# --- the pickle -----------------------------------------------------------------------------------------------------


class _Unpickler(pickle.Unpickler):
    """Builds stand-ins. `find_class` and `persistent_load` are its only ways to get anything but plain values."""

    def __init__(self, pickled: bytes, archive: _Archive) -> None:
        super().__init__(io.BytesIO(pickled))
        self._archive = archive
        self._stubs: dict[str, type[_Stub]] = {}

    def find_class(self, module: str, name: str) -> object:
        path = f"{module}.{name}"
        if path in ALLOWED:
            return ALLOWED[path]
        own = module in YOLO_MODULES and name.isidentifier() and len(name) <= MAX_NAME
        if not own and path not in TORCH_MODULES:
            asked = ascii(path[:MAX_NAME])[1:-1]
            raise _Refused(f"it asks for {asked}, which no YOLOv5 checkpoint needs; nothing was run")
        if path not in self._stubs:
            self._stubs[path] = type(name, (_Stub,), {"__slots__": (), "path": path})
        return self._stubs[path]

    def persistent_load(self, pid: object) -> _Storage:
        typed = type(pid) is tuple and len(pid) == 5 and pid[0] == "storage" and type(pid[1]) is _StorageType
        typed = typed and type(pid[2]) is str and re.fullmatch("[0-9]{1,9}", pid[2]) is not None
        _require(typed and type(pid[4]) is int and pid[4] >= 0, "its pickle is damaged: it holds a malformed storage")
        _, kind, key, _, numel = pid
        if numel > 0:
            wanted, held = numel * kind.dtype.itemsize, self._archive.entry(f"data/{key}").file_size
            _require(wanted == held, f"its storage {key} declares {wanted} bytes, but its entry has {held}")
        return _Storage(key, kind.dtype, numel)


def _unpickle(archive: _Archive) -> object:
    """Return the pickled object, made of stand-ins and plain values."""
    if "byteorder" in archive.entries:
        little = archive.read("byteorder").strip() == b"little"
        _require(little, "it was saved on a big-endian machine; save it again on a little-endian one")
    pickled = archive.read_pickle()
    try:
        _check_opcodes(pickled)
        return _Unpickler(pickled, archive).load()
    except _Refused:
        raise
    except Exception as error:  # a malformed pickle can raise nearly anything, and all of it means the same
        raise _Refused(f"its pickle is damaged ({type(error).__name__})") from error


def _check_opcodes(pickled: bytes) -> None:
    """Refuse opcodes that no `torch.save` writes, and memo indices for which the unpickler would allocate gigabytes."""
    for count, (opcode, argument, _) in enumerate(pickletools.genops(pickled)):
        _require(opcode.name in OPCODES, f"its pickle uses {opcode.name}, which no YOLOv5 checkpoint needs")
        if opcode.name.endswith("BINPUT"):
            _require(argument <= count, "its pickle is damaged: it numbers more objects than it has")


# --- the facts ------------------------------------------------------------------------------------------------------


def _checkpoint(top: object, archive: _Archive) -> OfficialCheckpoint:
    model = _pick_model(top)
    modules = _modules(model)
    head_path, head = _detect_head(modules)
    state = _state(modules, archive)
    stride = _stride(model, head, archive)
    nc = _class_count(head, head_path, len(stride), state)
    epoch = top.get("epoch")
    return OfficialCheckpoint(
        yaml=_architecture(model),
        names=_names(model.state.get("names"), nc),
        nc=nc,
        stride=stride,
        anchors_pixels=_anchors_pixels(state[f"{head_path}.anchors"], stride),
        state=state,
        bn_eps=_batch_norm_attribute(modules, "eps"),
        bn_momentum=_batch_norm_attribute(modules, "momentum"),
        activations=_activations(modules),
        epoch=epoch if type(epoch) is int and _is_number(epoch) else -1,
        best_fitness=_number(top.get("best_fitness")),
        fused=any(_is_fused(module) for module in modules.values()),
    )


def _pick_model(top: object) -> _Stub:
    """Return `ema` if the checkpoint has one, else `model`."""
    _require(isinstance(top, dict), "it holds no dict; an official checkpoint is a dict with the key 'model'")
    _require("format" not in top, "it is a checkpoint of this project, not an official one")
    tensors_only = bool(top) and all(type(value) is _TensorRef for value in top.values())
    _require(not tensors_only, "it is a plain state_dict; an official checkpoint holds the whole pickled model")
    key = "model" if top.get("ema") is None else "ema"
    model = top.get(key)
    _require(isinstance(model, _Stub), f"its '{key}' is missing or no pickled module, as in official checkpoints")
    _require(model.path in DETECTION_MODELS, f"its '{key}' is a {model.path}; a detection model of YOLOv5 is needed")
    return model


def _modules(model: _Stub) -> dict[str, _Stub]:
    """Return all modules by path, each before its children, the model itself under ''."""
    modules = dict(islice(_walk(model, "", 0), MAX_MODULES + 1))
    _require(len(modules) <= MAX_MODULES, f"its model has more than {MAX_MODULES} modules")
    return modules


def _walk(module: _Stub, path: str, depth: int) -> Iterator[tuple[str, _Stub]]:
    _require(depth <= MAX_DEPTH, f"its model nests modules more than {MAX_DEPTH} deep")
    yield path, module
    for name, child in _table(module, "_modules", _Stub).items():
        yield from _walk(child, f"{path}.{name}" if path else name, depth + 1)


def _table(module: _Stub, key: str, kind: type) -> dict[str, Any]:
    """Return a module's `_modules`, `_parameters` or `_buffers` without the entries that are None."""
    table = module.state.get(key, {})
    _require(isinstance(table, dict), f"its {module.path} has a malformed {key}")
    table = {name: value for name, value in table.items() if value is not None}
    named = all(type(name) is str and 0 < len(name) <= MAX_NAME for name in table)
    well_formed = named and all(isinstance(value, kind) for value in table.values())
    _require(well_formed, f"its {module.path} has a malformed {key}")
    return table


def _tensors(module: _Stub) -> dict[str, _TensorRef]:
    """Return a module's own parameters and buffers, as its state_dict would list them, without `anchor_grid`."""
    hidden = module.state.get("_non_persistent_buffers_set")
    dropped = {"anchor_grid"} | (hidden if isinstance(hidden, set) else set())
    both = _table(module, "_parameters", _TensorRef) | _table(module, "_buffers", _TensorRef)
    return {name: ref for name, ref in both.items() if name not in dropped}


def _state(modules: dict[str, _Stub], archive: _Archive) -> dict[str, torch.Tensor]:
    refs = {f"{path}.{name}": ref for path, module in modules.items() for name, ref in _tensors(module).items()}
    # Many names may share one storage; without this bound a small file could fill the memory.
    claimed = sum(ref.nbytes for ref in refs.values())
    _require(claimed <= 2 * archive.size, f"its tensors claim {claimed} bytes, but the file has {archive.size}")
    tensors = {name: archive.tensor(ref) for name, ref in refs.items()}
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def _detect_head(modules: dict[str, _Stub]) -> tuple[str, _Stub]:
    heads = [(path, module) for path, module in modules.items() if module.path == "models.yolo.Detect"]
    _require(len(heads) == 1, f"its model has {len(heads)} Detect layers instead of one")
    return heads[0]


def _stride(model: _Stub, head: _Stub, archive: _Archive) -> tuple[float, ...]:
    """Return the stride of each level in pixels."""
    for module in (model, head):
        ref = module.state.get("stride")
        if type(ref) is _TensorRef and len(ref.size) == 1:
            stride = tuple(archive.tensor(ref).double().tolist())
            _require(all(0 < value < math.inf for value in stride), "its strides are not positive numbers")
            return stride
    raise _Refused("its model has no tensor 'stride' with one value per level")


def _class_count(head: _Stub, head_path: str, levels: int, state: dict[str, torch.Tensor]) -> int:
    """Return the number of classes, once anchors, output layers and strides are known to agree with it."""
    nc, anchors = head.state.get("nc"), state.get(f"{head_path}.anchors")
    _require(type(nc) is int and nc >= 1, "its Detect layer has no number of classes 'nc'")
    shaped = anchors is not None and anchors.ndim == 3 and anchors.shape[0] == levels and anchors.shape[2] == 2
    _require(shaped, f"its Detect layer should have a buffer 'anchors' of shape ({levels}, anchors per level, 2)")
    for level in range(levels):
        weight = state.get(f"{head_path}.m.{level}.weight")
        wide = weight is not None and weight.shape[:1] == (anchors.shape[1] * (nc + 5),)
        _require(wide, f"its Detect layer {level} should have {anchors.shape[1]} x (5 + {nc} classes) outputs")
    return nc


def _anchors_pixels(anchors: torch.Tensor, stride: tuple[float, ...]) -> tuple[tuple[tuple[float, float], ...], ...]:
    """Turn anchors in grid units, (levels, anchors, 2), into pixels."""
    pixels = anchors * torch.tensor(stride).view(-1, 1, 1)
    _require(bool(pixels.isfinite().all()), "its anchors are not finite numbers")
    return tuple(tuple((width, height) for width, height in level) for level in pixels.tolist())


def _architecture(model: _Stub) -> dict[str, Any]:
    yaml = model.state.get("yaml")
    _require(isinstance(yaml, dict), "its model has no architecture dict 'yaml'")
    return _plain(yaml, iter(range(MAX_PLAIN_VALUES)), 0)


def _plain(value: object, budget: Iterator[int], depth: int) -> Any:
    """Copy nested dicts, lists and tuples of plain values; `budget` bounds how many, since parts may be shared."""
    _require(next(budget, None) is not None and depth <= MAX_DEPTH, "its architecture dict 'yaml' is too large")
    if isinstance(value, dict):
        _require(all(type(key) in (str, int) for key in value), "its architecture dict 'yaml' has malformed keys")
        return {key: _plain(item, budget, depth + 1) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_plain(item, budget, depth + 1) for item in value)
    plain = value is None or type(value) in (str, bool) or _is_number(value)
    _require(plain, "its architecture dict 'yaml' holds more than texts, numbers, lists and dicts")
    return value


def _names(names: object, nc: int) -> tuple[str, ...]:
    """Return the class names in the order of their index."""
    if names is None:
        return tuple(f"class{index}" for index in range(nc))
    if isinstance(names, dict):
        indexed = all(type(key) is int or (type(key) is str and re.fullmatch("[0-9]{1,9}", key)) for key in names)
        _require(indexed, "its class names are a dict whose keys are no numbers")
        names = [names[key] for key in sorted(names, key=int)]
    listed = type(names) in (list, tuple) and all(type(name) in (str, bool) or _is_number(name) for name in names)
    _require(listed, "its class names are neither a list of texts nor a dict from number to text")
    _require(len(names) == nc, f"it has {len(names)} class names for {nc} classes")
    return tuple(str(name) for name in names)


def _batch_norm_attribute(modules: dict[str, _Stub], attribute: str) -> dict[str, float]:
    norms = {path: module for path, module in modules.items() if module.path.endswith(".BatchNorm2d")}
    values = {path: module.state.get(attribute) for path, module in norms.items()}
    bad = next((path for path, value in values.items() if not _is_number(value)), None)
    _require(bad is None, f"its {bad} has no number '{attribute}'")
    return {path: float(value) for path, value in values.items()}


def _activations(modules: dict[str, _Stub]) -> dict[str, str]:
    return {path.removesuffix(".act"): _activation(act) for path, act in modules.items() if path.endswith(".act")}


def _activation(act: _Stub) -> str:
    name = act.path.rpartition(".")[2]
    slope = act.state.get("negative_slope")
    return f"{name}({slope:g})" if name == "LeakyReLU" and _is_number(slope) else name


def _is_fused(module: _Stub) -> bool:
    """Tell whether `module` is a Conv whose batch norm is gone and whose convolution has a bias instead."""
    children = _table(module, "_modules", _Stub)
    conv = children.get("conv")
    if conv is None or "bn" in children or not conv.path.endswith(".Conv2d"):
        return False
    return "bias" in _table(conv, "_parameters", _TensorRef)


def _number(value: object) -> float | None:
    """Return the fitness, which is a float or a numpy array with one element, according to the release."""
    if value is None:
        return None
    if _is_number(value):
        return float(value)
    whole = type(value) is _NumpyArray and len(value.raw) == np.dtype(value.code).itemsize
    _require(whole, "its 'best_fitness' is no number")
    return float(np.frombuffer(value.raw, dtype=f"<{value.code}")[0])
