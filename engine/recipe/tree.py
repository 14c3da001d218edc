"""YAML nodes of a recipe as plain values and tagged objects, with the file's lines. Only standard scalars, lists and mappings are made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml
from yaml.constructor import ConstructorError, SafeConstructor

from engine.recipe.text import Nodes
from engine.recipe.values import BITS, plain_number, shown, word
from utils.errors import InputError

_STANDARD = "tag:yaml.org,2002:"
_MERGE = _STANDARD + "merge"
_SCALARS = {_STANDARD + kind for kind in ("null", "bool", "int", "float", "str", "timestamp", "value")}
_MOST = 100_000  # values of a recipe, with aliases written out


@dataclass(frozen=True)
class Tagged:
    """One `!name` with its fields, expressions unevaluated. `where`: FILE:LINE of the tag; `lines`: of each field."""

    name: str
    fields: Mapping[str, Any]
    where: str
    lines: Mapping[str, str]


class Tree:
    """Reads nodes. `replaced`: by `id` of a node, the value that it and all its aliases have instead of their own."""

    def __init__(self, nodes: Nodes, replaced: Mapping[int, Any] | None = None) -> None:
        self.nodes = nodes
        self.replaced = replaced or {}
        self._made = 0
        self._constructor = SafeConstructor()

    def pairs(self, node: yaml.MappingNode) -> Iterator[tuple[str, yaml.Node, yaml.Node]]:
        """(key, its node, the value's node) of a mapping whose keys are plain words, duplicates included."""
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode) or is_tagged(key):
                raise InputError(f"{self.nodes.where(key)}: a key must be a name")
            yield key.value, key, value

    def value(self, node: yaml.Node, place: str) -> Any:
        """The plain value of a node; strings that look like numbers are numbers. `place`: the key that it stands under, for errors."""
        self.count(node)
        if id(node) in self.replaced:
            return self.replaced[id(node)]
        if is_tagged(node):
            raise InputError(f"{self.nodes.where(node)}: !{tag_name(node)} stands under {place!r}, a key without 'modifiers' in its name")
        if isinstance(node, yaml.SequenceNode) and node.tag == _STANDARD + "seq":
            return [self.value(v, place) for v in node.value]
        if isinstance(node, yaml.MappingNode) and node.tag == _STANDARD + "map":
            return self._mapping(node, place)[0]
        if isinstance(node, yaml.ScalarNode) and node.tag in _SCALARS:
            return self._scalar(node, place)
        raise InputError(
            f"{self.nodes.where(node)}: {place}: a value of type !!{node.tag.removeprefix(_STANDARD)} has no place in a recipe"
        )

    def tagged(self, tag: yaml.Node, body: yaml.Node | None = None) -> Tagged:
        """The tagged object `!Name {fields}`; or, with `body`, the one whose key is `tag` and whose fields are `body`."""
        name = tag_name(tag) if is_tagged(tag) else str(tag.value)
        where = self.nodes.where(tag)
        if body is None:
            body = tag
        elif is_tagged(body):
            raise InputError(f"{where}: {word(name)}: !{tag_name(body)} stands behind a name; a modifier is written - !{tag_name(body)}")
        elif isinstance(tag, yaml.ScalarNode) and is_tagged(tag) and tag.value:
            raise InputError(f"{where}: {word(name)} has {tag.value!r:.60} behind it; its fields stand on lines of their own")
        if isinstance(body, yaml.ScalarNode) and body.value in ("", "null", "~"):
            return Tagged(name, {}, where, {})
        if not isinstance(body, yaml.MappingNode) or not (body is tag or body.tag == _STANDARD + "map"):
            raise InputError(f"{where}: {word(name)} needs fields, as in start_epoch: 0.0")
        fields, lines = self._mapping(body, word(name))
        return Tagged(name, fields, where, lines)

    def _mapping(self, node: yaml.MappingNode, place: str) -> tuple[dict[Any, Any], dict[Any, str]]:
        """Values and lines by key; `<<` adds what is not there."""
        made: dict[Any, Any] = {}
        lines: dict[Any, str] = {}
        merged: list[tuple[dict[Any, Any], str]] = []
        for key, value in node.value:
            self.count(key)
            if key.tag == _MERGE:
                merged += [(part, self.nodes.where(key)) for part in self._merged(value, place)]
                continue
            if not isinstance(key, yaml.ScalarNode) or is_tagged(key):
                raise InputError(f"{self.nodes.where(key)}: {place}: a key must be a name or a number")
            name = self.replaced[id(key)] if id(key) in self.replaced else self._scalar(key, place)
            if isinstance(name, (list, dict)):
                raise InputError(
                    f"{self.nodes.where(key)}: {place}: a key must be a name or a number, and an override makes it {shown(name)}"
                )
            if name in made:
                raise InputError(f"{self.nodes.where(key)}: {place}: {word(key.value)} is given twice")
            made[name] = self.value(value, f"{place}: {word(key.value)}")
            lines[name] = self.nodes.where(key)
        for part, where in merged:
            for name, value in part.items():
                made.setdefault(name, value)
                lines.setdefault(name, where)
        return made, lines

    def _merged(self, node: yaml.Node, place: str) -> list[dict[Any, Any]]:
        """The mappings that `<<` names; of another modifier, its fields."""
        parts = node.value if isinstance(node, yaml.SequenceNode) and not is_tagged(node) else [node]
        made = []
        for part in parts:
            plain = id(part) in self.replaced or not isinstance(part, yaml.MappingNode)
            made.append(self.value(part, place) if plain else self._mapping(part, place)[0])
        if not all(isinstance(part, dict) for part in made):
            raise InputError(f"{self.nodes.where(node)}: {place}: << takes a mapping")
        return made

    def _scalar(self, node: yaml.ScalarNode, place: str) -> Any:
        kind = node.tag.removeprefix(_STANDARD)
        if kind in ("timestamp", "value") or (kind in ("int", "float") and ":" in node.value):
            return node.value  # `2:4` is a mask to its reader, and 124 in YAML 1.1's sexagesimal numbers
        if kind == "str":
            return plain_number(node.value)
        try:
            made = self._constructor.construct_object(node)
        except (ValueError, KeyError, IndexError, ConstructorError):
            raise InputError(f"{self.nodes.where(node)}: {place}: {node.value!r:.60} is no {kind}") from None
        if isinstance(made, int) and made.bit_length() > BITS:
            raise InputError(f"{self.nodes.where(node)}: {place}: {node.value!r:.60} is too large a number")
        return made

    def count(self, node: yaml.Node) -> None:
        """Take note of one more value, and refuse a recipe of too many: aliases of lists of aliases grow without bounds."""
        self._made += 1
        if self._made > _MOST:
            raise InputError(f"{self.nodes.where(node)}: more than {_MOST} values; aliases within aliases?")


def is_merge(key: yaml.Node) -> bool:
    """Whether a key is YAML's `<<`."""
    return key.tag == _MERGE


def is_standard(node: yaml.Node) -> bool:
    """Whether a node has no tag, or one of the plain lists, mappings and scalars."""
    return node.tag in _SCALARS or node.tag in (_STANDARD + "seq", _STANDARD + "map")


def is_tagged(node: yaml.Node) -> bool:
    """Whether a node carries a tag of its own, as a modifier does."""
    return node.tag.startswith("!")


def tag_name(node: yaml.Node) -> str:
    """The class that a tag names: without `!`, a colon glued to it and SparseML's `pytorch.`."""
    return node.tag.removeprefix("!").removesuffix(":").removeprefix("pytorch.")
