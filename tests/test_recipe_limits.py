"""What reading a recipe must stand: growth without bounds, files that are none, overrides that do not fit, and any damage at all."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from engine.recipe.document import read_recipe, recipe_of
from engine.recipe.modifiers import Recipe
from engine.recipe.writer import to_yaml
from tests.recipe_texts import error_of, pruning, tag
from utils.errors import InputError

RECIPES = Path(__file__).parent.parent / "recipes"

# recipes that would grow without bounds


def lists_of_aliases(leaf: str, key: str, depth: int = 9) -> str:
    """Each list holds ten times the one before it: 10^(depth - 1) leaves."""
    return f"{key}0: &v0 [{leaf}]\n" + "".join(f"{key}{i}: &v{i} [{', '.join([f'*v{i - 1}'] * 10)}]\n" for i in range(1, depth))


LISTS_OF_EXPRESSIONS = "v0: [a]\n" + "".join(f"v{i}: [{', '.join([f'eval(v{i - 1})'] * 10)}]\n" for i in range(1, 9))
BOMBS: list[tuple[str, str, str]] = [
    ("aliases in a field", lists_of_aliases("a", "v") + tag("ConstantPruningModifier", "params: *v8"), "r.yaml:1: more than 100000 values"),
    ("aliases of modifiers", lists_of_aliases("!DistillationModifier ", "modifiers"), "r.yaml:1: more than 100000 values"),
    ("aliases of nothing", lists_of_aliases("", "modifiers"), "r.yaml:1: more than 100000 values"),
    ("lists of expressions", LISTS_OF_EXPRESSIONS + tag("ConstantPruningModifier", "params: eval(v8)"), "r.yaml:6: v5: it holds more than 100000 values"),
    (
        "one field of expressions",
        f"v: [{', '.join(['a'] * 2000)}]\n" + tag("ConstantPruningModifier", f"params: [{', '.join(['eval(v)'] * 60)}]"),
        "r.yaml:4: ConstantPruningModifier: params: it holds more than 100000 values",
    ),
    ("nesting", "x: " + "[" * 2000 + "]" * 2000, "r.yaml: nested too deeply"),
    ("a list within itself", tag("ConstantPruningModifier", "params: &a [*a]"), "r.yaml: nested too deeply"),
    ("a group within itself", "modifiers: &a [*a, *a]", "r.yaml: nested too deeply"),
    ("fields within themselves", tag("DistillationModifier &a", "<<: *a"), "r.yaml: nested too deeply"),
    ("a variable within itself", "x: &x {y: *x}\n" + tag("DistillationModifier"), "r.yaml: nested too deeply"),
    (
        "a number with a letter",
        tag("EpochRangeModifier", "start_epoch: " + "1" * 100_000 + "x", "end_epoch: 3"),
        "r.yaml:3: EpochRangeModifier: start_epoch: '111",
    ),
    ("spaces behind a tag", "modifiers:\n  !A" + " " * 100_000 + "x\n  !B\n", "r.yaml:2: A needs fields"),
    ("an exponent", tag("EpochRangeModifier", "start_epoch: eval(9**9**9**9)", "end_epoch: 3"), "r.yaml:3: EpochRangeModifier: start_epoch: eval(9"),
    ("a long exponent", "a: eval(2**2000)\nb: eval(a*a*a)\n" + tag("DistillationModifier"), "r.yaml:2: b: eval(a*a*a): its numbers are too large"),
]  # fmt: skip


@pytest.mark.parametrize("text,said", [(text, said) for _, text, said in BOMBS], ids=[name for name, _, _ in BOMBS])
def test_what_grows_without_bounds_is_refused(text: str, said: str) -> None:
    assert error_of(text).startswith(said)


NAMES = "x" * 5000, "two\\nlines", "\\e[2J"  # escaped as in YAML's double quotes


@pytest.mark.parametrize("name", NAMES, ids=["long", "lines", "terminal"])
def test_names_that_would_fill_a_message_are_shortened(name: str) -> None:
    around = "\nmodifiers:\n  - !DistillationModifier\n"
    texts = [
        f'"{name}": 1\n"{name}": 2{around}',
        f'"{name}": eval(y){around}',
        f'"{name}": {{a: 1, a: 2}}{around}',
        f'"{name}": {{modifiers: []}}\n"{name}": {{modifiers: []}}{around}',
        f'"{name} modifiers": 3\n',
        f'modifiers:\n  - "{name}"\n',
        f'modifiers:\n  - "{name}": 3\n',
        f'modifiers:\n  - "{name}": {{}}\n',
        f'modifiers:\n  - "{name}": {{x: eval(y)}}\n',
        tag("DistillationModifier", f'"{name}": 3'),
        tag("DistillationModifier", f'hardness: "{name}"'),
        tag("DistillationModifier", f'"{name}": eval(y)'),
        tag("DistillationModifier", f'hardness: "eval({name})"'),
        f'"{name}": 3\n' + tag("DistillationModifier", "hardness: eval(y)"),
    ]
    for text in texts:
        message = error_of(text)
        assert message.isprintable() and len(message) < 500, text
    assert len(error_of("x: 1" + around, f"{'y' * 5000}=3")) < 500


# front matter, files, overrides

MARKDOWN = [
    ("# Title\n\n" + pruning(), "r.yaml: no front matter: in a markdown file the recipe stands between two lines that are --- alone"),
    ("text\n---\n" + pruning() + "text --- more\n", "r.yaml:2: the front matter does not end: a second line that is --- alone is missing"),
    ("---\n" + pruning() + "+++\n", "r.yaml:1: the front matter does not end: a second line that is --- alone is missing"),
    ("---\n---\n", "r.yaml: no recipe: it is empty"),
    ("title\n\n---\n" + pruning(end_epoch="x") + "---\n", "r.yaml:9: GMPruningModifier: end_epoch: 'x' is not an epoch"),
    ("title\n\n---\nmodifiers: [\n---\n", "r.yaml:5: not YAML: "),
    ("title\n\n---\na: 1\nb: \x01\n---\n", "r.yaml:5: not YAML: special characters are not allowed"),
]


@pytest.mark.parametrize("text,said", MARKDOWN, ids=range(len(MARKDOWN)))
def test_broken_front_matter(text: str, said: str) -> None:
    assert error_of(text, markdown=True).startswith(said)


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "pruning.yaml").write_text(pruning())
    (tmp_path / "latin.yaml").write_bytes(b"x: 1\ny: caf\xe9\n")
    (tmp_path / "large.yaml").write_bytes(b"# \n" * 400_000)
    (tmp_path / "r.txt").write_text(pruning())
    wrong = {
        "zoo:cv/detection/yolov5-s": "--recipe zoo:cv/detection/yolov5-s: nothing is downloaded, and SparseML's zoo is closed; give a file",
        "modifiers:\n  - !X\n": "--recipe takes the path of a file, not the text of a recipe",
        f"{tmp_path}/prunning.yaml": f"--recipe: no file {tmp_path}/prunning.yaml; did you mean pruning.yaml",
        f"{tmp_path}": f"--recipe: {tmp_path} is a folder; give a file",
        f"{tmp_path}/r.txt": f"--recipe {tmp_path}/r.txt: a recipe is a .yaml, .yml or .md file",
        f"{tmp_path}/latin.yaml": f"{tmp_path}/latin.yaml:2: not UTF-8 text",
        f"{tmp_path}/large.yaml": f"{tmp_path}/large.yaml: more than 1 MB are no recipe",
        "https://example.com/r.yaml": "--recipe: no file https:/example.com/r.yaml",
    }
    for path, said in wrong.items():
        with pytest.raises(InputError) as error:
            read_recipe(path)
        assert str(error.value).startswith(said) and "\n" not in str(error.value)


def test_a_file_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    file = tmp_path / "r.yaml"
    file.write_text(pruning())
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InputError, match=r"r.yaml: cannot be read \(Permission denied\)"):
        read_recipe(str(file))


ARGS = [
    ("epoch=3", "--recipe-args: r.yaml has no variable 'epoch'; did you mean epochs?; it has epochs, lr"),
    ("modifiers=3", "--recipe-args: r.yaml has no variable 'modifiers'; it has epochs, lr"),
    ("epochs", "--recipe-args: 'epochs' is not NAME=VALUE; several are separated by commas"),
    ("epochs=", "--recipe-args: 'epochs=' is not NAME=VALUE"),
    ("=3", "--recipe-args: '=3' is not NAME=VALUE"),
    ("epochs=3,,lr=1", "--recipe-args: '' is not NAME=VALUE"),
    ("epochs=3,epochs=4", "--recipe-args: epochs is given twice"),
    ("epochs=[1, 2", "--recipe-args: '[1, 2' is not YAML; quote what holds brackets"),
    ('{"epochs": 3', "--recipe-args: not JSON: "),
    ('{"epochs": 3, "lr": 0.1, "epochs": 4}', "--recipe-args: epochs is given twice"),
    ('{"epochs": {"a": 1, "a": 2}}', "--recipe-args: a is given twice"),
    ("{epochs: 3}", "--recipe-args: not JSON: "),
    ("[3]", "--recipe-args: '[3]' is not NAME=VALUE"),
    ("epochs=long", "r.yaml:5: EpochRangeModifier: end_epoch: eval(epochs * 2): epochs is 'long', which is no number"),
    ("epochs=true", "r.yaml:5: EpochRangeModifier: end_epoch: eval(epochs * 2): epochs is true, which is no number"),
    ("epochs=-1", "r.yaml:5: EpochRangeModifier: end_epoch: -2 is not an epoch"),
    ('{"epochs": NaN}', "r.yaml:5: EpochRangeModifier: end_epoch: eval(epochs * 2): its numbers are too large"),
    ("epochs=eval(open('x'))", "r.yaml:1: epochs: eval(open('x')): \"open('x')\" cannot be computed"),
    ("lr=2", "r.yaml:6: SetLearningRateModifier: learning_rate: 2 is not a learning rate above 0 and at most 1"),
]


@pytest.mark.parametrize("args,said", ARGS, ids=[args for args, _ in ARGS])
def test_broken_recipe_args(args: str, said: str) -> None:
    text = (
        "epochs: 3\nlr: &lr 0.1\nmodifiers:\n  - !EpochRangeModifier\n    {start_epoch: 0, end_epoch: eval(epochs * 2)}\n"
        "  - !SetLearningRateModifier {learning_rate: *lr}\n"
    )
    assert error_of(text, args).startswith(said)


@pytest.mark.parametrize("args", ["epochs=0", "epochs=-3", "epochs=words", "epochs=null", "epochs=1e7", "epochs=[]"])
def test_shipped_recipes_refuse_an_impossible_number_of_epochs(args: str) -> None:
    for file in sorted(RECIPES.iterdir()):
        if file.name not in ("guide_gmp.yaml", "guide_qat.yaml"):
            with pytest.raises(InputError, match=rf"{file.name}:\d+: "):
                read_recipe(str(file), args)


def test_a_run_that_is_too_short_for_a_recipe_is_told_how_long_it_must_be() -> None:
    with pytest.raises(InputError) as error:
        read_recipe(str(RECIPES / "gmp_qat.yaml"), "lr=0.1,epochs=1")
    assert str(error.value).endswith("--recipe-args: epochs=1 is too small, this recipe needs epochs of at least 2")
    assert read_recipe(str(RECIPES / "gmp_qat.yaml"), "lr=0.1,epochs=2").epochs == 2
    for wrong in ("lr=2", "sparsity=80", "epochs=2000000"):
        with pytest.raises(InputError) as error:
            read_recipe(str(RECIPES / "gmp_qat.yaml"), wrong)
        assert "too small" not in str(error.value)


# any text at all

WORDS = [
    "eval(",
    ")",
    "*",
    "&a ",
    "*a",
    "!",
    "!A",
    "- ",
    "  ",
    "\n",
    ":",
    "{",
    "}",
    "[",
    "]",
    "'",
    '"',
    "#",
    "<<: ",
    "|",
    "> ",
    "---",
    "\t",
    "1e9",
    "é",
    "\x00",
]


def mutated(rng: random.Random, text: str) -> str:
    """`text` with a few lines or characters removed, doubled, moved or replaced."""
    for _ in range(rng.randint(1, 2)):
        lines = text.splitlines(keepends=True) or ["\n"]
        kind, i, j = rng.randrange(5), rng.randrange(len(lines)), rng.randrange(len(lines))
        at = rng.randrange(len(text) + 1)
        if kind == 0:
            del lines[i]
        elif kind == 1:
            lines.insert(j, lines[i])
        elif kind == 2:
            lines[i], lines[j] = lines[j], lines[i]
        text = "".join(lines) if kind < 3 else text[:at] + rng.choice(WORDS) + text[at + (kind == 4) * rng.randint(0, 3) :]
    return text


def test_random_damage_is_read_or_refused_in_one_line() -> None:
    """Whatever is done to a shipped recipe: it is a recipe that survives being written, or an error of one line. Never another exception."""
    rng = random.Random(4)
    texts = [file.read_text() for file in sorted(RECIPES.iterdir())]
    shortened = ["".join(line for line in text.splitlines(keepends=True) if not line.startswith("#")) for text in texts]
    refused = 0
    for _ in range(1000):
        text = mutated(rng, rng.choice(shortened))
        try:
            recipe = recipe_of(text, "r.yaml")
        except InputError as error:
            assert str(error).startswith("r.yaml") and "\n" not in str(error), (text, str(error))
            refused += 1
        else:
            assert isinstance(recipe, Recipe) and recipe_of(to_yaml(recipe), "r.yaml").modifiers == recipe.modifiers, text
    assert 200 < refused < 950
