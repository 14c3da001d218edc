"""The one exception that a user's mistake raises, and how a script ends on it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from difflib import get_close_matches


class InputError(Exception):
    """A wrong input: one line that names the file, the block or the flag, and what would be right."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `"; did you mean a, b?"` for the names nearest to `name`, or an empty string."""
    near = get_close_matches(name, list(known), n=3)
    return f"; did you mean {', '.join(near)}?" if near else ""


def run_script(main: Callable[[], None]) -> None:
    """Run a script's `main`; an `InputError` becomes one line on stderr and exit code 2, Ctrl-C exit code 130."""
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
