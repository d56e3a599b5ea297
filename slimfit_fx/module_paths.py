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


def numbered_block(path: str) -> str:
    """The block that a module belongs to: `"encoder.layer.3"` of `"encoder.layer.3.attention"`, `""` if it has none.

    The first number behind a name counts: the 3 in `"0.encoder.layer.3"`, where a model is part of a sequence. If there
    is none, the number that the path begins with counts.
    """
    block = re.match(r".*?\.\d+(?=\.|$)", path) or re.match(r"\d+(?=\.|$)", path)
    return block.group() if block else ""
