"""Makes the gates an input of the captured graph."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from slimfit_fx.graph.captured import Captured
from slimfit_fx.torch_internals import ConstantSource, FakeTensorMode, TracingContext, detect_fake_mode

# What Dynamo hangs on a graph and its inputs from outside, and AOTAutograd looks for.
_MODULE_ATTRIBUTES = ("_param_name_to_source", "_source_to_user_stacks", "compile_subgraph_reason")
_SOURCE = "_dynamo_source"


def expose_gates(module: fx.GraphModule, inputs: Sequence[Any], captured: Captured) -> tuple[fx.GraphModule, list[Any]]:
    """A copy of Dynamo's graph and its example inputs with one more input, the last: the gates, bool
    [captured.gates].

    Nothing reads it yet; `gate_dynamic` does. The copy is needed because Dynamo goes on using the graph that it
    handed over. AOTAutograd wants to know the source of every input: a constant one makes no guard. The example is a
    fake tensor of static size, so that the number of gates does not become a symbol.
    """
    copied = fx.GraphModule(module, copy.deepcopy(module.graph))
    copied.meta = dict(module.meta)
    for name in _MODULE_ATTRIBUTES:
        if hasattr(module, name):
            setattr(copied, name, getattr(module, name))

    old_placeholders, placeholders = _placeholders(module), _placeholders(copied)
    for old, new in zip(old_placeholders, placeholders, strict=True):
        if hasattr(old, _SOURCE):
            setattr(new, _SOURCE, getattr(old, _SOURCE))

    fake_gates = _fake(captured.gates, inputs)
    first = next(iter(copied.graph.nodes))
    with copied.graph.inserting_after(placeholders[-1]) if placeholders else copied.graph.inserting_before(first):
        gates = copied.graph.placeholder("slimfit_gates")
    gates.meta["example_value"] = fake_gates
    setattr(gates, _SOURCE, ConstantSource("slimfit_gates"))
    copied.recompile()
    return copied, [*inputs, fake_gates]


def _placeholders(module: fx.GraphModule) -> list[fx.Node]:
    return module.graph.find_nodes(op="placeholder")


def _fake(count: int, inputs: Sequence[Any]) -> Tensor:
    context = TracingContext.try_get()
    mode = context.fake_mode if context is not None else detect_fake_mode(list(inputs))
    if mode is None:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
    return mode.from_tensor(torch.ones(count, dtype=torch.bool), static_shapes=True)
