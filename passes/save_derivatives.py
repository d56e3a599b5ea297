"""Saves the derivative of an activation function instead of its input.

The backward of y = f(x) reads x only to compute f'(x), and multiplies the gradient by that. f'(x) varies in a small
range whatever x is, so it takes fewer bits than x at the same gradient error. It is computed in the forward, where
x still is at hand.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

from torch import SymInt, fx

from slimfit_fx.codecs import Codec, Derivative, FixedPoint
from slimfit_fx.graph import VIEWS, aten, call, is_pointwise, is_tensor
from slimfit_fx.plan import Plan, SavedTensor
from slimfit_fx.split_graph import SplitGraph

from .conditioning import operator_of

# Where the derivatives of activation functions lie.
_RANGES = {"gelu": (-0.1290, 1.1290), "silu": (-0.0999, 1.0999), "mish": (-0.1126, 1.0885)}


def save_derivatives(split: SplitGraph, plan: Plan) -> None:
    """Where a row's codec is `Derivative`, hands that over, if the backward reads nothing else of the input."""
    for produced, taken in list(split.saved()):
        row = plan.find(taken.name)
        if row is None or not isinstance(row.codec, Derivative):
            continue
        derivative = None if row.borrowed else _find_derivative(taken)
        if derivative is not None and not _holds(row.codec.codec, taken, derivative):
            derivative = None
        moved = None if derivative is None else _move_to_forward(produced, taken, derivative)
        row.codec = row.codec.otherwise if moved is None else row.codec.codec
        if moved is not None and derivative is not None:
            split.replace_saved(taken, [moved], functools.partial(_read_instead, derivative, row))


def _find_derivative(taken: fx.Node) -> fx.Node | None:
    """The node of the backward through which alone the rest of it depends on `taken`."""
    inside = {taken}
    for node in taken.graph.nodes:
        arguments = [argument for argument in node.all_input_nodes if is_tensor(argument)]
        if arguments and inside.issuperset(arguments) and (is_pointwise(node) or node.target in VIEWS):
            inside.add(node)
    border = [node for node in inside if not inside.issuperset(node.users)]
    derivative = border[0] if len(border) == 1 else _joined(border[0], border[1], inside) if len(border) == 2 else None
    if derivative is None or derivative is taken or not derivative.meta["val"].is_floating_point():
        return None
    return derivative


def _holds(codec: Codec | None, taken: fx.Node, derivative: fx.Node) -> bool:
    """Whether the codec's range, if it has one, holds the derivative: of one activation function by itself."""
    if not isinstance(codec, FixedPoint):
        return True
    made = (node for node in _between(taken, derivative) if is_pointwise(node))
    name, *others = {operator_of(node).removesuffix("_backward") for node in made}
    low, high = _RANGES.get("" if others else name, (-math.inf, math.inf))
    return codec.low <= low and high <= codec.low + codec.step * (2**codec.bits - 1)


def _between(taken: fx.Node, derivative: fx.Node) -> set[fx.Node]:
    """The nodes that compute `derivative` from `taken`, sizes among them."""
    needed, pending = set(), [derivative]
    while pending:
        node = pending.pop()
        if node is not taken and node not in needed:
            needed.add(node)
            pending.extend(node.all_input_nodes)
    return needed


def _joined(first: fx.Node, second: fx.Node, inside: set[fx.Node]) -> fx.Node | None:
    """Of (gradient * first) * second, rewritten as gradient * (first * second), the new factor: SiLU's backward."""
    for inner, outer in ((first, second), (second, first)):
        scalings, results = set(inner.users) - inside, set(outer.users) - inside
        if len(scalings) != 1 or len(results) != 1:
            continue
        scaled, result = scalings.pop(), results.pop()
        if set(scaled.users) == {result} and scaled.target is result.target is aten.mul.Tensor:
            gradient = next(argument for argument in scaled.args if argument is not inner)
            with outer.graph.inserting_before(result):
                factor = call(outer.graph, aten.mul.Tensor, (inner, outer), outer)
            result.args = (gradient, factor)
            outer.graph.erase_node(scaled)
            return factor
    return None


def _move_to_forward(produced: fx.Node, taken: fx.Node, derivative: fx.Node) -> fx.Node | None:
    """Copies what computes `derivative` from `taken` to the forward, right behind `produced`.

    None if that takes a symbolic size which the forward does not know there yet.
    """
    needed = _between(taken, derivative)
    known = _sizes_before(produced)
    copies = {taken: produced}
    with produced.graph.inserting_before(produced.next):
        for node in taken.graph.nodes:
            if node in needed and node.op == "placeholder":
                size = known.get(node.meta["val"].node.expr)
                if size is None:
                    return None
                copies[node] = size
            elif node in needed:
                copies[node] = produced.graph.node_copy(node, copies.__getitem__)
    return copies[derivative]


def _sizes_before(end: fx.Node) -> dict[Any, fx.Node]:
    """The symbolic sizes that a graph computes before the node `end`, by their expressions."""
    nodes = itertools.takewhile(lambda node: node is not end, end.graph.nodes)
    values = ((node.meta.get("val"), node) for node in nodes)
    return {value.node.expr: node for value, node in values if isinstance(value, SymInt)}


def _read_instead(derivative: fx.Node, row: SavedTensor, placeholders: list[fx.Node]) -> fx.Node:
    """Takes the derivative from its placeholder, and computes it no more."""
    (placeholder,) = placeholders
    derivative.replace_all_uses_with(placeholder)
    row.name, row.derived = placeholder.name, True
    pending = [derivative]
    while pending:
        node = pending.pop()
        if node.op == "call_function" and not node.users and not node._erased:
            pending.extend(node.all_input_nodes)
            node.graph.erase_node(node)
    return placeholder
