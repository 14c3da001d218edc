"""Values of a recipe: numbers as YAML 1.1 misses them, and arithmetic over variables, computed without running code."""

from __future__ import annotations

import ast
import math
import operator
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from graphlib import CycleError, TopologicalSorter
from typing import Any

from utils.errors import InputError, did_you_mean

_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
_EXPRESSION = re.compile(r"\s*eval\s*\((.*)\)\s*", re.DOTALL)
_LONGEST = 1000  # characters of an expression
_LONGEST_NUMBER = 300  # characters
_MOST = 100_000  # values within one, with variables written out
BITS = 4096  # of an integer; beyond it a power could take all memory and time
_DIGITS = 100  # that round() may be asked for

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: lambda base, exponent: _power(base, exponent),
}
_UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "abs": abs,
    "float": float,
    "int": int,
    "max": max,
    "min": min,
    "round": lambda *arguments: _round(*arguments),
}


class ExpressionError(ValueError):
    """What is wrong with an expression; who knows where it stands makes an `InputError` of it."""


def word(name: Any) -> str:
    """A name for a message: on one line, and not too long."""
    text = str(name)
    return text if len(text) <= 80 and text.isprintable() else f"{text[:60]!r}..."


def shown(value: Any) -> str:
    """A value for a message, as the recipe might have it, on one line."""
    text = _written(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _written(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_written, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_written(k)}: {_written(v)}' for k, v in value.items())}}}"
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else repr(value)


def listed(names: Iterable[Any]) -> str:
    """Names for a message, not too many."""
    shown = [word(name) for name in names]
    return ", ".join(shown[:20]) + (f" and {len(shown) - 20} more" if len(shown) > 20 else "")


def plain_number(text: str) -> int | float | str:
    """`text` as a number where it looks like one, `10e-6` and `1e3` included (strings to YAML 1.1); otherwise `text` itself."""
    stripped = text.strip()
    if len(stripped) > _LONGEST_NUMBER or not _NUMBER.fullmatch(stripped):
        return text
    return int(stripped) if re.fullmatch(r"[-+]?\d+", stripped) else float(stripped)


def expression(value: Any) -> str | None:
    """What stands between the parentheses where `value` is an expression; otherwise None."""
    found = _EXPRESSION.fullmatch(value) if isinstance(value, str) else None
    return found[1].replace("\n", " ").strip() if found else None


def evaluate(text: str, names: Mapping[str, Any]) -> Any:
    """The value of an expression: numbers, variables, `+ - * / // ** %`, signs, parentheses, and abs, float, int, max, min, round.

    The result is a finite number; a variable's name alone gives its value as it is, number or not. Raises `ExpressionError`.
    """
    root = _parsed(text)
    if isinstance(root, ast.Name):
        return _variable(root, names)
    try:
        return _value(root, names)
    except RecursionError:
        raise ExpressionError("it is nested too deeply") from None


def substitute(value: Any, names: Mapping[str, Any]) -> Any:
    """`value` with every expression in it, through lists and mappings and their keys, replaced by what it evaluates to."""
    inner = expression(value)
    if inner is not None:
        try:
            return evaluate(inner, names)
        except ExpressionError as error:
            raise ExpressionError(f"{word(value.strip())}: {error}") from None
    if isinstance(value, list):
        return [substitute(v, names) for v in value]
    if isinstance(value, dict):
        keys = [_key(k, names) for k in value]
        twice = next((k for k in keys if keys.count(k) > 1), None) if any(map(expression, value)) else None
        if twice is not None:
            raise ExpressionError(f"{word(twice)} is a key twice")
        return {k: substitute(v, names) for k, v in zip(keys, value.values())}
    return value


def _key(key: Any, names: Mapping[str, Any]) -> Any:
    found = substitute(key, names)
    if isinstance(found, (list, dict)):
        raise ExpressionError(f"{word(key)}: {shown(found)} cannot be a key")
    return found


def check_size(value: Any) -> None:
    """Refuse what grows out of bounds when a list of a variable is used in a list of another, and so on. Raises `ExpressionError`."""
    sizes: dict[int, int] = {}  # by id: shared parts are counted as often as they are used, and visited once

    def size(part: Any) -> int:
        if not isinstance(part, (list, dict)):
            return 1
        if id(part) not in sizes:
            sizes[id(part)] = 1 + sum(map(size, part if isinstance(part, list) else part.values()))
        return sizes[id(part)]

    if size(value) > _MOST:
        raise ExpressionError(f"it holds more than {_MOST} values")


def resolve(variables: Mapping[str, Any], where: Callable[[str], str]) -> dict[str, Any]:
    """`variables` with their expressions evaluated, in whichever order they need each other.

    `where(name)`: FILE:LINE of a variable. Raises `InputError` for unknown names, for cycles and for what does not compute.
    """
    try:
        needs = {name: {n for n in _names_in(value) if n in variables} for name, value in variables.items()}
        order = list(TopologicalSorter(needs).static_order())
    except CycleError as error:
        circle = list(reversed(error.args[1]))
        steps = [word(name) for name in circle]
        told = steps if len(steps) <= 20 else [*steps[:19], "...", steps[-1]]
        raise InputError(f"{where(circle[0])}: {steps[0]} depends on itself: {' -> '.join(told)}") from None
    resolved = dict(variables)  # with those that are still expressions, so that an error can name all variables
    for name in order:
        try:
            resolved[name] = substitute(variables[name], resolved)
            check_size(resolved[name])
        except ExpressionError as error:
            raise InputError(f"{where(name)}: {word(name)}: {error}") from None
    return resolved


def _names_in(value: Any) -> Iterable[str]:
    """Variables that the expressions in `value` use."""
    inner = expression(value)
    if inner is not None:
        try:
            tree = _parsed(inner)
        except ExpressionError:  # told when it is evaluated
            return []
        called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        return [node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and id(node) not in called]
    parts = value if isinstance(value, list) else [*value, *value.values()] if isinstance(value, dict) else []
    return [name for part in parts for name in _names_in(part)]


def _parsed(text: str) -> ast.expr:
    if len(text) > _LONGEST:
        raise ExpressionError(f"it is longer than {_LONGEST} characters")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # as of an invalid escape in a string, which no expression has anyway
            return ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ExpressionError("it is no expression") from None


def _value(node: ast.expr, names: Mapping[str, Any]) -> int | float:
    if isinstance(node, ast.Constant):
        return _number(node.value, "a constant")
    if isinstance(node, ast.Name):
        return _number(_variable(node, names), node.id)
    if isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
        return _UNARY[type(node.op)](_value(node.operand, names))
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        return _computed(_BINARY[type(node.op)], _value(node.left, names), _value(node.right, names))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS and not node.keywords:
        arguments = [_value(a, names) for a in node.args]
        return _computed(_FUNCTIONS[node.func.id], *arguments)
    allowed = f"numbers, variables, + - * / // ** %, parentheses and {', '.join(_FUNCTIONS)}"
    raise ExpressionError(f"{ast.unparse(node)[:60]!r} cannot be computed; an expression is made of {allowed}")


def _variable(node: ast.Name, names: Mapping[str, Any]) -> Any:
    if node.id not in names:
        known = f"; variables are: {listed(names)}" if names else "; there are no variables"
        raise ExpressionError(f"there is no variable {node.id!r}{did_you_mean(node.id, names) or known}")
    return names[node.id]


def _number(value: Any, what: str) -> int | float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ExpressionError(f"{what} is {shown(value)}, which is no number")
    if isinstance(value, int) and value.bit_length() > BITS:
        raise ExpressionError("its numbers are too large")
    return value


def _computed(function: Callable[..., Any], *arguments: int | float) -> int | float:
    try:
        result = function(*arguments)
    except ZeroDivisionError:
        raise ExpressionError("it divides by zero") from None
    except OverflowError:
        raise ExpressionError("its numbers are too large") from None
    except (TypeError, ValueError) as error:
        if isinstance(error, ExpressionError):
            raise
        raise ExpressionError("a function has wrong arguments") from None
    if isinstance(result, complex):
        raise ExpressionError("it takes a root of a negative number")
    if isinstance(result, float) and not math.isfinite(result):
        raise ExpressionError("its numbers are too large")
    return _number(result, "a result")


def _power(base: int | float, exponent: int | float) -> Any:
    """`base ** exponent`, refused where the integer that it makes would be too long."""
    whole = isinstance(base, int) and isinstance(exponent, int)
    if whole and abs(base) > 1 and abs(exponent) * base.bit_length() > BITS:
        raise ExpressionError("its numbers are too large")
    return base**exponent


def _round(value: int | float, *digits: int | float) -> int | float:
    if digits and abs(digits[0]) > _DIGITS:
        raise ExpressionError(f"round() is asked for more than {_DIGITS} digits")
    return round(value, *digits)
