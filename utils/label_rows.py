"""The rows of a label file: boxes and polygons, and what makes a row a bad one.

Pure functions of text. Which file is read, and what becomes of an image with bad rows, belongs to `utils.labels`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def parse_labels(text: str) -> tuple[np.ndarray, str]:
    """Parse a label file to float32 (n, 5) [class, cx, cy, w, h] and a note on what was mended (empty if nothing was).

    If any row has more than 6 columns, every row is a polygon `class x y x y ...` and becomes its bounding box; else
    every row is a box. Duplicate rows are removed, which sorts the rest. Raises ValueError with the reason if any row
    is bad.
    """
    lines = [line.split() for line in text.splitlines() if line.strip()]
    if not lines:
        return np.zeros((0, 5), np.float32), ""
    polygons = any(len(line) > 6 for line in lines)
    with np.errstate(over="ignore", invalid="ignore"):  # what is too large becomes infinite, which `_check_rows` refuses
        rows = _polygon_rows(lines) if polygons else _box_rows(lines)
    rows += 0  # makes -0 a 0: its inverse must not be below 0
    _check_rows(rows)

    notes = []
    if polygons and (boxes := sum(len(line) == 5 for line in lines)):
        notes.append(f"{boxes} rows of 5 columns among polygons were read as two points each; write them as polygons")
    unique = np.unique(rows, axis=0)
    if len(unique) < len(rows):
        notes.append(f"{len(rows) - len(unique)} duplicate labels removed")
        rows = unique
    return rows, "; ".join(notes)


def _box_rows(lines: Sequence[Sequence[str]]) -> np.ndarray:
    for number, line in enumerate(lines, start=1):
        if len(line) != 5:
            raise ValueError(f"row {number} has {len(line)} columns; a box has 5: class cx cy w h")
    return np.array(lines, dtype=np.float32)


def _polygon_rows(lines: Sequence[Sequence[str]]) -> np.ndarray:
    """Return the bounding boxes of polygons, not clipped to the image."""
    rows = np.empty((len(lines), 5), np.float32)
    for number, line in enumerate(lines, start=1):
        if len(line) < 3 or len(line) % 2 == 0:
            raise ValueError(f"row {number} has {len(line)} columns; a polygon has an odd number: class x y x y ...")
        values = np.array(line, dtype=np.float32)
        points = values[1:].reshape(-1, 2)
        low, high = points.min(axis=0), points.max(axis=0)
        rows[number - 1] = (values[0], *((low + high) / 2), *(high - low))
    return rows


def _check_rows(rows: np.ndarray) -> None:
    """Raise ValueError unless all values are finite and not negative, coordinates at most 1, and classes whole."""
    _refuse(rows, ~np.isfinite(rows), "a value is not a finite number")
    _refuse(rows, rows < 0, "negative value {:.9g}")
    _refuse(rows, rows > (np.inf, 1, 1, 1, 1), "coordinate {:.9g} is above 1; coordinates are shares of the image's sides")
    _refuse(rows[:, :1], rows[:, :1] % 1 != 0, "a class is not a whole number")


def _refuse(rows: np.ndarray, where: np.ndarray, reason: str) -> None:
    if where.any():
        raise ValueError(f"row {np.argwhere(where)[0, 0] + 1}: {reason.format(rows[where][0])}")
