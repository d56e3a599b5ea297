"""Paths of modules in the model, and the overrides that name modules by them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from .roles import ROLES


def joined(path: str, inside: str) -> str:
    """The path of what is at `inside` in the module at `path`; `""` is the model, or the module itself."""
    return ".".join(filter(None, (path, inside)))


def matches(overrides: Iterable[str], path: str) -> Iterator[str]:
    """Those keys of a configuration's `codecs` that are no roles but regular expressions found in `path`."""
    return (key for key in overrides if key not in ROLES and re.search(key, path))
