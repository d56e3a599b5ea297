"""The code of a model's training graphs, by torch.compile or by this library."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import fx, nn

import slimfit_fx
from slimfit_fx.compiler.backend import compile_capture
from slimfit_fx.compiler.capture import Capture
from slimfit_fx.runtime import session as session_module
from slimfit_fx.runtime.registry import started_session
from slimfit_fx.torch_internals import compile_fx

from .capture import to_cuda
from .guard import ToolError
from .models import Inputs
from .pretend import Code, generated


@dataclass(frozen=True)
class Pair:
    """One captured graph's code.

    Attributes:
        names: of the graph's inputs: a parameter, a buffer, or an input of the model.
        capture: the rewritten graphs and their plan; None for torch.compile.
        open: for each gate of the graph, whether its layer always trains.
    """

    forward: Code
    backward: Code
    names: tuple[str, ...]
    capture: Capture | None = None
    open: tuple[bool, ...] = ()


@dataclass(frozen=True)
class Generated:
    """Attributes:
    pairs: the training graphs, in the order in which they ran first.
    calls: for each run of a graph in one forward, its place in `pairs`.
    seconds: that all of it took.
    """

    pairs: list[Pair]
    calls: list[int]
    seconds: float


def plain(model: nn.Module, inputs: Inputs, *, bf16: bool = False) -> Generated:
    """torch.compile's code of a model on the meta device.

    Args:
        model, inputs: as `Model.build` gives them.
        bf16: under autocast.
    """
    names = _names(model, inputs)
    pairs: list[Pair] = []
    calls: list[int] = []

    def compile(module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        with generated() as found:
            compile_fx(*to_cuda(module, example_inputs))
        pairs.append(Pair(*_two(found), tuple(names.get(id(x), "") for x in example_inputs)))
        place = len(pairs) - 1

        def run(*arguments: Any) -> Any:
            calls.append(place)
            return module(*arguments)

        return run

    start = time.perf_counter()
    _call(torch.compile(model, backend=compile), inputs, bf16)
    return Generated(pairs, calls, time.perf_counter() - start)


def slim(model: nn.Module, inputs: Inputs, *, bf16: bool = False, **options: Any) -> Generated:
    """This library's code of a model on the meta device; `options` are fields of Config.

    Raises:
        SlimFitError: as in training.
    """
    names = _names(model, inputs)
    found_by: dict[Capture, tuple[list[Code], tuple[str, ...]]] = {}
    ran: list[Capture] = []

    def compile(module: fx.GraphModule, example_inputs: Sequence[Any], capture: Capture, *rules: Any) -> Any:
        with generated() as found:
            compile_capture(*to_cuda(module, example_inputs), capture, *rules)
        found_by[capture] = found, tuple(names.get(id(x), "") for x in example_inputs)

        def run(*arguments: Any) -> Any:
            ran.append(capture)
            return module(*arguments[:-1])  # all but the gates

        return run

    start = time.perf_counter()
    slimfit_fx.transform(model, **options)
    with mock.patch.object(session_module, "compile_capture", compile):
        _call(model, inputs, bf16)
    session = started_session(model)
    layers = {run.capture: run.layers for run in session.active}
    pairs = [
        Pair(*_two(found), taken, capture, tuple(_always_open(session.layers, place) for place in layers[capture]))
        for capture, (found, taken) in found_by.items()
        if capture in layers
    ]
    order = [pair.capture for pair in pairs]
    calls = [order.index(capture) for capture in ran]
    slimfit_fx.undo(model)
    return Generated(pairs, calls, time.perf_counter() - start)


def _names(model: nn.Module, inputs: Inputs) -> dict[int, str]:
    return {id(x): name for name, x in (*model.named_parameters(), *model.named_buffers(), *inputs.items())}


def _always_open(layers: Sequence[Any], place: int | None) -> bool:
    return place is None or layers[place].always_open


def _two(found: list[Code]) -> tuple[Code, Code]:
    if sorted(code.backward for code in found) != [False, True]:
        raise ToolError(f"expected a forward and a backward, {len(found)} graphs were compiled")
    forward, backward = sorted(found, key=lambda code: code.backward)
    return forward, backward


def _call(model: Callable[..., Any], inputs: Inputs, bf16: bool) -> None:
    torch._dynamo.reset()
    with torch.autocast("cuda", torch.bfloat16) if bf16 else contextlib.nullcontext():
        model(**inputs)
