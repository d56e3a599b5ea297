"""Encodes saved tensors right behind their producers, and decodes them right before their readers.

A codec is traced to ATen operators, once for all tensors of one form, and spliced into both graphs, so that the code
generator fuses it with its neighbours. It sees the tensor as rows (`find_rows.py`), whatever views made of it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from slimfit_fx.analysis.find_rows import Rows, find_rows
from slimfit_fx.codecs import Codec
from slimfit_fx.graph.nodes import (
    VIEWS,
    aten,
    bytes_of,
    fake_result,
    insertion_behind,
    origin_of,
    storage_bytes,
    storage_of,
)
from slimfit_fx.graph.plan import Plan, SavedTensor
from slimfit_fx.graph.split import SplitGraph
from slimfit_fx.torch_internals import detect_fake_mode, select_decomp_table


def compress(split: SplitGraph, plan: Plan) -> None:
    """Applies the codec of every row of the plan whose tensor is still saved, and notes the bytes of its parts.

    Tensors that share a storage share its fate: if one of them is stored as it is, so are the others.
    A choice that is left, as its pass was disabled, comes to its default.
    """
    saved = [(produced, taken, row) for produced, taken in split.saved() if (row := plan.find(taken.name)) is not None]
    saved = [(produced, taken, row) for produced, taken, row in saved if not row.borrowed]
    for _, _, row in saved:
        while row.undecided is not None:
            row.decide(row.undecided.default)
    whole = {storage_of(produced) for produced, taken, row in saved if not _encodes(row, taken)}
    counted, traces = set(), _Traces()
    for produced, taken, row in saved:
        storage = storage_of(produced)
        if storage not in whole and row.codec is not None:
            tensor = _Encoded(row.codec, taken, find_rows(produced, taken, row.role), traces)
            parts = tensor.encode(split, produced)
            split.replace_saved(taken, parts, functools.partial(tensor.decode, split))
            row.store(sum(bytes_of(part, row.rows) for part in parts), row.codec.label)
        else:
            row.store(0 if storage in counted else storage_bytes(produced, row.rows))
            counted.add(storage)


def _encodes(row: SavedTensor, taken: fx.Node) -> bool:
    return row.codec is not None and row.codec.accepts(taken.meta["val"].dtype)


def trace(function: Callable[..., Any], *arguments: Any) -> fx.GraphModule:
    """`function` on fake tensors and symbolic sizes as a graph of ATen operators, decomposed as for Inductor."""
    mode = detect_fake_mode([argument for argument in arguments if isinstance(argument, Tensor)])
    if mode is None:
        raise AssertionError("codecs are traced with fake tensors")
    with mode:
        traced = make_fx(function, decomposition_table=select_decomp_table())(*arguments)
    _fold_views(traced.graph)
    return traced


def _fold_views(graph: fx.Graph) -> None:
    """Joins views of views, and removes views that change nothing: a codec has as many views as computations, and each
    costs the code generator as much."""
    for node in graph.find_nodes(op="call_function", target=aten.view.default):
        while (source := node.args[0]).target is aten.view.default:
            node.update_arg(0, source.args[0])
    for node in graph.nodes:
        unmoved = node.target is aten.permute.default and node.args[1] == sorted(node.args[1])
        if unmoved or node.target is aten.alias.default:
            node.replace_all_uses_with(node.args[0])
    graph.eliminate_dead_code()


class _Traces(dict[str, fx.GraphModule]):
    """What `trace` made of functions, by what they depend on."""

    def get_or_trace(self, function: Callable[..., Any], inputs: Sequence[Any], *options: Any) -> fx.GraphModule:
        """The trace of `function`, which reads `options` beside its inputs."""
        forms = [(x.shape, x.stride(), x.dtype, x.device) if isinstance(x, Tensor) else x for x in inputs]
        key = _renamed(str((options, forms)))
        if key not in self:
            self[key] = trace(function, *inputs)
        return self[key]


def _renamed(text: str) -> str:
    """`text` with sizes that are known at run time only, u7 or u12, numbered from 0."""
    names: dict[str, str] = {}
    return re.sub(r"\bu\d+\b", lambda match: names.setdefault(match.group(), f"u{len(names)}"), text)


class _Encoded:
    """A codec for one saved tensor, of which it sees the rows."""

    def __init__(self, codec: Codec, taken: fx.Node, rows: Rows, traces: _Traces) -> None:
        value = taken.meta["val"]
        self.codec, self.taken, self.dtype, self.traces = codec, taken, value.dtype, traces
        self.rows = rows
        # an expanded tensor is one of its repetitions: a key that several queries share
        self.repeated = [dim for dim, stride in enumerate(value.stride()) if isinstance(stride, int) and stride == 0]
        sizes = [1 if dim in self.repeated else size for dim, size in enumerate(value.shape)]
        self.inverse = [rows.order.index(dim) for dim in range(value.dim())]
        self.shape = [sizes[dim] for dim in rows.order]
        self.row_shape = rows.shape(sizes)
        self.expanded = list(value.shape)

    def encode(self, split: SplitGraph, produced: fx.Node) -> list[fx.Node]:
        def function(x: Tensor) -> tuple[Tensor, ...]:
            for dim in self.repeated:
                x = x.narrow(dim, 0, 1)
            return self.codec.encode(x.permute(self.rows.order).reshape(self.rows.shape(x.shape)))

        options = ("encode", self.codec, self.rows, self.repeated)
        traced = self.traces.get_or_trace(function, [produced.meta["val"]], *options)
        _follow_producer(produced)
        with insertion_behind(produced):
            return _splice(split.forward.graph, traced, [produced], produced)

    def decode(self, split: SplitGraph, parts: list[fx.Node]) -> fx.Node:
        def function(*arguments: Tensor) -> Tensor:
            # the sizes that follow the parts are not read: the trace finds the symbols of `shape` in them
            rows = self.codec.decode(arguments[: len(parts)], self.row_shape, self.dtype)
            x = rows.reshape(self.shape).permute(self.inverse)
            return x.expand(self.expanded) if self.repeated else x

        arguments = [*parts, *split.sizes().values()]
        values = [argument.meta["val"] for argument in arguments]
        options = ("decode", self.codec, self.shape, self.row_shape, self.dtype, self.inverse, self.expanded)
        traced = self.traces.get_or_trace(function, values, *options)
        with split.insertion():
            (restored,) = _splice(split.backward.graph, traced, arguments, self.taken, split.deferred)
        return restored


def _follow_producer(view: fx.Node) -> None:
    """Moves a view right behind the tensor that it is a view of: the partitioner may have made it just to save it."""
    if view.target in VIEWS and len(view.all_input_nodes) == 1 and view.all_input_nodes[0].op != "placeholder":
        source = view.all_input_nodes[0]
        _follow_producer(source)
        source.append(view)


def _splice(
    graph: fx.Graph,
    traced: fx.GraphModule,
    arguments: list[fx.Node],
    origin: fx.Node,
    added: set[fx.Node] | None = None,
) -> list[fx.Node]:
    """Copies a traced function into a graph at its insertion point; returns its results, notes the nodes in `added`."""
    copies = dict(zip(traced.graph.find_nodes(op="placeholder"), arguments, strict=True))
    for node in traced.graph.nodes:
        if node.op == "call_function":
            copies[node] = copy = graph.node_copy(node, copies.__getitem__)
            copy.meta = origin_of(origin)
            copy.meta["val"] = fake_result(copy)
            if added is not None:
                added.add(copy)
    (results,) = traced.graph.find_nodes(op="output")[0].args
    return [copies[node] for node in (results if isinstance(results, (tuple, list)) else [results])]  # type: ignore
