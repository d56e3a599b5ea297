"""Puts another function in the place of one of torch's, for a while."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def replaced(owner: Any, name: str, function: Callable[..., Any] | staticmethod[..., Any]) -> Iterator[None]:
    """Inside, `owner.name` is `function`."""
    original = inspect.getattr_static(owner, name)  # a static method stays one
    setattr(owner, name, function)
    try:
        yield
    finally:
        setattr(owner, name, original)
