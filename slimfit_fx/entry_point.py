"""`torch.compile(model, backend="slimfit_fx")`: the same as `transform`, for pipelines that take a backend's name."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx, nn

from .config import Config
from .errors import BackendError, ConfigError
from .transform import session_of, start_session


def compile_graph(
    module: fx.GraphModule, inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None, **_: Any
) -> Callable[..., Any]:
    """The backend of the entry point group `torch_dynamo_backends`; `options` are the fields of `Config`.

    Gates, scheduler and report are asked for with the compiled module or the plain one.

    Raises:
        BackendError: what is compiled is a function, not a module.
        ConfigError: the options ask for regions, which are transform's to make.
    """
    model = _module_being_compiled()
    session = session_of(model) or start_session(model, _config(options or {}))
    return session.compile(module, inputs, delimits=True)


def _config(options: Mapping[str, Any]) -> Config:
    config = Config().replace(**options)
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
