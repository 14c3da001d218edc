"""Numbers and arithmetic in recipes: against Python's own, and what must be refused."""

from __future__ import annotations

import random
from typing import Any

import pytest

from engine.recipe.values import ExpressionError, evaluate, expression, plain_number, resolve, substitute
from utils.errors import InputError


@pytest.mark.parametrize(
    "text,value",
    [
        ("10e-6", 1e-5), ("1e-5", 1e-5), ("1e3", 1000.0), ("1.e5", 1e5), ("1.e-5", 1e-5), (".5", 0.5), ("5.", 5.0), ("-1e-2", -0.01), ("+2", 2),
        ("7", 7), (" 1e-5 ", 1e-5), ("1E+2", 100.0),
    ],
)  # fmt: skip
def test_what_looks_like_a_number_is_one(text: str, value: float) -> None:
    found = plain_number(text)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("text", ["", ".", "e5", "1e", "2:4", "1_000", "nan", "inf", "0x10", "1.2.3", "model.0", "- 1", "9" * 400])
def test_other_text_stays_text(text: str) -> None:
    assert plain_number(text) is text


@pytest.mark.parametrize(
    "value,inner",
    [
        ("eval(a)", "a"), ("  eval( a * (b + 1) ) ", "a * (b + 1)"), ("eval(a\n + b)", "a  + b"), ("eval (a)", "a"), ("eval()", ""),
        ("a", None), ("x eval(a)", None), ("eval(a) + 1", None), ("evaluate(a)", None), (5, None), (None, None), (["eval(a)"], None),
    ],
)  # fmt: skip
def test_expressions_are_whole_values(value: Any, inner: str | None) -> None:
    assert expression(value) == inner


def random_expression(rng: random.Random, names: list[str], depth: int = 4) -> str:
    if depth == 0 or rng.random() < 0.2:
        return rng.choice([*names, str(rng.randint(0, 20)), f"{rng.uniform(0, 3):.3f}", "1e-3", ".5"])

    def part() -> str:
        return random_expression(rng, names, depth - 1)

    kind = rng.randrange(6)
    if kind < 3:
        space = rng.choice(["", " "])
        return f"{part()}{space}{rng.choice(['+', '-', '*', '/', '//', '%', '**'])}{space}{part()}"
    if kind == 3:
        return f"({part()})"
    if kind == 4:
        return f"{rng.choice('+-')}{part()}"
    function = rng.choice(["abs", "float", "int", "max", "min", "round"])
    return f"{function}({part()}, {part()})" if function in ("max", "min") else f"{function}({part()})"


def test_arithmetic_is_pythons_own() -> None:
    """On random expressions, precedence and signs included; where Python has no finite number, there is an error."""
    rng = random.Random(1)
    names = {"a": 3, "b": 0.25, "epochs": 50, "_start": 0}
    computed = 0
    for _ in range(4000):
        text = random_expression(rng, list(names))
        try:
            ours = evaluate(text, names)
        except ExpressionError as error:
            assert str(error).split()[:2] in (["it", "divides"], ["its", "numbers"], ["it", "takes"], ["a", "function"]), (text, error)
            if "large" in str(error) or "wrong arguments" in str(error):
                continue  # a power that is refused would take Python long
            with pytest.raises((ZeroDivisionError, TypeError, AssertionError)):
                value = eval(text, {}, dict(names))
                assert not isinstance(value, complex)
        else:
            value = eval(text, {}, dict(names))
            assert (ours, type(ours)) == (value, type(value)), text
            computed += 1
    assert computed > 2000


@pytest.mark.parametrize(
    "text,value",
    [
        ("-1", -1), ("a * -1", -3), ("+a", 3), ("--a", 3), ("2 ** -1", 0.5), ("-2 ** 2", -4), ("2 ** 3 ** 2", 512), ("7 // 2", 3), ("-7 // 2", -4),
        ("round(a / 2, 1)", 1.5), ("round(2.567, 2)", 2.57), ("max(1, a, 2)", 3), ("int(a * 0.5)", 1), ("a", 3), ("round(1250, -2)", 1200),
    ],
)  # fmt: skip
def test_values(text: str, value: float) -> None:
    found = evaluate(text, {"a": 3})
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("value", ["block4", [1, 4], None, True, {"a": 1}, 0.5])
def test_a_name_alone_gives_its_value_whatever_it_is(value: Any) -> None:
    assert evaluate("mask", {"mask": value}) == value


