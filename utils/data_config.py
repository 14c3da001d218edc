"""Reads what `--data` names: a YOLOv5 dataset yaml or a Darknet `.data` file.

Owns the two formats, where their paths are looked for, what is said when images are missing, and the data sets that the
project can generate. It reads no image and no label (see `utils.labels`), runs nothing that a file says, and fetches
nothing: `source`, `convert` and YOLOv5's `download` are shown to the user.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from utils.errors import InputError, did_you_mean
from utils.log import LOGGER

_HINTS = {"source": "get it from", "convert": "then convert it", "download": "its `download:` says (shown, not run)"}
_MOST_LINES = 40  # of a hint that are shown
REPOSITORY = Path(__file__).resolve().parents[1]
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class DataConfig:
    """A data set: the folders or `.txt` lists of each split (absolute, possibly none), and the class names."""

    source: Path
    train: tuple[Path, ...]
    val: tuple[Path, ...]
    test: tuple[Path, ...]
    names: tuple[str, ...]

    @property
    def nc(self) -> int:
        """Number of classes."""
        return len(self.names)


@dataclass(frozen=True)
class _Description:
    """What either format says, before any path is looked for. `root` is empty where the file names none.

    `hints`: the file's texts under `source`, `convert` and `download`, those it has.
    """

    source: Path
    root: str
    entries: Mapping[str, tuple[str, ...]]
    names: tuple[str, ...]
    hints: Mapping[str, str]

    def bases(self) -> tuple[Path, ...]:
        """The folders that a relative path may start from, in the order they are tried."""
        return tuple(dict.fromkeys((Path.cwd(), REPOSITORY, self.source.parent)))


def _generate_digits(root: Path) -> None:
    from data.digits import generate  # the generator is needed once in the life of a checkout

    generate(root)


def _generate_digit_folders(root: Path) -> None:
    from data.digit_folders import generate

    generate(root)


GENERATORS: Mapping[str, Callable[[Path], None]] = {"digits": _generate_digits, "digit_folders": _generate_digit_folders}


def read_data(path: str | Path, splits: Sequence[str] = ("train", "val")) -> DataConfig:
    """Read a dataset yaml or a Darknet `.data` file and check that the images of `splits` are there.

    `path` is relative to the working folder, then to the repository, then to its `data/`. Only `splits` are checked,
    and only for them a shipped generator named by `download:` runs, if their images are missing; pass `()` to read just
    the names.

    Raises InputError for a file that is missing or malformed, names that disagree with `nc`, or missing images; the
    last, of several lines where the file has them, says where the images are from and how they are converted.
    """
    source = _find_file(Path(path))
    description = _read_darknet(source) if source.suffix == ".data" else _read_yaml(source)
    for split in splits:
        if not description.entries[split]:
            raise InputError(f"{source}: `{split}` is missing; give it a folder of images or a .txt list of them")

    root, located = _locate(description)
    if missing := _missing(description, located, splits):
        generator = description.hints.get("download", "")
        if generator not in GENERATORS:
            raise InputError(_how_to_get(description, missing[0][0]))
        LOGGER.info(f"generating the data set {generator!r} in {root}")
        GENERATORS[generator](root)
        if missing := _missing(description, located, splits):
            raise InputError(f"{source}: {missing[0][1]} is still missing after {generator!r} was generated")
    return DataConfig(source=source, names=description.names, **located)


def _find_file(path: Path) -> Path:
    """Return the absolute path of the file that `path` means; InputError naming its neighbours if there is none."""
    candidates = [_absolute(base / path) for base in (Path.cwd(), REPOSITORY, REPOSITORY / "data")]
    source = next((candidate for candidate in candidates if os.path.isfile(candidate)), None)
    if source is None and path.is_dir():
        raise InputError(f"data file {path}: is a folder; a detector's data is a .yaml or .data (a classifier's can be a folder of images)")
    if source is None:
        folder = next((c.parent for c in candidates if c.parent.is_dir()), REPOSITORY / "data")
        known = sorted(f.name for f in (*folder.iterdir(), *(REPOSITORY / "data").iterdir()) if f.is_file())
        raise InputError(f"data file {path}: no such file{did_you_mean(path.name, known)}")
    if source.suffix not in (".yaml", ".yml", ".data"):
        raise InputError(f"data file {path}: expected a dataset .yaml or a Darknet .data file")
    return source


# YOLOv5 yaml ----------------------------------------------------------------------------------------------------------


def _read_yaml(source: Path) -> _Description:
    try:
        # BaseLoader builds only strings, lists and mappings: a class called `no` or `01` keeps its name.
        content = yaml.load(_read_text(source), Loader=yaml.BaseLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise InputError(f"{source}: not a valid yaml: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise InputError(f"{source}: expected keys such as `path`, `train`, `val` and `names`")
    return _Description(
        source=source,
        root=_text(source, content, "path"),
        entries={split: _path_list(source, content, split) for split in SPLITS},
        names=_yaml_names(source, content),
        hints={key: text for key in _HINTS if (text := _text(source, content, key))},
    )


def _text(source: Path, content: Mapping[str, object], key: str) -> str:
    """Return a scalar of the yaml as text; an absent or null one as an empty string."""
    value = content.get(key, "")
    if not isinstance(value, str):
        raise InputError(f"{source}: `{key}` must be one value")
    return "" if value.lower() in ("null", "~", "none") else value.strip()


def _path_list(source: Path, content: Mapping[str, object], key: str) -> tuple[str, ...]:
    value = content.get(key, "")
    if not isinstance(value, list):
        text = _text(source, content, key)
        return (text,) if text else ()
    if not all(isinstance(item, str) and item for item in value):
        raise InputError(f"{source}: `{key}` must be a path or a list of paths")
    return tuple(value)


def _yaml_names(source: Path, content: Mapping[str, object]) -> tuple[str, ...]:
    names, nc = content.get("names"), _text(source, content, "nc")
    if isinstance(names, dict):
        names = _ordered(source, names)
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise InputError(f"{source}: `names` must be a list, or a mapping from class number to name")
    return _checked_names(source, names, nc, "nc", did_you_mean("names", content))


def _ordered(source: Path, names: Mapping[str, object]) -> list[object]:
    """Turn `{number: name}` into a list; the numbers must be 0 to n-1."""
    numbers = [str(number) for number in range(len(names))]
    if set(names) != set(numbers):
        raise InputError(f"{source}: the numbers in `names` must run from 0 to {len(names) - 1}")
    return [names[number] for number in numbers]


# Darknet .data --------------------------------------------------------------------------------------------------------


def _read_darknet(source: Path) -> _Description:
    content = _key_values(source)
    bare = _Description(source, "", {}, (), {})
    entries = {split: _darknet_paths(bare, content.get(split, "")) for split in SPLITS}
    names = None
    if content.get("names"):
        file = _first_existing(bare, content["names"])
        if not file.is_file():
            raise InputError(f"{source}: the names file is missing: {_looked_for(bare, content['names'])}")
        names = [line.strip() for line in _read_text(file).splitlines() if line.strip()]
    checked = _checked_names(source, names, content.get("classes", ""), "classes", did_you_mean("names", content))
    return _Description(source, "", entries, checked, {key: content[key] for key in _HINTS if content.get(key)})


def _darknet_paths(bare: _Description, value: str) -> tuple[str, ...]:
    """A path, or several with commas between them; a comma may also belong to the name of a file that exists."""
    if os.path.exists(_first_existing(bare, value)):
        return (value,) if value else ()
    return tuple(part.strip() for part in value.split(",") if part.strip())


def _key_values(source: Path) -> dict[str, str]:
    content = {}
    for number, line in enumerate(_read_text(source).splitlines(), start=1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        key, equals, value = line.partition("=")
        if not equals:
            raise InputError(f"{source}, line {number}: expected `key=value`, found {line!r}")
        key = key.strip()
        content["val" if key == "valid" else key] = value.strip()
    return content


# Shared ---------------------------------------------------------------------------------------------------------------


def _read_text(source: Path) -> str:
    try:
        return source.read_text(encoding="utf-8-sig", errors="replace")
    except OSError as error:
        raise InputError(f"{source}: cannot be read ({error.strerror})") from None


def _checked_names(source: Path, names: list[str] | None, nc: str, key: str, hint: str) -> tuple[str, ...]:
    """Return the class names; `class0`, ... where only their number is given. InputError where both disagree."""
    if nc and not (nc.isascii() and nc.isdigit()):
        raise InputError(f"{source}: `{key}` must be a whole number, found {nc!r}")
    if names is None:
        if not nc:
            raise InputError(f"{source}: `names` is missing; list the class names, or give `{key}` their number{hint}")
        names = [f"class{number}" for number in range(int(nc))]
    if not names:
        raise InputError(f"{source}: the data set has no class; list at least one in `names`")
    if nc and int(nc) != len(names):
        raise InputError(f"{source}: `{key}` is {nc} but `names` has {len(names)} entries; correct one of them")
    return tuple(names)


def _absolute(path: Path) -> Path:
    """Make absolute and drop `..` without following links: a linked `images` folder keeps its own name."""
    return Path(os.path.abspath(path))


def _locate(description: _Description) -> tuple[Path, dict[str, tuple[Path, ...]]]:
    """Return the data set's root and the absolute paths of each split, in the order of its entries.

    With a `path`, all splits lie under one root: the candidate that has most of them, else the first that exists, else
    the repository's. Without, every entry is looked for on its own.
    """
    if not description.root:
        located = {k: tuple(_first_existing(description, e) for e in v) for k, v in description.entries.items()}
        return description.source.parent, located
    roots = [_absolute(base / description.root) for base in description.bases()]
    entries = [entry for split in description.entries.values() for entry in split]
    root = max(roots, key=lambda folder: (sum(os.path.exists(folder / entry) for entry in entries), os.path.exists(folder)))
    if not os.path.exists(root):
        root = _absolute(REPOSITORY / description.root)
    return root, {k: tuple(_absolute(root / entry) for entry in v) for k, v in description.entries.items()}


def _first_existing(description: _Description, entry: str) -> Path:
    candidates = [_absolute(base / entry) for base in description.bases()]
    return next((candidate for candidate in candidates if os.path.exists(candidate)), candidates[0])


def _looked_for(description: _Description, entry: str) -> str:
    """Name every place where an entry may lie: `a, b or c`."""
    *others, last = dict.fromkeys(str(_absolute(base / description.root / entry)) for base in description.bases())
    return f"{', '.join(others)} or {last}" if others else last


def _missing(description: _Description, located: Mapping[str, tuple[Path, ...]], splits: Sequence[str]) -> list[tuple[str, Path]]:
    """Return entry and path of what `splits` name that does not exist or is an empty folder."""
    pairs = [pair for split in splits for pair in zip(description.entries[split], located[split])]
    return [(entry, path) for entry, path in pairs if not (os.path.isfile(path) or _has_content(path))]


def _has_content(folder: Path) -> bool:
    return os.path.isdir(folder) and any(folder.iterdir())


def _how_to_get(description: _Description, missing: str) -> str:
    """Say which images are missing and, in the file's own words, where they come from and what makes labels of them."""
    download = description.hints.get("download", "")
    near = did_you_mean(download, GENERATORS) if download.isidentifier() else ""
    problem = f"{description.source}: images are missing: looked for {_looked_for(description, missing)}{near}"
    if not description.hints:
        return f"{problem}; put them there, or correct the path (nothing is downloaded)"
    hints = [f"  {_HINTS[key]}:{_shown(text)}" for key, text in description.hints.items()]
    return "\n".join([problem, *hints, "  Nothing is downloaded, and nothing that the file says is run."])


def _shown(text: str) -> str:
    """A hint after a blank, or indented below if it has several lines. What is not printable (escape codes) is left out."""
    lines = ["".join(c for c in line.expandtabs(4) if c.isprintable()) for line in text.splitlines()]
    if len(lines) == 1:
        return f" {lines[0]}"
    more = [f"... and {len(lines) - _MOST_LINES} more lines"] if len(lines) > _MOST_LINES else []
    return "".join(f"\n    {line}" for line in lines[:_MOST_LINES] + more)
