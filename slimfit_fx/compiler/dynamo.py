"""How Dynamo treats a backend and code: its control flow, errors on their way to the user, frames, code objects."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import FunctionType
from typing import Any, cast

import torch
from torch import nn

from slimfit_fx.errors import SlimFitError
from slimfit_fx.torch_internals import (
    BackendCompilerFailed,
    FrameAction,
    FrameExecStrategy,
    ShortenTraceback,
    TorchDynamoException,
    exceptions_allowed_to_be_fallback,
    input_codes,
    set_code_exec_strategy,
)

_numbers = itertools.count()
# what a compiler of the user's, of the optimizer step or of the whole model, calls and does not look into
not_traced: Callable[[Any], Any] = torch.compiler.disable


def steers_dynamo(error: BaseException) -> bool:
    """Whether `error` is Dynamo's own control flow, such as the wish to trace a graph anew: no failure."""
    return isinstance(error, TorchDynamoException)


def may_run_eagerly(error: BaseException) -> bool:
    """Whether Dynamo runs a graph operator by operator if its backend raises this: an operator depends on data."""
    return isinstance(error, exceptions_allowed_to_be_fallback)


def own_error(error: BaseException) -> BaseException:
    """The error of ours that Dynamo wrapped into one of its own; else `error` itself."""
    inner = error.inner_exception if isinstance(error, BackendCompilerFailed) else error
    return inner if isinstance(inner, SlimFitError) else error


def unwrapped(error: SlimFitError) -> SlimFitError:
    """`error` in a form that Dynamo hands to the user as it is: only errors of one class of its own pass so."""
    kind = type(type(error).__name__, (ShortenTraceback, type(error)), {"__module__": type(error).__module__})
    return cast("SlimFitError", kind(str(error), first_useful_frame=None))


def retry_skipped_frames() -> None:
    """Lets Dynamo try again what it runs without a graph from now on; compiled graphs stay.

    A frame in which an exception is raised while it is traced is marked for ever. Nobody can ask which frames are, so
    this is for all: one that is skipped for another reason is looked at once more, and skipped again.
    """
    anew = FrameExecStrategy(FrameAction.DEFAULT, FrameAction.DEFAULT)
    for reference in list(input_codes.seen):
        if (code := reference()) is not None:
            set_code_exec_strategy(code, anew)


def own_code(name: str, bare: bool = False) -> FunctionType:
    """A function that calls a module, or if `bare` its forward without hooks, with a code object of its own.

    Dynamo keeps compiled graphs, their recompile limit and what it learnt of dynamic shapes by code object. Under the
    module's own code, which all modules of a class share, the ninth model of a sweep would run uncompiled.
    """

    def train(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return module._call_impl(*args, **kwargs)

    def train_bare(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return module.forward(*args, **kwargs)

    code = (train_bare if bare else train).__code__.replace(co_name=f"train_{name}_{next(_numbers)}")
    return FunctionType(code, train.__globals__, code.co_name)
