"""Split graphs that a test writes down: two functions in the place of a model, AOTAutograd and a partitioner."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from slimfit_fx.passes.make_plan import make_plan
from torch import Tensor, fx
from torch._functorch._aot_autograd.descriptors import PlainAOTInput
from torch.fx.experimental.proxy_tensor import make_fx

from slimfit_fx.graph.plan import Plan
from slimfit_fx.graph.split import SplitGraph
from slimfit_fx.presets import CodecRules


def split_graph(
    forward: Callable[..., Sequence[Tensor]],
    backward: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor],
    gates: int = 1,
    outputs: int = 1,
) -> SplitGraph:
    """The pair of `forward(*inputs, gates) -> [*outputs, *saved]` and `backward(*saved, *tangents) -> gradients`.

    Tangents have the shapes of the outputs. Saved tensors are fake in the backward, as the forward made them.
    """
    flags = torch.ones(gates, dtype=torch.bool)
    first = make_fx(forward, tracing_mode="fake")(*inputs, flags)
    _name(first, [f"primals_{place + 1}" for place in range(len(inputs) + 1)])
    for place, node in enumerate(first.graph.find_nodes(op="placeholder")):
        node.meta["desc"] = PlainAOTInput(place)
    (results,) = first.graph.find_nodes(op="output")[0].args
    values = [node.meta["val"] for node in results]
    with values[0].fake_mode:
        second = make_fx(backward)(*values[outputs:], *values[:outputs])
    names = [node.name for node in results[outputs:]] + [f"tangents_{place + 1}" for place in range(outputs)]
    _name(second, names)
    return SplitGraph(first, second, outputs)


def planned(split: SplitGraph, preset: str = "balanced", **overrides) -> Plan:
    """The plan that `make_plan` makes of it."""
    plan = Plan(rules=CodecRules(preset, overrides))
    make_plan(split, plan)
    return plan


@contextmanager
def tracing(split: SplitGraph) -> Iterator[None]:
    """As in a compilation, where operators without a tensor among their arguments find the fake mode as well."""
    mode = split.forward.graph.find_nodes(op="placeholder")[0].meta["val"].fake_mode
    with torch._guards.tracing(torch._guards.TracingContext(mode)):
        yield


def targets(module: fx.GraphModule) -> list[str]:
    """The operators of a graph, in order."""
    return [str(node.target).removesuffix(".default") for node in module.graph.nodes if node.op == "call_function"]


def _name(module: fx.GraphModule, names: Sequence[str]) -> None:
    for node, name in zip(module.graph.find_nodes(op="placeholder"), names, strict=True):
        node._rename(name)
        node.target = node.name
    module.recompile()
