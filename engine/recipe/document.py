"""A recipe's file or text as a `Recipe`: variables and overrides, groups of modifiers, stages."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from engine.recipe import build
from engine.recipe.modifiers import EpochRangeModifier, Modifier, QuantizationModifier, Recipe
from engine.recipe.text import Nodes, nodes_of
from engine.recipe.tree import Tagged, Tree, is_merge, is_standard, is_tagged
from engine.recipe.values import ExpressionError, check_size, listed, plain_number, resolve, substitute, word
from utils.errors import InputError, did_you_mean
from utils.files import existing

FLAG, ARGS_FLAG = "--recipe", "--recipe-args"
SUFFIXES = (".yaml", ".yml", ".md")
METADATA = "__metadata__"
_GROUP = "modifiers"
_LARGEST = 1_000_000  # bytes
_FEW, _TRIES = 1000, 10  # numbers up to which, and how many, are tried in search of one that is large enough


@dataclass
class Scope:
    """A recipe's top level or one of its stages. `variables`: name -> (key node, value node); `groups`: (key, value node)."""

    name: str = ""
    variables: dict[str, tuple[yaml.Node, yaml.Node]] = field(default_factory=dict)
    groups: list[tuple[str, yaml.Node]] = field(default_factory=list)


def read_recipe(path: str, args: str = "") -> Recipe:
    """The recipe in a .yaml, .yml or .md file, with the variables that `args` overrides. Raises `InputError`."""
    if path.startswith("zoo:"):
        raise InputError(f"{FLAG} {path}: nothing is downloaded, and SparseML's zoo is closed; give a file, such as recipes/gmp.yaml")
    if "\n" in path:
        raise InputError(f"{FLAG} takes the path of a file, not the text of a recipe")
    file = existing(path, FLAG)
    if file.suffix.lower() not in SUFFIXES:
        raise InputError(f"{FLAG} {path}: a recipe is a {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file")
    return recipe_of(_text(file), str(path), args, is_markdown(path))


def is_markdown(path: str) -> bool:
    """Whether the recipe in a file stands in its front matter."""
    return path.lower().endswith(".md")


def _text(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            content = stream.read(_LARGEST + 1)
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})") from None
    if len(content) > _LARGEST:
        raise InputError(f"{file}: more than {_LARGEST / 1e6:g} MB are no recipe")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{file}:{content[: error.start].count(10) + 1}: not UTF-8 text") from None


def recipe_of(text: str, source: str, args: str = "", markdown: bool = False) -> Recipe:
    """The recipe in `text`, which came from `source` (named in messages); `markdown`: in its front matter. Raises `InputError`."""
    try:
        nodes, overrides = nodes_of(text, source, markdown), overrides_of(args)
        reading = _Reading(nodes, overrides)
        try:
            recipe = reading.recipe()
        except InputError as error:
            raise InputError(f"{error}{_too_small(nodes, overrides)}") from None
        idle = tuple(
            f"{ARGS_FLAG}: {word(name)} changes nothing: no modifier uses it, or it is that already"
            for name in _idle(nodes, overrides, recipe)
        )
        return replace(recipe, notes=(*recipe.notes, *idle))
    except RecursionError:  # an alias within itself, too
        raise InputError(f"{source}: nested too deeply") from None


def _too_small(nodes: Nodes, overrides: Mapping[str, Any]) -> str:
    """Which override of a recipe that cannot be read is to blame, where a somewhat larger number would do: most likely a number of epochs."""
    for name, value in overrides.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < _FEW:
            continue
        for least in range(math.floor(value) + 1, math.floor(value) + 1 + _TRIES):
            try:
                _Reading(nodes, {**overrides, name: least}).recipe()
            except InputError:
                continue
            return f"; {ARGS_FLAG}: {word(name)}={value} is too small, this recipe needs {word(name)} of at least {least}"
    return ""


def _idle(nodes: Nodes, overrides: Mapping[str, Any], recipe: Recipe) -> Iterator[str]:
    """Names of overrides without which the recipe would say the same."""
    for name in overrides:
        others = {other: value for other, value in overrides.items() if other != name}
        try:
            if _Reading(nodes, others).recipe() == recipe:
                yield name
        except InputError:  # so it is needed
            continue


