"""`torch.compile(model, backend="slimfit_fx")`: the same as `transform`, for pipelines that take a backend's name."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx, nn

from .compiler.dynamo import unwrapped
from .config import Config
from .config_options import Mode
from .errors import BackendError, ConfigError, SlimFitError, StateError
from .model.fsdp import check_one_graph
from .runtime.registry import session_of, start_session
from .runtime.session import Session


def compile_graph(
    module: fx.GraphModule,
    inputs: Sequence[Any],
    *,
    mode: Mode | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """The backend of the entry point group `torch_dynamo_backends`.

    Gates, scheduler and report are asked for with the compiled module or the plain one.

    Args:
        mode: of `Config`: `"inductor"` or `"eager"`; Inductor's own modes are not passed on.
        options: the fields of `Config`. torch.compile takes either a mode or options.

    Raises:
        BackendError: what is compiled is a function, not a module.
        ModelError: `fully_shard` holds a part of the model.
        ConfigError: an option is unknown, has an impossible value, or asks for regions, which are transform's to make.
        StateError: the model is compiled by us already, with other options.
    """
    try:
        return _session(_config(mode, options or {})).compile(module, inputs, delimits=True)
    except SlimFitError as error:
        raise unwrapped(error) from error


def _session(config: Config) -> Session:
    model = _module_being_compiled()
    session = session_of(model)
    if session is None:
        check_one_graph(model)
        return start_session(model, config)
    if session.config != config:
        raise StateError(
            "the model is compiled by slimfit_fx already, with other options; slimfit_fx.undo(model) first to "
            "change them"
        )
    return session


def _config(mode: Mode | None, options: Mapping[str, Any]) -> Config:
    config = Config().replace(**options) if mode is None else Config().replace(mode=mode, **options)
    if config.regions != "model":
        raise ConfigError("regions='blocks' needs slimfit_fx.transform(model): torch.compile makes one region")
    return config


def _module_being_compiled() -> nn.Module:
    """The module whose call led here: Dynamo hands over a graph and its tensors, but not what they belong to."""
    frame = sys._getframe(1)
    while frame is not None:
        inner = getattr(frame.f_locals.get("self"), "_orig_mod", None)
        if isinstance(inner, nn.Module):
            return inner
        frame = frame.f_back
    raise BackendError(
        "backend='slimfit_fx' compiles modules: torch.compile(model, backend='slimfit_fx'), not a function that "
        "calls one. For such a function use slimfit_fx.transform(model), which compiles the model in place."
    )
