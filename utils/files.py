"""Files: run folders, atomic and durable writes, and clear errors for files that are not there or cannot be written."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from utils.errors import InputError, did_you_mean


def existing(path: str | Path, flag: str) -> Path:
    """Return `path` if it is a file; otherwise raise `InputError` naming the flag, the path and near names."""
    path = Path(path)
    if path.is_file():
        return path
    if path.is_dir():
        raise InputError(f"{flag}: {path} is a folder; give a file")
    folder = path.parent
    near = did_you_mean(path.name, [p.name for p in folder.iterdir()]) if folder.is_dir() else f"; there is no folder {folder}"
    end = "" if near.endswith("?") else "."
    raise InputError(f"{flag}: no file {path}{near}{end} Nothing is downloaded: give the path of a file that is there")


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` that takes its place when the block ends well, and vanishes when it does not.

    What is in place is also on the disk: a power cut leaves the old file or the new one, never an empty one.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        if not temporary.is_symlink():  # a link has no content of its own, and what it points at may not be there yet
            sync(temporary)
        os.replace(temporary, path)
        with contextlib.suppress(OSError):  # some systems cannot open a folder; the renaming is safe against a kill all the same
            sync(path.parent)
    except OSError as error:
        _discard(temporary)
        raise InputError(f"{path}: cannot be written ({error.strerror or error}); what was there before is unchanged") from None
    except BaseException:
        _discard(temporary)
        raise


def sync(path: Path) -> None:
    """Return once a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _discard(temporary: Path) -> None:
    with contextlib.suppress(OSError):  # its folder may be what is gone
        temporary.unlink()


def copy_file(source: Path, target: Path) -> None:
    """Copy `source` atomically, with its modification time: a copy is never newer than what it was made from."""
    with atomic(target) as temporary:
        shutil.copy2(source, temporary)


def remove_temporaries(folder: Path) -> None:
    """Remove what `atomic` had begun in `folder` when its process was killed."""
    for path in folder.glob(".*.tmp"):
        if re.fullmatch(r"\..+\.\d+\.tmp", path.name):
            _discard(path)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_files(files: Mapping[Path, bytes]) -> None:
    """Write several files that belong together: each is whole before the first takes its place."""
    with contextlib.ExitStack() as stack:
        for path, content in files.items():
            stack.enter_context(atomic(path)).write_bytes(content)


def run_folder(project: str | Path, name: str, exist_ok: bool = False) -> Path:
    """The folder for a run: `project/name`, or the first free of `name2`, `name3`, ... as in YOLOv5. It is not created yet."""
    first = Path(project) / name
    if exist_ok or not os.path.exists(first):  # unlike Path.exists, says no where looking is not permitted; `make_folder` says why
        return first
    n = 2
    while os.path.exists(path := Path(f"{first}{n}")):
        n += 1
    return path


def make_folder(path: Path) -> Path:
    """Create `path`; raise `InputError` where that is not possible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: the run folder cannot be made ({error.strerror})") from None
    return path


def check_place(folder: str | Path) -> None:
    """Raise `InputError` where `folder` could not be made or written into, so that a long run need not end on that."""
    folder = Path(folder).absolute()
    there = next(p for p in (folder, *folder.parents) if os.path.exists(p))
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        why = "cannot be written into" if there.is_dir() else "is no folder"
        raise InputError(f"{folder}: the run folder cannot be made ({there} {why})")


class OwnNames:
    """Gives each path the stem of its file name, and a second path of the same stem (another folder or ending) a number after it."""

    def __init__(self) -> None:
        self._owners: dict[str, str] = {}

    def stem(self, path: Path) -> str:
        stem, n = path.stem, 2
        while self._owners.setdefault(stem, str(path)) != str(path):
            stem, n = f"{path.stem}_{n}", n + 1
        return stem


def megabytes(path: Path) -> float:
    """Size of a file in MB (10^6 bytes)."""
    return path.stat().st_size / 1e6
