"""Saves the derivative of an activation function instead of its input.

The backward of y = f(x) reads x only to compute f'(x), and multiplies the gradient by that. f'(x) varies in a small
range whatever x is, so it takes fewer bits than x at the same gradient error. It is computed in the forward, where
x still is at hand.
"""

from __future__ import annotations

import functools
import math

from torch import fx

from slimfit_fx.analysis.conditioning import operator_of
from slimfit_fx.codecs import Codec, Derivative, FixedPoint
from slimfit_fx.graph.move_to_forward import between, erase_unread, move_to_forward
from slimfit_fx.graph.nodes import VIEWS, aten, call, is_pointwise, is_tensor
from slimfit_fx.graph.plan import Plan, SavedTensor
from slimfit_fx.graph.split import SplitGraph

# Where the derivatives of activation functions lie.
_RANGES = {"gelu": (-0.1290, 1.1290), "silu": (-0.0999, 1.0999), "mish": (-0.1126, 1.0885)}


def save_derivatives(split: SplitGraph, plan: Plan) -> None:
    """Where a row's choice is `Derivative`, hands that over, if the backward reads nothing else of the input."""
    for produced, taken in list(split.saved()):
        row = plan.find(taken.name)
        if row is None or not isinstance(row.undecided, Derivative):
            continue
        choice = row.undecided
        derivative = None if row.borrowed else _find_derivative(taken)
        if derivative is not None and not _holds(choice.codec, taken, derivative):
            derivative = None
        moved = None if derivative is None else move_to_forward({taken: produced}, derivative)
        row.decide(choice.otherwise if moved is None else choice.codec)
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
    made = (node for node in between([taken], derivative) if is_pointwise(node))
    name, *others = {operator_of(node).removesuffix("_backward") for node in made}
    low, high = _RANGES.get("" if others else name, (-math.inf, math.inf))
    return codec.low <= low and high <= codec.low + codec.step * (2**codec.bits - 1)


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


def _read_instead(derivative: fx.Node, row: SavedTensor, placeholders: list[fx.Node]) -> fx.Node:
    """Takes the derivative from its placeholder, and computes it no more."""
    (placeholder,) = placeholders
    derivative.replace_all_uses_with(placeholder)
    row.name, row.derived = placeholder.name, True
    erase_unread(derivative)
    return placeholder
