"""The one-liner, and what can be asked of a transformed model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from typing_extensions import Unpack

from .config import Config
from .config_options import ConfigOptions
from .errors import ModelError, StateError, VersionError
from .inspection.explanation import Explanation
from .inspection.report import Report
from .model.gate_table import Gates
from .model.layers import check_shapes
from .model.regions import find_regions
from .runtime.registry import end_session, original, session_of, start_session, started_session
from .scheduling import Scheduler

_OLDEST_TORCH = (2, 11)


def transform(model: nn.Module, config: Config | None = None, **overrides: Unpack[ConfigOptions]) -> nn.Module:
    """Makes training `model` save only what the layers that are open at a step need, inside torch.compile.

    The model is changed in place: same object, same class, same state_dict, same hooks. Its training calls run
    compiled; calls in eval mode or under `torch.no_grad()` run as they did. Optimizers are listened to: after each
    step the scheduler chooses which layers train next, and a frozen layer's `.grad` is None.

    Example:
        >>> model = slimfit_fx.transform(model, freeze_rate=0.95)

    Args:
        model: in training precision and on its device. Parameters without `requires_grad` are left alone.
        config: all options; `overrides` are its fields.

    Returns:
        `model` itself.

    Raises:
        ConfigError: a field is unknown or has an impossible value, or a pattern matches nothing.
        ModelError: not a module, sharded by FSDP, or nothing in it can be frozen.
        StateError: the model, a part of it, or a model around it is transformed or compiled already.
        VersionError: torch is too old.
    """
    check_version(torch.__version__)
    from .runtime.module_calls import compile_calls  # with Dynamo and Inductor: `import slimfit_fx` stays cheap

    if not isinstance(model, nn.Module):
        raise ModelError(f"transform takes a torch.nn.Module, got {type(model).__name__}")
    if session_of(model) is not None:
        raise StateError("the model is transformed already; slimfit_fx.undo(model) first to change its config")
    check_shapes(model)
    config = (config or Config()).replace(**overrides)
    regions = find_regions(model, config)
    modules = [region.module for region in regions]
    if original(model) is not model or any(module._compiled_call_impl for module in (model, *modules)):
        raise StateError("the model is compiled already; transform compiles it itself: pass the plain model")
    session = start_session(model, config)
    compile_calls(model, regions, session)
    return model


def undo(model: nn.Module) -> nn.Module:
    """Gives back the untouched model, weights as they are now."""
    from .runtime.module_calls import restore_calls

    session, plain = end_session(model), original(model)
    restore_calls(plain, session)
    return plain


def gates(model: nn.Module) -> Gates:
    """The model's gates: a mapping from layer name to bool, settable at any time."""
    return started_session(model).gates


def scheduler(model: nn.Module) -> Scheduler:
    """What chooses the open layers: `.step()`, `.state_dict()`, `.load_state_dict()`, `.history`."""
    return started_session(model).scheduler


def report(model: nn.Module, sample: Any = None, loss: Callable[[Any], Tensor] | None = None) -> Report:
    """Where each saved byte goes: print it, or read `.rows`. Needs one training forward to have run.

    Args:
        model: transformed.
        sample: a batch, as a mapping of keyword arguments or what the model takes first. With it the report also has
            the error that codecs make in each gradient: two more forwards and backwards, operator by operator, with
            all gates open. The model, its gradients and torch's random state stay as they are.
        loss: makes a scalar of the model's output; by default its `.loss`, or the output itself if it is a scalar.

    Raises:
        StateError: the model is not transformed, or did not run yet.
        ModelError: the sample gives no loss.
    """
    session = started_session(model)
    if not session.active:
        raise StateError("nothing is captured yet: run one training forward of the model, then ask for the report")
    errors = {}
    if sample is not None:
        from .inspection.probe import probe

        errors = probe(original(model), session.config, sample, loss)
    plan, open_gates = session.plan, session.gates.table.tolist()
    optimizer_bytes, outside = session.scheduler.optimizer_bytes(), session.outside_layers
    return Report(plan, session.layers, open_gates, errors, optimizer_bytes, outside)


def explain(model: nn.Module) -> Explanation:
    """Why torch.compile made the graphs that it made: print it.

    It says which inputs caused which recompile, where and why the code was broken into several graphs, and which
    layers are in no graph. Needs one training forward to have run.

    Raises:
        StateError: the model is not transformed, or did not run yet.
    """
    session = started_session(model)
    if not session.captures:
        raise StateError("nothing is captured yet: run one training forward of the model, then ask why it is so")
    origins = [capture.origin for capture in session.captures]
    names = [layer.name for layer in session.layers]
    return Explanation(origins, names, session.uncovered_layers, session.outside_layers, session.left_out)


def graphs(model: nn.Module) -> list[tuple[fx.GraphModule, fx.GraphModule]]:
    """The rewritten (forward, backward) graphs of each captured training graph, to read and to test."""
    splits = [capture.split for capture in started_session(model).captures]
    return [(split.forward, split.backward) for split in splits if split is not None]


def check_version(version: str) -> None:
    """Raises `VersionError` if torch is too old."""
    found = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    if found < _OLDEST_TORCH:
        oldest = ".".join(map(str, _OLDEST_TORCH))
        raise VersionError(f"slimfit_fx needs torch {oldest} or newer, found {version}; pip install 'torch>={oldest}'")
