"""The text of a recipe as YAML nodes: front matter is cut out, and tags without dashes are read as what they mean.

Nodes rather than values, because they keep lines, duplicate keys and which values are aliases of which. Nothing is constructed from them here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import yaml
from yaml.reader import ReaderError

from utils.errors import InputError

FENCES = ("---", "+++")
_TAG_LINE = re.compile(r"(?P<indent>[ ]*)(?P<tag>![A-Za-z_][\w.]*)(?:[ ]*:)?(?P<rest>(?:[ \t].*)?)")
_RESTS = ("", "#", "{")  # what may begin behind a tag: nothing, a comment, fields in braces


@dataclass(frozen=True)
class Nodes:
    """A recipe's YAML. `root`: None where there is none. `offset`: lines of the file above its first. `notes`: what was normalised."""

    root: yaml.Node | None
    source: str
    offset: int = 0
    notes: tuple[str, ...] = ()

    def where(self, node: yaml.Node) -> str:
        """FILE:LINE of a node, in the file as it is."""
        return f"{self.source}:{node.start_mark.line + 1 + self.offset}"


def nodes_of(text: str, source: str, markdown: bool = False) -> Nodes:
    """The YAML of a recipe: all of `text`, or the front matter of a markdown file.

    Tags without dashes under a group, as in `!A` and below it `!B`, are no YAML: only where the text as it is cannot be read, a dash is put before
    them. If that does not help either, the `InputError` tells what is wrong with the text as it is, and in which line.
    """
    offset = 0
    if markdown:
        text, offset = front_matter(text, source)
    text = text.removeprefix("\ufeff")
    try:
        return Nodes(_composed(text), source, offset)
    except (yaml.YAMLError, RecursionError) as error:
        normalised = dashed(text)
        if normalised == text:
            raise InputError(_told(error, text, source, offset)) from None
        try:
            root = _composed(normalised)
        except (yaml.YAMLError, RecursionError):
            raise InputError(_told(error, text, source, offset)) from None
        return Nodes(root, source, offset, (f"{source}: tags without dashes were read as list items",))


def front_matter(text: str, source: str) -> tuple[str, int]:
    """What stands between the first line that is `---` (or `+++`) alone and the next such line, and how many lines stand above it.

    Dashes within a line, as in a value or in a comment's rule, end nothing. Raises `InputError` where there are no two such lines.
    """
    lines = text.splitlines(keepends=True)
    bare = [line.rstrip().removeprefix("\ufeff") for line in lines]
    begin = next((i for i, line in enumerate(bare) if line in FENCES), None)
    if begin is None:
        raise InputError(f"{source}: no front matter: in a markdown file the recipe stands between two lines that are --- alone")
    end = next((i for i in range(begin + 1, len(bare)) if bare[i] == bare[begin]), None)
    if end is None:
        raise InputError(f"{source}:{begin + 1}: the front matter does not end: a second line that is {bare[begin]} alone is missing")
    return "".join(lines[begin + 1 : end]), begin + 1


def dashed(text: str) -> str:
    """`text` with `- ` before each tag that begins a line; its lines stay where they are.

    Fields that stand no deeper than their tag move two columns to the right with it.
    """
    out: list[str] = []
    lines = text.splitlines()
    tag_indent, shift = -1, ""  # of the tag whose body we are in
    for i, line in enumerate(lines):
        tag = _TAG_LINE.fullmatch(line)
        indent = len(line) - len(line.lstrip(" "))
        if tag and tag["rest"].strip()[:1] in _RESTS:
            tag_indent = indent
            shift = "  " if indent and _first_indent(lines[i + 1 :]) == indent else ""
            out.append(f"{tag['indent']}- {tag['tag']}{tag['rest'].rstrip()}")
            continue
        if line.strip() and (indent < tag_indent or line.lstrip().startswith("- !")):
            tag_indent, shift = -1, ""
        out.append(shift + line if line.strip() else line)
    return "\n".join(out) + "\n" if text.endswith("\n") else "\n".join(out)


def _first_indent(lines: list[str]) -> int:
    """Indentation of the first line with content; -1 where that is a tag or a list item, or nothing follows."""
    first = next((line for line in lines if line.strip() and not line.lstrip().startswith("#")), "")
    return -1 if not first or first.lstrip()[0] in "!-" else len(first) - len(first.lstrip(" "))


def _composed(text: str) -> yaml.Node | None:
    return yaml.compose(text, Loader=yaml.SafeLoader)


def _told(error: Exception, text: str, source: str, offset: int) -> str:
    if isinstance(error, RecursionError):
        return f"{source}: nested too deeply"
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    if mark:
        line = f":{mark.line + 1 + offset}"
    else:  # a character that YAML forbids has a position alone
        line = f":{text[: error.position].count(chr(10)) + 1 + offset}" if isinstance(error, ReaderError) else ""
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error).splitlines()[0]
    context = getattr(error, "context", None)
    return f"{source}{line}: not YAML: {problem}{f' ({context})' if context else ''}"