def overrides_of(args: str | None) -> dict[str, Any]:
    """Variables of `--recipe-args`: a JSON object, or `a=1,b=2`, where `:` may stand for `=`."""
    text = (args or "").strip()
    if not text:
        return {}
    if text.startswith("{"):
        try:
            return _numbers(json.loads(text, object_pairs_hook=_once))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{ARGS_FLAG}: not JSON: {error}") from None
    found: dict[str, Any] = {}
    for part in _parts(text):
        at = min((part.index(sign) for sign in "=:" if sign in part), default=0)
        name, value = part[:at].strip(), part[at + 1 :].strip()
        if not name or not value:
            raise InputError(f"{ARGS_FLAG}: {part.strip()!r} is not NAME=VALUE; several are separated by commas")
        if name in found:
            raise InputError(f"{ARGS_FLAG}: {word(name)} is given twice")
        found[name] = _typed(value)
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, of whose keys each stands there once."""
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise InputError(f"{ARGS_FLAG}: {word(next(name for name in names if names.count(name) > 1))} is given twice")
    return made


def _parts(text: str) -> Iterator[str]:
    """`text` cut at commas that stand in no brackets."""
    depth, begin = 0, 0
    for i, char in enumerate(text):
        depth += (char in "([{") - (char in ")]}")
        if char == "," and depth <= 0:
            yield text[begin:i]
            begin = i + 1
    yield text[begin:]


def _typed(text: str) -> Any:
    """A value as YAML would read it; what it cannot read is a string, but for what begins as a list or mapping."""
    try:
        nodes = nodes_of(text, ARGS_FLAG)
        return Tree(nodes).value(nodes.root, ARGS_FLAG) if nodes.root is not None else text
    except (InputError, RecursionError):
        if text[0] in "[{":
            raise InputError(f"{ARGS_FLAG}: {text!r:.80} is not YAML; quote what holds brackets, as in ['re:model[.]1']") from None
        return text


def _numbers(value: Any) -> Any:
    if isinstance(value, list):
        return [_numbers(v) for v in value]
    if isinstance(value, dict):
        return {k: _numbers(v) for k, v in value.items()}
    return plain_number(value) if isinstance(value, str) else value


class _Reading:
    """One recipe being read."""

    def __init__(self, nodes: Nodes, overrides: Mapping[str, Any]) -> None:
        self.nodes, self.overrides = nodes, overrides
        self.notes: list[str] = list(nodes.notes)
        self.idle: list[Tagged] = []  # modifiers that are known and have nothing to do
        self.stages: list[Scope] = []
        self.top = Scope()
        self.tree = Tree(nodes)
        self._find_scopes()
        self._override()

    def recipe(self) -> Recipe:
        """The whole recipe, checked as one."""
        staged = [self._modifiers(scope) for scope in self.stages]
        order = sorted(range(len(staged)), key=lambda i: _edges(staged[i]))
        modifiers = [*self._modifiers(self.top), *(m for i in order for m in staged[i])]
        if not modifiers and self.idle:
            raise InputError(f"{self.idle[0].where}: {self.idle[0].name} has no effect here, and the recipe has no other modifier")
        if not modifiers:
            raise InputError(f"{self.nodes.source}: no modifiers; they stand as a list under a key with 'modifiers' in its name")
        twice = [m for m in modifiers if isinstance(m, QuantizationModifier)][1:]
        if twice:
            raise InputError(f"{twice[0].where}: a second QuantizationModifier: a network cannot be quantised twice")
        recipe = Recipe(tuple(modifiers), self.nodes.source, tuple(self.notes))
        if recipe.epochs is not None and recipe.epochs < 1:
            where = recipe.of(EpochRangeModifier)[0].where
            raise InputError(f"{where}: EpochRangeModifier: end_epoch: the recipe's run has no epoch")
        return recipe

    def _find_scopes(self) -> None:
        root = self.nodes.root
        if root is None or (isinstance(root, yaml.ScalarNode) and not is_tagged(root)):
            what = "it is empty" if root is None or root.value in ("", "~", "null") else f"it holds the words {root.value!r:.40}"
            raise InputError(f"{self.nodes.source}: no recipe: {what}")
        if isinstance(root, yaml.MappingNode) and not is_tagged(root) and not _tagged_keys(root):
            self._fill(self.top, root, stages=True)
        else:
            self.top.groups.append(("", root))

    def _fill(self, scope: Scope, node: yaml.MappingNode, stages: bool) -> None:
        for name, key, value in self.tree.pairs(node):
            if name == METADATA:
                continue
            if is_merge(key):
                raise InputError(f"{self.nodes.where(key)}: << is read within a modifier, and not here")
            if _GROUP in name.lower():
                scope.groups.append((name, value))
            elif stages and _is_stage(value):
                if name in (s.name for s in self.stages):
                    raise InputError(f"{self.nodes.where(key)}: the stage {word(name)} is given twice")
                stage = Scope(name)
                self._fill(stage, value, stages=False)
                self.stages.append(stage)
            elif name in scope.variables:
                raise InputError(f"{self.nodes.where(key)}: {word(name)} is given twice")
            else:
                scope.variables[name] = key, value

    def _override(self) -> None:
        """Let the overrides take the place of the values that are defined under their names, for all aliases of these too."""
        scopes = [self.top, *self.stages]
        known = list(dict.fromkeys(name for scope in scopes for name in scope.variables))
        for name in self.overrides:
            if name not in known:
                has = f"it has {listed(known)}" if known else "it has none"
                raise InputError(f"{ARGS_FLAG}: {self.nodes.source} has no variable {name!r:.80}{did_you_mean(name, known)}; {has}")
        replaced = {}
        for scope in scopes:
            for name in self.overrides.keys() & scope.variables.keys():
                key, value = scope.variables[name]
                if value.start_mark.index > key.start_mark.index:  # otherwise an alias, and what it stands for keeps its value
                    replaced[id(value)] = self.overrides[name]
        self.tree = Tree(self.nodes, replaced)

    def _values(self, scope: Scope) -> dict[str, Any]:
        """Variables that a scope sees, evaluated: its own before the top level's, which were evaluated without them."""
        outer = {} if scope is self.top else self._values(self.top)
        own = {name: self.overrides.get(name, self.tree.value(value, word(name))) for name, (_, value) in scope.variables.items()}
        seen = {**self.top.variables, **scope.variables}
        return resolve({**outer, **own}, lambda name: self.nodes.where(seen[name][0]))

    def _modifiers(self, scope: Scope) -> list[Modifier]:
        values = self._values(scope)
        made = []
        for key, group in scope.groups:
            for tagged in self._tagged(group, key):
                modifier, notes = build.modifier(_evaluated(tagged, values))
                self.notes += notes
                if modifier is None:
                    self.idle.append(tagged)
                else:
                    made.append(modifier)
        return made

    def _tagged(self, node: yaml.Node, key: str) -> Iterator[Tagged]:
        """The tagged objects of a group: of a list, however nested; of a mapping from names or tags to fields; or the one that it is."""
        self.tree.count(node)
        if is_tagged(node):
            yield self.tree.tagged(node)
        elif not is_standard(node):
            raise InputError(
                f"{self.nodes.where(node)}: {word(key)}: {node.tag:.60} is no modifier; one is written !Name, with its fields below"
            )
        elif isinstance(node, yaml.SequenceNode):
            for item in node.value:
                yield from self._tagged(item, key)
        elif isinstance(node, yaml.MappingNode):
            for name, body in node.value:
                yield self.tree.tagged(name, body)
        elif node.value not in ("", "null", "~"):
            raise InputError(
                f"{self.nodes.where(node)}: {word(key)}: {node.value!r:.60} is no modifier; one is written !Name, with its fields below"
            )


def _evaluated(tagged: Tagged, values: Mapping[str, Any]) -> Tagged:
    fields = {}
    for name, value in tagged.fields.items():
        try:
            fields[name] = substitute(value, values)
            check_size(fields[name])
        except ExpressionError as error:
            raise InputError(f"{tagged.lines[name]}: {word(tagged.name)}: {word(name)}: {error}") from None
    return Tagged(tagged.name, fields, tagged.where, tagged.lines)


def _is_stage(node: yaml.Node) -> bool:
    pairs = node.value if isinstance(node, yaml.MappingNode) and not is_tagged(node) else []
    return any(isinstance(key, yaml.ScalarNode) and not is_tagged(key) and _GROUP in key.value.lower() for key, _ in pairs)


def _tagged_keys(node: yaml.MappingNode) -> bool:
    return bool(node.value) and all(is_tagged(key) for key, _ in node.value)


def _edges(modifiers: list[Modifier]) -> tuple[float, float]:
    """When a stage is over and when it begins: by its last end (of what never ends, its start), then by its first start."""
    ends = [max(m.end_epoch, m.start) for m in modifiers]
    return max(ends, default=math.inf), min((m.start for m in modifiers), default=math.inf)
