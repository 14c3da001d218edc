"""Files: run folders, atomic writes, and clear errors for files that are not there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from utils.errors import InputError, did_you_mean


def existing(path: str | Path, flag: str) -> Path:
    """Return `path` if it is a file; otherwise raise `InputError` naming the flag, the path and near names."""
    path = Path(path)
    if path.is_file():
        return path
    folder = path.parent
    near = did_you_mean(path.name, [p.name for p in folder.iterdir()]) if folder.is_dir() else f"; there is no folder {folder}"
    raise InputError(f"{flag}: no file {path}{near}. Nothing is downloaded: give the path of a file that is there")


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` that takes its place when the block ends well, and vanishes when it does not."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from None
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def run_folder(project: str | Path, name: str, exist_ok: bool = False) -> Path:
    """The folder for a run: `project/name`, or the first free of `name2`, `name3`, ... as in YOLOv5. It is not created yet."""
    first = Path(project) / name
    if exist_ok or not first.exists():
        return first
    n = 2
    while (path := Path(f"{first}{n}")).exists():
        n += 1
    return path


def make_folder(path: Path) -> Path:
    """Create `path`; raise `InputError` where that is not possible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: the run folder cannot be made ({error.strerror})") from None
    return path


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
