"""A file that grows by a line of JSON per result, so that a killed run loses at most the one it was working on.

The first line is the header: what the results depend on. A line that a kill cut short is dropped when the run goes on.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from utils.errors import InputError
from utils.files import write_text


class MeasuredLog:
    """`header`: the first line. `cells`: the figures so far, by (layer, ratio)."""

    def __init__(self, path: Path, header: dict[str, Any], cells: dict[tuple[str, float], dict[str, Any]]) -> None:
        self.path, self.header, self.cells = path, header, cells

    @staticmethod
    def begin(path: Path, header: dict[str, Any]) -> MeasuredLog:
        """A new file with nothing but the header; an old one is replaced."""
        write_text(path, json.dumps(header) + "\n")
        return MeasuredLog(path, header, {})

    @staticmethod
    def read(path: Path) -> MeasuredLog:
        """The file of an earlier run, made whole; raises `InputError` where it is none."""
        whole, _, torn = path.read_text(encoding="utf-8").rpartition("\n")
        lines = whole.splitlines()
        try:
            header, *rows = [json.loads(line) for line in lines]
            cells = {(row.pop("layer"), row.pop("ratio")): row for row in rows}
        except (ValueError, KeyError, AttributeError):
            raise InputError(f"--resume: {path} is not what sensitivity.py wrote; start a new run") from None
        if torn:
            write_text(path, whole + "\n")
        return MeasuredLog(path, header, cells)

    def add(self, layer: str, ratio: float, figures: dict[str, Any]) -> None:
        """Append one result."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"layer": layer, "ratio": ratio, **figures}) + "\n")
        self.cells[layer, ratio] = figures
