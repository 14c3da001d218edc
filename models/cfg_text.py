"""The text of a cfg file as sections with typed look-ups, which every dialect shares. What sections and keys mean is not known here."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from utils.errors import InputError, did_you_mean


@dataclass(frozen=True)
class Section:
    """A cfg section with the line on which it opens and those of its keys; typed look-ups raise `InputError` with file, line and key."""

    kind: str
    where: str
    values: dict[str, str]
    lines: dict[str, str] = field(default_factory=dict)  # key -> "FILE line N"

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        try:
            return int(value)
        except (TypeError, ValueError):
            raise InputError(f"{self.where}: {key}={value} must be a whole number") from None

    def number(self, key: str, default: float) -> float:
        try:
            return float(self.values.get(key, default))
        except ValueError:
            raise InputError(f"{self.where}: {key}={self.values[key]} must be a number") from None

    def numbers(self, key: str, kind: type = int) -> list:
        try:
            return [kind(v) for v in self.values[key].replace(" ", "").split(",") if v]
        except (KeyError, ValueError):
            raise InputError(f"{self.where}: {key}={self.values.get(key)} must be numbers with commas between them") from None

    def check_keys(self, known: Collection[str]) -> None:
        """Raise `InputError` naming the line of the first key that is not in `known`."""
        for key in self.values:
            if key not in known:
                raise InputError(f"{self.lines[key]}: unknown key {key!r} in [{self.kind}]{did_you_mean(key, known)}")

    def inputs(self, place: list[int]) -> tuple[int, ...]:
        """The blocks that the section reads; `place`: the block that each earlier section gives (0: the image)."""
        above = place[-1] if place else 0
        key = {"route": "layers", "shortcut": "from"}.get(self.kind)
        if key is None:
            return (above,)
        found = []
        for offset in self.numbers(key):
            index = offset if offset >= 0 else len(place) + offset
            if not 0 <= index < len(place):
                raise InputError(f"{self.where}: {key}={offset} points at no earlier section")
            found.append(place[index])
        return tuple(found) if self.kind == "route" else (above, *found)


def read_text(path: Path) -> str:
    """The text of a cfg file."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{path}: not a text file, so no cfg") from None


def parse(text: str, source: str, comments: str = "#") -> tuple[Section, list[Section]]:
    """[net] and the sections behind it. `comments`: the characters with which a comment begins."""
    sections: list[Section] = []
    for number, line in enumerate(text.splitlines(), start=1):
        for mark in comments:
            line = line.split(mark)[0]
        line, where = line.strip(), f"{source} line {number}"
        if not line:
            continue
        if line.startswith("["):
            kind = line.strip("[] ")
            sections.append(Section("net" if kind == "network" else kind, f"{where} [{kind}]", {}))
            continue
        key, equals, value = (part.strip() for part in line.partition("="))
        if not equals or not sections:
            raise InputError(f"{where}: expected [section] or key=value, got {line!r}")
        if key in sections[-1].values and sections[-1].kind != "net":
            raise InputError(f"{where}: {key} stands twice in one section")
        sections[-1].values[key] = value
        sections[-1].lines[key] = where
    if not sections or sections[0].kind != "net":
        raise InputError(f"{source}: a cfg begins with a [net] section")
    return sections[0], sections[1:]


def check_known(sections: list[Section], keys: Mapping[str, Collection[str]]) -> None:
    """Raise `InputError` naming the line of the first section or key that is not in `keys`."""
    for section in sections:
        if section.kind not in keys:
            raise InputError(f"{section.where.split(' [')[0]}: unknown section [{section.kind}]{did_you_mean(section.kind, keys)}")
        section.check_keys(keys[section.kind])


def with_classes(sections: list[Section], classes: int) -> list[Section]:
    """Set `classes` in every [yolo] and [softmax] and the filters of the convolution above it."""
    changed = list(sections)
    for i, section in enumerate(sections):
        if section.kind in ("yolo", "softmax") and i and sections[i - 1].kind == "convolutional":
            width = len(section.numbers("mask")) * (classes + 5) if section.kind == "yolo" else classes
            changed[i] = replace(section, values=section.values | {"classes": str(classes)})
            above = sections[i - 1]
            changed[i - 1] = replace(above, values=above.values | {"filters": str(width)})
    return changed
