"""Finds the weight gradient of a head whose loss is computed in parts, in a joint graph."""

from __future__ import annotations

import operator
from dataclasses import dataclass

from torch import fx

from slimfit_fx.graph.gate_ops import ops
from slimfit_fx.graph.nodes import aten


@dataclass(frozen=True)
class HeadGradient:
    """A weight gradient that `head_gradients` makes.

    Attributes:
        gate: of the weight.
        product: the call.
        part: that of its results.
        rest: if the gradient is a sum, of something else that has the same weight; else None.
    """

    gate: int
    product: fx.Node
    part: fx.Node
    rest: fx.Node | None

    @property
    def activation(self) -> fx.Node:
        return self.product.args[0]  # type: ignore[return-value]

    @property
    def has_bias(self) -> bool:
        """Whether the operator reads the activation whatever the gate says."""
        return bool(self.product.args[-3])


def match_head(gradient: fx.Node, gate: int) -> HeadGradient | None:
    """Reads `gradient` as that of a head whose loss is computed in parts, and of an embedding, if they share it."""
    summands = gradient.args[:2] if gradient.target is aten.add.Tensor and not gradient.kwargs else [gradient]
    for place, node in enumerate(summands):
        if isinstance(node, fx.Node) and len(node.users) == 1 and _is_of_head(node):
            rest = summands[1 - place] if len(summands) == 2 else None
            return HeadGradient(gate, product=node.args[0], part=node, rest=rest)  # type: ignore[arg-type]
    return None


def _is_of_head(node: fx.Node) -> bool:
    if node.target is not operator.getitem or node.args[1] != 0:
        return False
    return node.args[0].target is ops.head_gradients.default  # type: ignore[union-attr]
