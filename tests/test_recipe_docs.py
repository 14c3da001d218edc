"""docs/recipes.md says what the reader does: its example, its tables and its errors."""

from __future__ import annotations

import re
import shlex
from importlib import import_module

import pytest

from engine.recipe.build import KINDS
from engine.recipe.document import read_recipe, recipe_of
from engine.recipe.modifiers import EpochRangeModifier, GMPruningModifier
from tests.helpers import ROOT
from tests.recipe_texts import error_of, pruning, tag
from utils.flags import Parser

DOCS = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
COMMANDS = sorted(set(re.findall(r"^python (\w+)\.py ([^#\n]+)", DOCS, re.M)))
# Fields that have one value only, or none with an effect, and are not worth a reader's time.
UNSAID = {
    *("constant_logging", "distill_output_keys", "teacher_input_keys", "model_fuse_fn_kwargs", "exclude_module_types", "activation_bits", "strict"),
    *("quantize_embeddings", "quantize_embedding_activations", "quantize_linear_activations", "exclude_batchnorm"),
    *("activation_qconfig_kwargs", "weight_qconfig_kwargs"),
}  # fmt: skip


def test_the_example_is_a_recipe() -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", DOCS, re.S)
    assert recipe_of(text, "docs", "epochs=10").modifiers == (
        GMPruningModifier(0.0, 6.0, init_sparsity=0.05, final_sparsity=0.8, update_frequency=0.5),
        EpochRangeModifier(0.0, 10.0),
    )


def test_every_modifier_and_field_is_told() -> None:
    for name, kind in KINDS.items():
        assert name in DOCS
        assert [field for field in kind.fields if field not in UNSAID and f"`{field}" not in DOCS] == [], name


def test_the_table_of_recipes_lists_those_that_ship() -> None:
    rows = [line for line in DOCS.splitlines() if re.match(r"\| `\w+\.yaml`", line)]
    files = re.findall(r"`(\w+\.yaml)`", " ".join(row.split("|")[1] for row in rows))
    assert sorted(files) == sorted(p.name for p in (ROOT / "recipes").iterdir())
    for row in rows:
        file = re.findall(r"`(\w+\.yaml)`", row)[0]
        for name, value in re.findall(r"`(\w+)` ([\d.e-]+)", row.split("|")[3]):
            text = (ROOT / "recipes" / file).read_text()
            (written,) = re.findall(rf"^{name}: (.+)$", text, re.M)
            assert float(written) == float(value), (file, name)
            read_recipe(str(ROOT / "recipes" / file), f"{name}={value}")


def test_the_errors_are_those_that_are_given() -> None:
    quoted = re.findall(r"^error: (.+)$", DOCS, re.M)
    given = [
        error_of(tag("EpochRangeModifier", "start_epoch: 0", "end_epcoh: 3")),
        error_of("epochs: 3\n" + tag("EpochRangeModifier", "start_epoch: 0", "end_epoch: eval(epoch)")),
        error_of(tag("ACDCPruningModifier", "params: []")),
        error_of(pruning(final_sparsity=80)),
        error_of("epochs: 3\n" + tag("DistillationModifier"), "epoch=3"),
    ]
    assert quoted == [message.replace("r.yaml", "mine.yaml") for message in given]


def test_files_that_are_linked_exist() -> None:
    for name in re.findall(r"\]\(([^)#:]+)\)", DOCS):
        assert (ROOT / "docs" / name).exists(), name


@pytest.mark.parametrize("script,line", COMMANDS)
def test_every_command_parses(script: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Parsed(Exception):
        pass

    original = Parser.parse_args

    def parse(self: Parser, argv: list[str] | None = None) -> None:
        original(self, argv)
        raise Parsed

    monkeypatch.setattr(Parser, "parse_args", parse)
    with pytest.raises(Parsed):
        import_module(script).main(shlex.split(line))
