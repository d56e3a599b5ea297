"""Every error and warning of slimfit_fx: each names the cause and the way out."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SlimFitError(Exception):
    """Base class of the library's errors."""


class ConfigError(SlimFitError, ValueError):
    """A field of `Config` has an invalid value."""


class ModelError(SlimFitError, ValueError):
    """The model cannot be transformed as it is."""


class StateError(SlimFitError, RuntimeError):
    """A call came at a time, or with a saved state, that does not fit the model."""


class BackendError(SlimFitError, RuntimeError):
    """Capturing or compiling a graph failed, or the model ran without its compiled graph."""


class BackwardError(SlimFitError, RuntimeError):
    """The backward pass was asked for something that a rewritten graph does not support."""


class OutputError(SlimFitError, AttributeError):
    """An output was used that `outputs="loss"` leaves out. It is an AttributeError, so `hasattr` returns False."""


class VersionError(SlimFitError, ImportError):
    """The installed torch is too old, or lacks a private name that the library builds on."""


class SlimFitWarning(UserWarning):
    """Training goes on, but less is saved or frozen than was asked for: the text says where, why and the way out."""


def choose(kind: str, value: object, known: Iterable[str]) -> str:
    """Returns `value` if it is one of `known`, else raises a `ConfigError` that lists them."""
    known = list(known)
    if value in known:
        return str(value)
    close = difflib.get_close_matches(str(value), known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise ConfigError(f"unknown {kind} {value!r}; known: {', '.join(map(repr, known))}.{hint}")
