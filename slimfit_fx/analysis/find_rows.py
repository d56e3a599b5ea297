"""Tells which elements of a saved tensor may share a group: those of one row.

Rows are tokens, or whatever else is scaled by itself: a norm's backward multiplies each row by the inverse of its own
standard deviation, so a row that took the step of a larger neighbour would come out as noise.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import fx

from slimfit_fx.graph.nodes import SPLITS, VIEWS, base_of, hint, is_pointwise, is_tensor

from .conditioning import operator_of

# Norms over the places of a channel, not over the last dimension.
_CHANNEL_NORMS = ("group_norm", "batch_norm")


@dataclass(frozen=True)
class Rows:
    """How a codec sees a tensor.

    Attributes:
        order: its dimensions, the outermost first.
        row: elements of a row: some of the last dimensions in that order, or a part of the last one.
    """

    order: tuple[int, ...]
    row: int

    def shape(self, sizes: Sequence[int]) -> list[int]:
        """[..., row] of a tensor of `sizes`: dimensions that a row does not reach stay as they are."""
        sizes = [sizes[dim] for dim in self.order]
        if not isinstance(self.row, int) or not self.row or not sizes:
            return sizes
        end, reached = len(sizes), 1
        while reached < self.row:
            end -= 1
            reached *= sizes[end]
        return [*sizes[:end], *([reached // self.row] if reached > self.row else []), self.row]


def find_rows(produced: fx.Node, taken: fx.Node, role: str) -> Rows:
    """The rows of what the forward makes as `produced` and the backward takes as `taken`."""
    value = produced.meta["val"]
    sizes, strides = list(value.shape), [hint(stride) for stride in value.stride()]
    # what is repeated without taking memory is no part of a row
    order = sorted(range(value.dim()), key=lambda dim: -strides[dim] or -math.inf)
    if not order:
        return Rows((), 1)
    if role == "norm input":
        return _normalized(taken, sizes, strides, order)
    if role == "convolution input":
        return Rows(tuple(range(value.dim())), _product(sizes[2:]) or sizes[-1])
    # as its producer had it: the heads of a query are one row
    limit = _source(produced).meta["val"].shape[-1:]
    row, *outer = (sizes[dim] for dim in reversed(order))
    for dim, size in zip(reversed(order[:-1]), outer, strict=True):
        known = strides[dim] and all(isinstance(n, int) for n in (row, size, *limit))
        if not known or strides[dim] * size > math.prod(limit):
            break
        row *= size
    return Rows(tuple(order), row)


def _source(node: fx.Node) -> fx.Node:
    """The tensor that `node` is a view or a part of."""
    base = base_of(node)
    if base.target is operator.getitem and base.args[0].target in SPLITS:  # type: ignore[union-attr]
        return _source(base.args[0].all_input_nodes[0])  # type: ignore[union-attr]
    return base


def _normalized(taken: fx.Node, sizes: list[int], strides: list[int], order: list[int]) -> Rows:
    """Of a norm's input: what has a standard deviation in common, as the backward reads it."""
    views = list(_read_as(taken))
    if len(sizes) > 2 and any(name in operator_of(reader) for _, reader in views for name in _CHANNEL_NORMS):
        return Rows(tuple(range(len(sizes))), _product(sizes[2:]) or sizes[-1])
    lasts = {
        (hint(view.shape[-1]), hint(view.stride()[-1])) for view in (v.meta["val"] for v, _ in views) if view.dim()
    }
    size, stride = min(lasts, default=(hint(sizes[order[-1]]), strides[order[-1]]))
    last = next((dim for dim in order if strides[dim] == stride), order[-1])
    order = [*(dim for dim in order if dim != last), last]
    whole = sizes[last]
    return Rows(tuple(order), size if isinstance(whole, int) and size and whole % size == 0 else whole)


def _read_as(node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """(view, reader) for everything that computes with a tensor, element by element or along a dimension."""
    for user in node.users:
        if user.target in VIEWS:
            yield from _read_as(user)
        elif user.op == "call_function" and (is_pointwise(user) or is_tensor(user)):
            yield node, user


def _product(sizes: list[int]) -> int | None:
    """None for no sizes, and where one is a symbol."""
    return math.prod(sizes) if sizes and all(isinstance(size, int) for size in sizes) else None
