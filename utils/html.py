"""Self-contained HTML pages: elements whose text is escaped, tables, pictures as data URIs, and the page around them.

A page fetches nothing: its style is the file `page.css` beside this one, its pictures are inside it, and it has no script. What it
says is up to the caller.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from utils.errors import InputError

_VOID = frozenset({"img", "meta", "link", "br", "hr"})
TALL = 24  # a table of more rows scrolls inside its box
QUALITIES, MOST_BYTES = (85, 70, 55, 40), 130_000  # of a JPEG: the first quality at which it is small enough
STYLE = Path(__file__).with_name("page.css")


class Raw(str):
    """Markup: text that `el` puts into its element as it is. Any other text is escaped."""


Child = str | Iterable["Child"] | None


def el(tag: str, *children: Child, **attributes: Any) -> Raw:
    """An element. Children are text (escaped), `Raw` markup, sequences of both, or None; so are attributes' values, which are always escaped.

    `class_` and `data_name` spell `class` and `data-name`. An attribute of None or False is left out, of True stands without a value.

    >>> el("p", "a < b", el("b", "!"), class_="note")
    '<p class="note">a &lt; b<b>!</b></p>'
    """
    written = "".join(_attribute(name, value) for name, value in attributes.items())
    if tag in _VOID:
        return Raw(f"<{tag}{written}>")
    return Raw(f"<{tag}{written}>{markup(children)}</{tag}>")


def markup(*children: Child) -> Raw:
    """Children one after the other, text escaped."""
    parts = []
    for child in children:
        if isinstance(child, str):
            parts.append(child if isinstance(child, Raw) else escape(_printable(child)))
        elif child is not None:
            parts.append(markup(*child))
    return Raw("".join(parts))


def _attribute(name: str, value: Any) -> str:
    if value is None or value is False:
        return ""
    name = name.rstrip("_").replace("_", "-")
    return f" {name}" if value is True else f' {name}="{escape(_printable(str(value)))}"'


def _printable(text: str) -> str:
    """`text` without what no UTF-8 file can hold: a path may carry single bytes of another encoding as surrogates."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def number(value: float, text: str) -> Raw:
    """A figure as `text`, with its exact value beside it for programs."""
    return el("data", text, value=repr(value))


def table(head: Sequence[Child], rows: Iterable[Sequence[Child]], caption: str, class_: str = "") -> Raw:
    """A table in a box of its own, which scrolls where the table is too wide, or too long. The first column names the rows."""
    rows = list(rows)
    header = el("tr", [el("th", cell, scope="col") for cell in head])
    body = [el("tr", el("th", row[0], scope="row"), [el("td", cell) for cell in row[1:]]) for row in rows]
    inner = el("table", el("caption", el("span", caption)), el("thead", header), el("tbody", body), class_=class_ or None)
    return el("div", inner, class_="scroll tall" if len(rows) > TALL else "scroll", tabindex="0", role="region", aria_label=caption)


def picture(image: np.ndarray, alt: str) -> Raw:
    """An `img` of a BGR uint8 picture (H, W, 3), as a JPEG of at most about `MOST_BYTES` inside the page."""
    for quality in QUALITIES:
        ok, encoded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])
        if not ok:
            raise InputError(f"a picture of shape {image.shape} cannot be encoded")
        if len(encoded) <= MOST_BYTES:
            break
    return _img("jpeg", encoded.tobytes(), alt, image.shape[1], image.shape[0])


def picture_file(path: Path, alt: str) -> Raw:
    """An `img` of a PNG file, inside the page."""
    height, width = cv2.imread(str(path)).shape[:2]
    return _img("png", path.read_bytes(), alt, width, height)


def _img(kind: str, content: bytes, alt: str, width: int, height: int) -> Raw:
    source = f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"
    return el("img", src=source, alt=alt, width=width, height=height)


def page(title: str, *body: Child) -> str:
    """The whole document."""
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("title", title),
        el("link", rel="icon", href="data:,"),
        el("style", Raw("\n" + STYLE.read_text(encoding="utf-8"))),
    )
    return "<!doctype html>\n" + el("html", head, "\n", el("body", el("main", *body)), lang="en") + "\n"
