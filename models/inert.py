"""Reads the zips that `torch.save` writes without running anything that is in them.

Such a file is a pickle (`data.pkl`) beside raw tensor bytes (`data/<n>`). Unpickling may call whatever the pickle names,
so here it reaches only the inert stand-ins below: modules become `Stub`s that keep their attributes as a dict, tensors
become `TensorRef`s that are read later, and any other name is refused.

Owns: the container and the allow-list. Not: what a pickled model means (`models/official.py`). The argument for its
safety should be readable in one place, so this file is not split further.

How an opcode is kept harmless: GLOBAL ends in `find_class` below; REDUCE can call `_Function`s and argument-free
`Stub` classes, nothing else on the stack is callable; BUILD calls the `__setstate__` that every stand-in defines, and
fails on plain values; opcodes that allocate what they merely declare, and keys that are costly to hash, are refused
before the unpickler starts. No stand-in copies what it is given, so that a short pickle cannot become large.
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
from pathlib import Path
from zipfile import ZIP_STORED, BadZipFile, ZipFile, ZipInfo

import torch

# An official data.pkl is 0.1 to 1 MB. The bound matters because one pickled byte can become some 200 bytes of objects.
MAX_PICKLE_BYTES = 4 << 20
MAX_CLASSES = 200  # distinct module classes; each becomes a Python type
MAX_NAME = 128
MAX_SET = 4  # more would make a table of kilobytes

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
        "activation.SiLU activation.LeakyReLU activation.Hardswish activation.ReLU activation.ReLU6 activation.Mish "
        "activation.Sigmoid activation.MultiheadAttention batchnorm.BatchNorm2d container.Sequential "
        "container.ModuleList conv.Conv2d conv.ConvTranspose2d dropout.Dropout linear.Identity linear.Linear "
        "linear.NonDynamicallyQuantizableLinear linear._LinearWithBias normalization.LayerNorm padding.ZeroPad2d "
        "pooling.AvgPool2d pooling.MaxPool2d upsampling.Upsample"
    ).split()
)


class Refused(Exception):
    """Why the file is refused; the caller puts the file's name in front."""


def require(condition: bool, reason: str) -> None:
    """Raise `Refused` unless `condition` holds."""
    if not condition:
        raise Refused(reason)


# --- stand-ins: all that a pickle can reach -------------------------------------------------------------------------


class _Sealed:
    """Base of the stand-ins. Without `__setstate__`, BUILD would write into the instance, frozen or not."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        raise Refused("its pickle is damaged: it sets the state of something that has none")


class Stub(_Sealed):
    """A pickled module: `path` is the class it names, `state` its attributes, which are never interpreted as code."""

    __slots__ = ("state",)
    path = ""

    def __new__(cls) -> Stub:
        stub = super().__new__(cls)
        stub.state = {}
        return stub

    def __setstate__(self, state: object) -> None:
        require(type(state) is dict, f"its pickle is damaged: {self.path} has a state that is no dict")
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


class _Opaque(_Sealed):
    """Something whose value nobody needs: a path, or a bound method (a fused Conv keeps its other `forward` that way)."""

    __slots__ = ()


@dataclass(frozen=True)
class _Latin1(_Sealed):
    """Bytes as protocol 2 spells them: a text that is to be encoded as latin-1. (Encoding each use would copy it.)"""

    text: str

    def __bytes__(self) -> bytes:
        return self.text.encode("latin-1", errors="replace")


@dataclass(frozen=True)
class _StorageType(_Sealed):
    dtype: torch.dtype


@dataclass(frozen=True)
class Storage(_Sealed):
    """The entry `data/<key>`, known to hold `numel` elements of `dtype`."""

    key: str
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True)
class TensorRef(_Sealed):
    """A view of a storage, in elements, known to lie within it (with stride 0 it may hold more than the storage)."""

    storage: Storage
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
        require(little, f"it holds a numpy {self.code} that is not little-endian; save it on a little-endian machine")


class NumpyArray(_Sealed):
    """A numpy array or scalar: its dtype's code and its bytes."""

    __slots__ = ("code", "raw")

    def __init__(self, code: str = "f8", raw: bytes | _Latin1 = b"") -> None:
        self.code, self.raw = code, raw

    def __setstate__(self, state: object) -> None:
        well_formed = type(state) is tuple and len(state) == 5 and type(state[2]) is _NumpyDtype
        require(well_formed and _is_bytes(state[4]), "its pickle is damaged: it holds a malformed numpy array")
        self.code, self.raw = state[2].code, state[4]