REFUSED = [
    ("a == 1", "'a == 1' cannot be computed"),
    ("a < b", "'a < b' cannot be computed"),
    ("a and b", "'a and b' cannot be computed"),
    ("not a", "'not a' cannot be computed"),
    ("~3", "'~3' cannot be computed"),
    ("1 << 9", "'1 << 9' cannot be computed"),
    ("a[0] + 1", "'a[0]' cannot be computed"),
    ("a.real", "'a.real' cannot be computed"),
    ("[1, 2]", "'[1, 2]' cannot be computed"),
    ("lambda: 1", "'lambda: 1' cannot be computed"),
    ("(1).__class__", "'1 .__class__' cannot be computed"),
    ("__import__('os')", "\"__import__('os')\" cannot be computed"),
    ("open('x')", "\"open('x')\" cannot be computed"),
    ("round(a, ndigits=1)", "'round(a, ndigits=1)' cannot be computed"),
    ("max(*a)", "'*a' cannot be computed"),
    ("x if a else b", "'x if a else b' cannot be computed"),
    ("'text'", "a constant is 'text', which is no number"),
    ("True + 1", "a constant is true, which is no number"),
    ("1j", "a constant is 1j, which is no number"),
    ("flag * 2", "flag is true, which is no number"),
    ("text * 2", "text is 'x', which is no number"),
    ("c + 1", "there is no variable 'c'; variables are: a, b, flag, text, num_epochs"),
    ("num_epoch + 1", "there is no variable 'num_epoch'; did you mean num_epochs?"),
    ("min", "there is no variable 'min'"),
    ("", "it is no expression"),
    ("a +", "it is no expression"),
    ("a) + (b", "it is no expression"),
    ("a; b", "it is no expression"),
    ("a\0", "it is no expression"),
    ("1 / 0", "it divides by zero"),
    ("a % 0", "it divides by zero"),
    ("0 ** -1", "it divides by zero"),
    ("(-8) ** 0.5", "it takes a root of a negative number"),
    ("1e308 * 10", "its numbers are too large"),
    ("9 ** 9 ** 9", "its numbers are too large"),
    ("2 ** 5000", "its numbers are too large"),
    ("1e300 ** 2", "its numbers are too large"),
    ("(2 ** 3000) * (2 ** 3000)", "its numbers are too large"),
    ("round(5, -1000000000)", "round() is asked for more than 100 digits"),
    ("round(5, 1.5)", "a function has wrong arguments"),
    ("max(1)", "a function has wrong arguments"),
    ("abs()", "a function has wrong arguments"),
    ("round()", "a function has wrong arguments"),
    ("1" + " + 1" * 400, "it is longer than 1000 characters"),
    ("(" * 400 + "1" + ")" * 400, "it is no expression"),
]  # fmt: skip


@pytest.mark.parametrize("text,said", REFUSED, ids=lambda v: v[:24])
def test_what_cannot_be_computed_says_so(text: str, said: str) -> None:
    names = {"a": 3, "b": 2, "flag": True, "text": "x", "num_epochs": 5}
    with pytest.raises(ExpressionError) as error:
        evaluate(text, names)
    assert str(error.value).startswith(said)


def test_substitution_goes_through_lists_mappings_and_keys_and_leaves_the_rest() -> None:
    value = {"eval(a)": ["eval(a + 1)", {"x": "eval(mask)"}, "plain", 5, None], "y": "eval"}
    assert substitute(value, {"a": 1, "mask": "block4"}) == {1: [2, {"x": "block4"}, "plain", 5, None], "y": "eval"}


def where(name: str) -> str:
    return f"r.yaml:{name}"


def test_variables_resolve_in_any_order() -> None:
    """A chain of variables gives the same in every order of its lines."""
    chain = {"a": "eval(b + 1)", "b": "eval(c * 2)", "c": "eval(d)", "d": 3, "e": ["eval(a)", "eval(b)"], "f": "word"}
    rng = random.Random(2)
    for _ in range(20):
        items = list(chain.items())
        rng.shuffle(items)
        found = resolve(dict(items), where)
        assert found == {"a": 7, "b": 6, "c": 3, "d": 3, "e": [7, 6], "f": "word"} and list(found) == [name for name, _ in items]


def test_a_long_chain_resolves() -> None:
    chain: dict[str, Any] = {f"v{i}": f"eval(v{i + 1} + 1)" for i in range(3000)}
    assert resolve({**chain, "v3000": 0}, where)["v0"] == 3000


@pytest.mark.parametrize(
    "variables,said",
    [
        ({"a": "eval(a)"}, "r.yaml:a: a depends on itself: a -> a"),
        ({"a": "eval(b)", "b": "eval(a)"}, "r.yaml:a: a depends on itself: a -> b -> a"),
        ({"x": 1, "a": "eval(y)"}, "r.yaml:a: a: eval(y): there is no variable 'y'; variables are: x, a"),
        ({"one": 1, "a": "eval(ones)"}, "r.yaml:a: a: eval(ones): there is no variable 'ones'; did you mean one?"),
        ({"one": 0, "a": "eval(1 / one)"}, "r.yaml:a: a: eval(1 / one): it divides by zero"),
    ],
)
def test_variables_that_do_not_resolve(variables: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as error:
        resolve(variables, where)
    assert str(error.value) == said


def test_signs_may_pile_up() -> None:
    assert evaluate("-" * 301 + "1", {}) == -1
