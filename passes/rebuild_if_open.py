"""Rebuilds a linear layer's input only in the steps in which the layer's weight gradient is computed.

What `rebuild` adds to the backward feeds `weight_gradient`, an operator that the code generator cannot look into: it
would write the rebuilt tensor to memory whether or not a gate is open. So the rebuilding starts from no rows when the
gates of all its readers are closed:

    x = view(gelu(decode(codes, scales)), [n, k])               codes [n, ...], scales [n, ...]
    weight_gradient(gradient, x, gates, gate)

becomes

    codes, scales = rows_if_open([codes, scales], gates, [gate])            [n, ...], or [0, ...]
    weight_gradient(gradient, view(gelu(decode(codes, scales)), [-1, k]), gates, gate)

It runs behind `compress`: codes take less to copy than what is made of them takes to write.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from typing import Any

from torch import SymInt, fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols, statically_known_true

from slimfit_fx.graph.gate_ops import ops
from slimfit_fx.graph.move_to_forward import erase_unread
from slimfit_fx.graph.nodes import (
    aten,
    base_of,
    bytes_of,
    call,
    dependent_on_gradients,
    is_pointwise,
    is_tensor,
    readers,
)
from slimfit_fx.graph.plan import Plan
from slimfit_fx.graph.split import SplitGraph

_RESHAPES = frozenset({aten.view.default, aten._unsafe_view.default})
_TRANSPOSES = frozenset({aten.permute.default, aten.t.default, aten.transpose.int})
# Reductions of a pointwise function, which the code generator fuses with it.
_REDUCTIONS = frozenset({aten.sum.dim_IntList, aten.amax.default, aten.amin.default, aten.mean.dim})


def rebuild_if_open(split: SplitGraph, _: Plan) -> None:
    """Rebuilds the inputs of linear layers whose gates are all closed from no rows."""
    for rows, products in _products_by_input(split.backward.graph).items():
        if _is_computed(rows) and not _is_read_elsewhere(rows):
            narrowing = _Narrowing(split, products)
            if narrowing.is_worthwhile(rows):
                narrowing.apply(rows)


def _products_by_input(backward: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """The weight gradients that read each activation, by the activation as [n, k]."""
    gradients, found = dependent_on_gradients(backward), {}
    for product in backward.find_nodes(op="call_function", target=ops.weight_gradient.default):
        for operand in product.args[:2]:
            if operand not in gradients:
                rows = operand.all_input_nodes[0] if operand.target in _TRANSPOSES else operand
                found.setdefault(rows, []).append(product)
    return found


def _operands(product: fx.Node, rows: fx.Node) -> list[fx.Node]:
    """The factors of a weight gradient that are `rows`, or `rows` transposed."""
    return [x for x in product.all_input_nodes[:2] if x is rows or x.all_input_nodes[:1] == [rows]]


def _is_computed(rows: fx.Node) -> bool:
    """Whether the backward computes `rows` whatever the gates say."""
    base = base_of(rows)
    return (is_pointwise(base) or base.target is aten.cat.default) and not free_unbacked_symbols(rows.meta["val"])


def _is_read_elsewhere(rows: fx.Node) -> bool:
    """Whether something needs `rows` in memory whatever the gates say: what is fused with it does not."""
    others = (node for node in readers(rows) if node.target is not ops.weight_gradient.default)
    return not all(is_pointwise(node) or node.target in _REDUCTIONS for node in others)


class _Narrowing:
    """The computation of a tensor from all rows of its sources or from none.

    Only these two cases occur, so rows may be joined on the way: a view of no rows has no rows.
    """

    def __init__(self, split: SplitGraph, products: list[fx.Node]) -> None:
        self._split, self._products = split, products
        self._sources: list[fx.Node] = []
        self._known: dict[fx.Node, bool] = {}
        self._made: dict[fx.Node, fx.Node] = {}
        self._times: list[int | fx.Node] | None = None

    def is_worthwhile(self, rows: fx.Node) -> bool:
        """Whether `rows` can be computed so, from sources that take less to copy than it takes to write."""
        if not self._can(rows) or sum(map(bytes_of, self._sources)) >= bytes_of(rows):
            return False
        self._times = self._multiples()
        return self._times is not None

    def apply(self, rows: fx.Node) -> None:
        """Makes the products read what is computed so."""
        gates = sorted({product.args[3] for product in self._products})  # type: ignore[type-var]
        arguments = (self._sources, self._times, self._products[0].args[2], gates)
        parts = self._call(ops.rows_if_open.default, arguments, self._sources[0])
        for place, source in enumerate(self._sources):
            self._made[source] = self._call(operator.getitem, (parts, place), source)
        narrowed = self._make(rows)
        for product in self._products:
            for operand in _operands(product, rows):
                transposed = operand is not rows
                new = self._call(operand.target, (narrowed, *operand.args[1:]), operand) if transposed else narrowed
                product.replace_input_with(operand, new)
                erase_unread(operand)

    def _can(self, node: fx.Node) -> bool:
        if node not in self._known:
            self._known[node] = self._finds_rows(node)
        return self._known[node]

    def _finds_rows(self, node: fx.Node) -> bool:
        if node.op == "placeholder":
            self._sources.append(node)
            return True
        reshapes = node.target in _RESHAPES and self._behind_rows(node) is not None
        if is_pointwise(node) or reshapes or _leaves_rows(node):
            arguments = list(_with_rows(node))
            return bool(arguments) and all(map(self._can, arguments))
        return False

    def _multiples(self) -> list[int | fx.Node] | None:
        """How many times the rows of the shortest tensor each source has; None if that is no number of the graph."""
        lengths: list[Any] = [_length(node) for node in self._known]
        units = (unit for unit in lengths if all(statically_known_true(length % unit == 0) for length in lengths))
        if (unit := next(units, None)) is None:
            return None
        sizes = self._split.sizes()
        times = [_length(source) // unit for source in self._sources]
        found: list[Any] = [sizes.get(count.node.expr) if isinstance(count, SymInt) else count for count in times]
        return None if None in found else found

    def _make(self, node: fx.Node) -> fx.Node:
        if node not in self._made:
            arguments = {x: self._make(x) for x in _with_rows(node)}
            arguments |= {x: self._constant(x) for x in node.all_input_nodes if x.target is aten.full.default}
            args: Any
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda x: arguments.get(x, x))
            if node.target in _RESHAPES or node.target is aten.expand.default:
                args = (args[0], [-1, *self._behind_rows(node)])  # type: ignore[misc]
            self._made[node] = self._call(node.target, args, node, kwargs)
        return self._made[node]

    def _behind_rows(self, node: fx.Node) -> list[Any] | None:
        """The sizes that a view is given, without the first, whose place is the only one for a -1; None if a size that
        is left to torch there is no number of the graph."""
        known, found = self._split.sizes(), []
        shape = node.meta["val"].shape
        for given, size in zip(node.args[1][1:], shape[1:], strict=True):  # type: ignore[index]
            if given == -1:
                given = known.get(size.node.expr) if isinstance(size, SymInt) else size
            found.append(given)
        return None if None in found else found

    def _constant(self, full: fx.Node) -> fx.Node:
        """A constant that fits any number of rows."""
        if full not in self._made:
            ones = [1] * full.meta["val"].dim()
            self._made[full] = self._call(full.target, (ones, *full.args[1:]), full, full.kwargs)
        return self._made[full]

    def _call(self, target: Any, args: tuple[Any, ...], origin: fx.Node, kwargs: Mapping[str, Any] = {}) -> fx.Node:
        with self._split.insertion():
            node = call(self._split.backward.graph, target, args, origin, kwargs)
        self._split.deferred.add(node)
        return node


def _with_rows(node: fx.Node) -> Iterator[fx.Node]:
    """The arguments of a pointwise operator, or of one that leaves rows where they are, that have the rows of its
    result: what is broadcast has none."""
    size = node.meta["val"].shape
    for x in filter(is_tensor, node.all_input_nodes):
        shape = x.meta["val"].shape
        broadcast = is_pointwise(node) and (len(shape) < len(size) or not statically_known_true(shape[0] == size[0]))
        if not broadcast and x.target is not aten.full.default:
            yield x


def _leaves_rows(node: fx.Node) -> bool:
    """Whether a view or a concatenation does nothing to the first dimension of what it reads."""
    match node.target:
        case aten.alias.default | aten.detach.default:
            return True
        case aten.permute.default:
            return node.args[1][0] == 0  # type: ignore[index]
        case aten.expand.default:
            (source,) = node.all_input_nodes
            return source.meta["val"].dim() == node.meta["val"].dim() and statically_known_true(
                _length(source) == _length(node)
            )
        case aten.cat.default | aten.select.int | aten.slice.Tensor | aten.squeeze.dim | aten.unsqueeze.default:
            _, dim, *_ = (*node.args, 0)
            return dim not in (0, -node.meta["val"].dim())
        case _:
            return False


def _length(node: fx.Node) -> int | SymInt:
    return node.meta["val"].shape[0]