def _is_bytes(value: object) -> bool:
    return type(value) in (bytes, _Latin1)


def _is_sizes(value: object) -> bool:
    return type(value) is tuple and len(value) <= 8 and all(type(item) is int and 0 <= item < 1 << 48 for item in value)


def _rebuild_tensor(storage: object, offset: object, size: object, stride: object, *_: object) -> TensorRef:
    """Stand in for `torch._utils._rebuild_tensor_v2`; what follows (gradient flag, hooks, metadata) is dropped."""
    typed = type(storage) is Storage and type(offset) is int and _is_sizes(size) and _is_sizes(stride)
    require(typed and offset >= 0 and len(size) == len(stride), "its pickle is damaged: it holds a malformed tensor")
    last = offset + sum((length - 1) * step for length, step in zip(size, stride))
    inside = math.prod(size) == 0 or last < storage.numel
    require(inside, f"its tensor of size {list(size)} reaches beyond storage {storage.key}, {storage.numel} elements")
    return TensorRef(storage, offset, size, stride)


def _rebuild_parameter(data: object, *_: object) -> TensorRef:
    require(type(data) is TensorRef, "its pickle is damaged: it holds a parameter without a tensor")
    return data


def _numpy_dtype(code: object, *_: object) -> _NumpyDtype:
    known = type(code) is str and re.fullmatch("f[248]|[iu][1248]|b1", code) is not None
    require(known, "it holds a numpy array of another dtype than a plain number (an object dtype could run code)")
    return _NumpyDtype(code)


def _numpy_scalar(dtype: object, raw: object) -> NumpyArray:
    require(type(dtype) is _NumpyDtype and _is_bytes(raw), "its pickle is damaged: it holds a malformed numpy scalar")
    return NumpyArray(dtype.code, raw)


def _encode(text: object, encoding: object) -> _Latin1:
    known = type(text) is str and encoding in ("latin1", "latin-1")
    require(known, "its pickle is damaged: it asks for _codecs.encode with another encoding than latin1")
    return _Latin1(text)


def _set(items: object = ()) -> set:
    plain = type(items) is list and len(items) <= MAX_SET and all(type(item) in (str, int) for item in items)
    require(plain or items == (), "its pickle is damaged: it holds a set of other things than a few texts and numbers")
    return set(items)


def _path(*parts: object) -> _Opaque:
    require(all(type(part) is str for part in parts), "its pickle is damaged: it holds a malformed path")
    return _Opaque()


def _size(sizes: object = ()) -> tuple[int, ...]:
    require(_is_sizes(sizes), "its pickle is damaged: it holds a malformed torch.Size")
    return sizes


def _bound_method(owner: object, name: object) -> _Opaque:
    """Stand in for `getattr`: it looks nothing up, and serves only the pickled form of a module's bound method."""
    method = isinstance(owner, Stub) and type(name) is str
    require(method, "it asks for builtins.getattr, which no YOLOv5 checkpoint needs for this; nothing was run")
    return _Opaque()


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
        allowed[f"{core}.multiarray._reconstruct"] = _Function(lambda *_: NumpyArray())
        allowed[f"{core}.multiarray.scalar"] = _Function(_numpy_scalar)
    for builtins in ("builtins", "__builtin__"):
        allowed[f"{builtins}.set"] = _Function(_set)
        allowed[f"{builtins}.getattr"] = _Function(_bound_method)
    for module in ("pathlib", "pathlib._local"):
        for name in ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath"):
            allowed[f"{module}.{name}"] = _Function(_path)
    return allowed


ALLOWED = _allowed_names()


