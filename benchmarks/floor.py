"""How fast a step could be at best: the part of its matrix products' FLOPs that frozen layers leave.

A linear layer costs three products of the same size: forward, the gradient of its input, that of its weight. With the
weights of a part F of them frozen, (2 + (1 - F)) / 3 are left. Pointwise operators come on top, encoding included.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch.utils.flop_counter import flop_registry

from slimfit_fx.graph.nodes import dependent_on_gradients, hint
from slimfit_fx.runtime.registry import session_of

_weight_gradient = torch.ops.slimfit_fx.weight_gradient.default


def flops_left(model: nn.Module) -> float:
    """FLOPs of products at the present gates over those with all gates open, in the last forward and its backward.

    Products that the backward computes again to save memory are left out: they are no part of what has to be done.
    """
    session = session_of(model)
    if session is None:
        raise ValueError(f"{type(model).__name__} is not transformed")
    left = total = 0
    for run in session.active:
        gates = session.gates.read(run.layers)
        split = run.capture.split
        nodes = (*split.forward.graph.nodes, *dependent_on_gradients(split.backward.graph)) if split is not None else ()
        for node in nodes:
            flops = _flops(node)
            total += flops
            if node.target is not _weight_gradient or gates[node.args[3]]:  # type: ignore[index]
                left += flops
    return left / total


def _flops(node: fx.Node) -> int:
    if node.op != "call_function":
        return 0
    values: Any = fx.map_arg((node.args, node.kwargs), lambda argument: argument.meta["val"])
    args, kwargs = values
    if node.target is _weight_gradient:
        (m, n), (rows, k) = (operand.shape for operand in args[:2])
        return 2 * hint(m) * max(hint(n), hint(rows)) * hint(k)  # of the two, one is known at run time only
    count = flop_registry.get(getattr(node.target, "overloadpacket", None))
    return 0 if count is None else int(count(*args, **kwargs, out_val=node.meta["val"]))
