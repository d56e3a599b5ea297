"""Inductor's own options, which a user hands on to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slimfit_fx.errors import ConfigError, choose
from slimfit_fx.torch_internals import inductor_config

# What would be taken from us, or go wrong in silence.
_REFUSED = {
    "custom_partitioner_fn": "our passes are Inductor's custom partitioner",
    "triton.cudagraphs": "operators that read gates cannot be captured, and what is around them was not tried on a GPU",
}


def check_compile_options(options: Mapping[str, Any]) -> None:
    """Raises `ConfigError` if Inductor has no such option, if a value is of another type, or if we need the option."""
    known = inductor_config.get_config_copy()
    for name, value in options.items():
        default = known[choose("option in compile_options", name, known)]
        if value and name in _REFUSED:
            raise ConfigError(f"compile_options: {name!r} is not supported: {_REFUSED[name]}. Leave it out.")
        if default is not None and type(value) is not type(default):
            raise ConfigError(
                f"compile_options: {name!r} is of type {type(default).__name__}, for example {default!r}; got {value!r}"
            )