# --- the container --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Archive:
    """The entries of an open checkpoint, named without the leading folder; `size` is that of the file in bytes."""

    file: ZipFile
    size: int
    entries: dict[str, ZipInfo]
    storages: dict[str, bytearray] = field(default_factory=dict)  # read once, however many tensors share it

    def entry(self, name: str) -> ZipInfo:
        info = self.entries.get(name)
        if info is None:
            raise Refused(f"it has no entry {name}; the file is incomplete")
        return info

    def read(self, name: str) -> bytes:
        info = self.entry(name)
        try:
            return self.file.read(info)
        except (BadZipFile, OSError, ValueError, RuntimeError, EOFError, struct.error) as error:
            raise Refused(f"its entry {name} is damaged; copy or download the file again") from error

    def read_pickle(self) -> bytes:
        size = self.entry("data.pkl").file_size
        require(size <= MAX_PICKLE_BYTES, f"its data.pkl has {size} bytes; no YOLOv5 checkpoint needs so many")
        return self.read("data.pkl")

    def tensor(self, ref: TensorRef) -> torch.Tensor:
        """Return a copy of the tensor, contiguous and of the dtype in the file."""
        storage = ref.storage
        whole = 0 < math.prod(ref.size) <= storage.numel
        require(whole, f"its tensor of size {list(ref.size)} is empty or larger than its storage {storage.key}")
        if storage.key not in self.storages:
            self.storages[storage.key] = bytearray(self.read(f"data/{storage.key}"))
        flat = torch.frombuffer(self.storages[storage.key], dtype=storage.dtype, count=storage.numel)
        return flat.as_strided(ref.size, ref.stride, ref.offset).clone(memory_format=torch.contiguous_format)


@contextmanager
def open_archive(path: Path) -> Iterator[Archive]:
    """Open the zip at `path` if it is one that `torch.save` wrote; raise `Refused` if not."""
    size = _check_head(path)
    try:
        file = ZipFile(path)
    except (BadZipFile, OSError, ValueError, RuntimeError, OverflowError, struct.error) as error:
        raise Refused("the zip is truncated or damaged; copy or download the file again") from error
    with file:
        yield Archive(file, size, _torch_entries(file, size))


_OTHER_FILES = {
    b"\x80": "the file is a pickle stream from before torch 1.6; where it comes from, load it and torch.save it again",
    b"<": "the file is a web page, not a checkpoint; download it again, from its own address",
    b"version https://git-lfs": "the file is a Git LFS pointer; git lfs pull fetches the checkpoint itself",
}


