"""The fields of a modifier: what each may hold, and the errors that name file, line, modifier and field.

A check takes a plain value and returns it as the modifiers hold it; what is wrong it raises as `Wrong`, which says what would be right.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from engine.recipe.modifiers import ALL, ALL_PRUNABLE
from engine.recipe.tree import Tagged
from engine.recipe.values import shown, word
from utils.errors import InputError, did_you_mean

Check = Callable[[Any], Any]
LAST_EPOCH = 1e6
_HUGE = 1e300  # an int beyond it may be no float
ROLES = ("norm", "weight", "bias")  # in the order of YOLOv5 up to v6.1, which the indices in recipes mean
_MASK = re.compile(r"\[?\s*(\d{1,6})\s*([:,])\s*(\d{1,6})\s*\]?")

_TOKEN = re.compile(r"__\w*|_?ALL(_\w*)?", re.IGNORECASE)


class Wrong(ValueError):
    """`VALUE is not ...`: what a field must be."""


@dataclass(frozen=True)
class Field:
    """One field of a modifier. `name`: that of the dataclass, where it differs from the recipe's. `dropped`: it is checked, and has no effect here,
    of which `note` tells where the value is none of `usual`."""

    check: Check
    required: bool = False
    name: str = ""
    dropped: bool = False
    note: str = ""
    usual: tuple[Any, ...] = (None, [], {})


@dataclass
class Entry:
    """A modifier that is being read: its checked values by the dataclass's names, and notes for the log."""

    tagged: Tagged
    values: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def error(self, name: str, message: str) -> InputError:
        """An error about a field, or about the modifier where `name` is empty or is not given."""
        where = self.tagged.lines.get(name, self.tagged.where)
        return InputError(f"{where}: {word(self.tagged.name)}: {f'{word(name)}: ' if name != '' else ''}{message}")

    def note(self, name: str, message: str) -> None:
        """Remember for the log what is read otherwise than a reader of the recipe might think."""
        self.notes.append(str(self.error(name, message)))

    def read(self, known: Mapping[str, Field]) -> None:
        """Check every field of the recipe against `known`."""
        for name, value in self.tagged.fields.items():
            if name == "log_types":  # of SparseML's first versions
                continue
            if name not in known:
                near = did_you_mean(str(name), known) or f"; it has {', '.join(known)}"
                raise self.error(name, f"there is no such field{near}")
            wanted = known[name]
            try:
                checked = wanted.check(value)
            except Wrong as wrong:
                raise self.error(name, f"{shown(value)} is not {wrong}") from None
            if not wanted.dropped:
                self.values[wanted.name or name] = checked
            elif wanted.note and value not in wanted.usual:
                self.note(name, wanted.note)
        missing = [name for name, f in known.items() if f.required and name not in self.tagged.fields]
        if missing:
            raise self.error("", f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing")


def _real(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < _HUGE


def number(what: str, right: Callable[[float], bool]) -> Check:
    """A finite number for which `right`, as a float. `what` describes it."""

    def check(value: Any) -> float:
        if not _real(value) or not right(value):
            raise Wrong(what)
        return float(value)

    return check


rate = number("a learning rate above 0 and at most 1", lambda v: 0 < v <= 1)
rate_or_zero = number("a learning rate from 0 to 1", lambda v: 0 <= v <= 1)
positive = number("a number above 0", lambda v: v > 0)
not_negative = number("a number of at least 0", lambda v: v >= 0)
share = number("a number from 0 to 1", lambda v: 0 <= v <= 1)
inner_share = number("a number above 0 and below 1", lambda v: 0 < v < 1)
factor = number("a factor above 0 and at most 1", lambda v: 0 < v <= 1)
start_epoch = number("an epoch (0 or more; -1: from the start)", lambda v: v == -1 or 0 <= v <= LAST_EPOCH)
end_epoch = number("an epoch (0 or more; -1: never)", lambda v: v == -1 or 0 <= v <= LAST_EPOCH)
an_epoch = number("an epoch (0 or more)", lambda v: 0 <= v <= LAST_EPOCH)
never = number("-1, as it does not end", lambda v: v == -1)
frequency = number("a number of epochs above 0 (-1: every batch)", lambda v: v == -1 or 0 < v <= LAST_EPOCH)


def boolean(value: Any) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise Wrong("true or false")
    return value


def anything(value: Any) -> Any:
    """For fields whose value has no effect here."""
    return value


def passed_over(check: Check = anything, note: str = "", usual: tuple[Any, ...] = (None, [], {})) -> Field:
    """A field that is known and has no effect here."""
    return Field(check, dropped=True, note=note, usual=usual)


def optional(check: Check) -> Check:
    """`check`, or null."""
    return lambda value: None if value is None else check(value)


def choice(names: Iterable[str]) -> Check:
    """One of `names`."""
    known = tuple(names)

    def check(value: Any) -> str:
        if value not in known:
            near = did_you_mean(value, known) if isinstance(value, str) else ""
            raise Wrong(f"one of {', '.join(known)}{near}")
        return value

    return check


def names(value: Any) -> tuple[str, ...]:
    """A name or a list of names, nested lists flattened; null: none."""
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list):
        raise Wrong("a name or a list of names")
    return tuple(name for part in value for name in _within(part))


def _within(part: Any) -> tuple[str, ...]:
    if part is None or (not isinstance(part, list) and not isinstance(part, str)):
        raise Wrong("a list of names")
    return names(part)


def selectors(value: Any) -> tuple[str, ...]:
    """Parameter selectors; a list that holds a token is that token alone, and an empty one stays empty."""
    right = f"{ALL_PRUNABLE}, {ALL}, or a list of parameter names and re: patterns"
    try:
        found = names(value)
    except Wrong:
        raise Wrong(right) from None
    for name in found:  # a parameter's name has a dot
        if _TOKEN.fullmatch(name) and name.upper() not in (ALL, ALL_PRUNABLE):
            raise Wrong(right + did_you_mean(name.upper(), (ALL, ALL_PRUNABLE)))
    tokens = [name.upper() for name in found if name.upper() in (ALL, ALL_PRUNABLE)]
    return (ALL,) if ALL in tokens else (ALL_PRUNABLE,) if tokens else tuple(dict.fromkeys(found))


def some_selectors(value: Any) -> tuple[str, ...]:
    """Parameter selectors, at least one."""
    found = selectors(value)
    if not found:
        raise Wrong(f"{ALL_PRUNABLE}, {ALL}, or a list of parameter names and re: patterns")
    return found


def groups(value: Any) -> tuple[str, ...]:
    """Roles of parameter groups; null or an empty list: every group."""
    listed = value if isinstance(value, list) else [] if value is None else [value]
    found = [ROLES[v] if isinstance(v, int) and not isinstance(v, bool) and 0 <= v < len(ROLES) else v for v in listed]
    if not all(role in ROLES for role in found):
        raise Wrong(f"a list of {', '.join(ROLES)} (or 0, 1, 2, which mean these)")
    return tuple(dict.fromkeys(found))


def mask_type(value: Any) -> str:
    """`unstructured`, `block4`, `A,B` for `[A, B]`, or `N:M`; `tensorrt` is 2:4."""
    right = "unstructured, block4, [A, B] (a block's output and input channels) or N:M as in 2:4"
    text = ",".join(str(v) for v in value) if isinstance(value, (list, tuple)) else value
    if not isinstance(text, str):
        raise Wrong(right)
    if text.lower() in ("unstructured", "block4"):
        return text.lower()
    if text.lower() == "tensorrt":
        return "2:4"
    if text.lower() in ("filter", "channel"):
        raise Wrong(f"{right}; prune.py and slim_prune.py remove whole channels, before a recipe's training")
    found = _MASK.fullmatch(text)
    if not found:
        raise Wrong(right + did_you_mean(text, ("unstructured", "block4", "tensorrt")))
    a, b = int(found[1]), int(found[3])
    if a < 1 or b < 1 or (found[2] == ":" and a >= b):
        raise Wrong(right)
    return f"{a}{found[2]}{b}"


def off_pattern(mask: str, only: float, final: float) -> str:
    """What is wrong where a `final` sparsity is not the `only` one that an N:M mask ends in; empty where they agree to a hundredth."""
    if abs(final - only) <= 0.01 + 1e-9:
        return ""
    return f"{mask} is a sparsity of {only:g}, and final_sparsity is {final:g}; make them equal"
