"""Packages that only export needs: imported where they are used, and missed in one line."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from utils.errors import InputError


def require(package: str, what: str) -> ModuleType:
    """The module `package`; raise `InputError` saying that `what` needs it and how to install it where it is not there."""
    try:
        return import_module(package)
    except ImportError as error:
        if error.name and error.name.partition(".")[0] != package.partition(".")[0]:
            raise  # the package is there and misses something of its own
        raise InputError(f"{what} needs the package {package}: pip install -r requirements-export.txt") from None