def _check_head(path: Path) -> int:
    """Return the file's size in bytes; refuse what does not begin like a zip."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise Refused(f"the file cannot be read ({error.strerror})") from error
    require(size > 0, "the file is empty")
    for start, what in _OTHER_FILES.items():
        require(not head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(start), what)
    require(head.startswith(b"PK"), "the file is no PyTorch checkpoint (it is not a zip)")
    return size


def _torch_entries(file: ZipFile, size: int) -> dict[str, ZipInfo]:
    """Return the entries beside `data.pkl`, each known to lie in the file as plain bytes, so that reading it cannot inflate."""
    infos = file.infolist()
    names = [info.filename for info in infos]
    roots = {name.removesuffix("/data.pkl") for name in names if name.endswith("/data.pkl") and name.count("/") == 1}
    require(len(roots) == 1, "the zip is no PyTorch checkpoint (it should have one data.pkl in one folder)")
    root = roots.pop() + "/"
    entries = {info.filename.removeprefix(root): info for info in infos if info.filename.startswith(root)}
    require(len(set(names)) == len(names), "it holds two entries of one name, which torch.save never writes")
    for name, info in entries.items():
        plain = info.compress_type == ZIP_STORED and not info.flag_bits & 1 and info.compress_size == info.file_size
        require(plain, f"its entry {ascii(name[:MAX_NAME])[1:-1]} is compressed, which torch.save never does")
    # Several entries may point at the same bytes; those of torch.save lie side by side.
    declared = sum(info.file_size for info in entries.values())
    inside = all(0 <= info.header_offset <= size - info.file_size for info in entries.values())
    require(inside and declared <= size, f"its entries declare {declared} bytes, more than the file holds ({size})")
    script = "constants.pkl" in entries or any(name.startswith("code/") for name in entries)
    require(not script, "the file is a TorchScript archive; give the checkpoint that it was exported from")
    return entries


# --- the pickle -----------------------------------------------------------------------------------------------------


class _Unpickler(pickle.Unpickler):
    """Builds stand-ins. `find_class` and `persistent_load` are its only ways to get anything but plain values."""

    def __init__(self, pickled: bytes, archive: Archive) -> None:
        super().__init__(io.BytesIO(pickled))
        self._archive = archive
        self._stubs: dict[str, type[Stub]] = {}

    def find_class(self, module: str, name: str) -> object:
        path = f"{module}.{name}"
        if path in ALLOWED:
            return ALLOWED[path]
        own = module in YOLO_MODULES and name.isidentifier() and len(name) <= MAX_NAME
        if not own and path not in TORCH_MODULES:
            asked = ascii(path[:MAX_NAME])[1:-1]
            raise Refused(f"it asks for {asked}, which no YOLOv5 checkpoint needs; nothing was run")
        if path not in self._stubs:
            require(len(self._stubs) < MAX_CLASSES, f"it names more than {MAX_CLASSES} classes of modules")
            self._stubs[path] = type(name, (Stub,), {"__slots__": (), "path": path})
        return self._stubs[path]

    def persistent_load(self, pid: object) -> Storage:
        typed = type(pid) is tuple and len(pid) == 5 and pid[0] == "storage" and type(pid[1]) is _StorageType
        typed = typed and type(pid[2]) is str and re.fullmatch("[0-9]{1,9}", pid[2]) is not None
        require(typed and type(pid[4]) is int and pid[4] >= 0, "its pickle is damaged: it holds a malformed storage")
        _, kind, key, _, numel = pid
        if numel > 0:
            wanted, held = numel * kind.dtype.itemsize, self._archive.entry(f"data/{key}").file_size
            require(wanted == held, f"its storage {key} declares {wanted} bytes, but its entry has {held}")
        return Storage(key, kind.dtype, numel)


def unpickle(archive: Archive) -> object:
    """Return the pickled object, made of stand-ins and plain values; raise `Refused` for whatever else it holds."""
    if "byteorder" in archive.entries:
        little = archive.read("byteorder").strip() == b"little"
        require(little, "it was saved on a big-endian machine; save it again on a little-endian one")
    pickled = archive.read_pickle()
    try:
        check_opcodes(pickled)
        return _Unpickler(pickled, archive).load()
    except Refused:
        raise
    except Exception as error:  # a malformed pickle can raise nearly anything, and all of it means the same
        raise Refused(f"its pickle is damaged ({type(error).__name__})") from error


def check_opcodes(pickled: bytes) -> None:
    """Refuse what costs more than it is long: opcodes that declare an allocation, memo indices that do, costly keys.

    Hashing nested tuples that share their parts takes exponential time, integers can be chosen to collide. So the stack
    is replayed here, with "may be a key" in the place of each value. Raises `Refused`, or whatever a malformed pickle
    makes of the replay.
    """
    stack: list[bool] = []
    marks: list[int] = []
    memo: dict[int, bool] = {}
    for count, (opcode, argument, _) in enumerate(pickletools.genops(pickled)):
        name = opcode.name
        require(name in OPCODES, f"its pickle uses {name}, which no YOLOv5 checkpoint needs")
        if name == "MARK":
            marks.append(len(stack))
        elif name == "POP" and marks and marks[-1] == len(stack):
            marks.pop()
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            index = len(memo) if name == "MEMOIZE" else argument
            require(index <= count, "its pickle is damaged: it numbers more objects than it has")
            memo[index] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        else:
            taken = _take(stack, marks, opcode)
            keys = taken[1::2] if name in ("SETITEM", "SETITEMS") else taken[1:] if name == "ADDITEMS" else []
            require(all(keys), "it has keys that are no plain texts or numbers; hashing them could take for ever")
            big = name == "LONG1" and abs(argument) >> 64
            stack.extend([name not in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3") and not big] * len(opcode.stack_after))


def _take(stack: list[bool], marks: list[int], opcode: pickletools.OpcodeInfo) -> list[bool]:
    """Remove and return what `opcode` takes from the stack, from the bottom up, without the mark."""
    single = [item for item in opcode.stack_before if item not in (pickletools.markobject, pickletools.stackslice)]
    start = marks.pop() if pickletools.markobject in opcode.stack_before else len(stack)
    start -= len(single)
    require(start >= (marks[-1] if marks else 0), "its pickle is damaged: it takes more values than it has")
    taken = stack[start:]
    del stack[start:]
    return taken
