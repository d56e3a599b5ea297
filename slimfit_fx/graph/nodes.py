"""Nodes of captured graphs: the inputs, what a node is a view of, its storage and bytes, new calls."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import compute_unbacked_bindings, free_unbacked_symbols
from torch.multiprocessing.reductions import StorageWeakRef

from slimfit_fx.torch_internals import AOTInput, FakeTensorMode, PlainAOTInput, detect_fake_mode, tree_leaves

from .gate_ops import ops

aten = torch.ops.aten

# An input of a graph: its position in the captured graph, or what AOTAutograd says of a part of one.
InputKey = int | AOTInput

# Where a node came from: copied to the nodes that replace or extend it, for the report and for debugging.
_ORIGIN = ("stack_trace", "nn_module_stack", "fwd_nn_module_stack", "original_aten", "seq_nr")

# Operators whose output shares its input's storage.
VIEWS = frozenset(
    {
        aten.alias.default,
        aten.detach.default,
        aten.expand.default,
        aten.permute.default,
        aten.select.int,
        aten.slice.Tensor,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.t.default,
        aten.transpose.int,
        aten.unsqueeze.default,
        aten.view.default,
        aten._unsafe_view.default,
    }
)

# Operators whose outputs are parts of their input's storage.
SPLITS = frozenset({aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int})

# Operators that give the same values in another dtype.
CONVERSIONS = frozenset({aten._to_copy.default, torch.ops.prims.convert_element_type.default})
# Operators that give the same values in memory of their own.
COPIES = CONVERSIONS | {aten.clone.default}

# Operators that make tensors of numbers that are known.
CREATIONS = frozenset({aten.full.default, aten.scalar_tensor.default, torch.ops.prims.iota.default})


def call(
    graph: fx.Graph,
    target: Callable[..., Any],
    args: tuple[Any, ...],
    origin: fx.Node,
    kwargs: Mapping[str, Any] | None = None,
) -> fx.Node:
    """Adds a call at the graph's insertion point; its fake value is computed, its origin is that of `origin`."""
    node = graph.call_function(target, args, dict(kwargs or {}))
    node.meta = origin_of(origin)
    node.meta["val"] = fake_result(node)
    bindings = compute_unbacked_bindings(_fake_mode(node).shape_env, node.meta["val"])
    if bindings:
        node.meta["unbacked_bindings"] = bindings
    return node


def next_of(node: fx.Node) -> fx.Node:
    """In front of which nodes that read `node` can be added: right behind it, but behind all of the graph's inputs."""
    return (node.graph.find_nodes(op="placeholder")[-1] if node.op == "placeholder" else node).next


def insertion_behind(node: fx.Node) -> Any:
    """Where nodes that read `node` are added: see `next_of`."""
    return node.graph.inserting_before(next_of(node))


def fake_result(node: fx.Node) -> Any:
    """What a call returns for the fake values of its arguments."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda argument: argument.meta["val"])
    with _fake_mode(node):
        return node.target(*args, **kwargs)  # type: ignore[operator]


def origin_of(node: fx.Node) -> dict[str, Any]:
    """Where a node came from, as the meta of a node that replaces or extends it."""
    return {key: node.meta[key] for key in _ORIGIN if key in node.meta}


def _fake_mode(node: fx.Node) -> FakeTensorMode:
    mode = detect_fake_mode([value for value in _values(node) if isinstance(value, Tensor)])
    if mode is None:
        raise AssertionError("a captured graph carries fake tensors")
    return mode


def _values(node: fx.Node) -> list[Any]:
    return tree_leaves([argument.meta["val"] for argument in node.all_input_nodes])


def storage_of(node: fx.Node) -> StorageWeakRef:
    """The identity of the storage behind a node's fake value: equal for views of one tensor."""
    return StorageWeakRef(node.meta["val"].untyped_storage())


def hint(size: int | torch.SymInt, unknown: int = 0) -> int:
    """A size as the capture saw it, with `unknown` for what is known at run time only."""
    if isinstance(size, int):
        return size
    if size.node.has_hint():
        return int(size.node.hint)
    return int(size.node.expr.subs(dict.fromkeys(free_unbacked_symbols(size), unknown)))


def bytes_of(node: fx.Node, rows: int = 0) -> int:
    """Bytes of a node's elements as the capture saw it, with `rows` where its number of rows is the gates' choice."""
    value = node.meta["val"]
    return math.prod(hint(size, rows) for size in value.shape) * value.element_size()


def storage_bytes(node: fx.Node, rows: int = 0) -> int:
    """Bytes of the storage behind a node, counted as in `bytes_of`."""
    nbytes = node.meta["val"].untyped_storage().nbytes()
    return hint(nbytes) if isinstance(nbytes, int) or nbytes.node.has_hint() else bytes_of(node, rows)


def base_of(node: fx.Node) -> fx.Node:
    """The tensor that `node` is a view of, or `node` itself."""
    while node.target in VIEWS:
        node = node.all_input_nodes[0]
    return node


def keep_of(node: fx.Node) -> fx.Node | None:
    """The `save_if_open` that hands over the tensor of which `node` is a view; None if no gate matters to it."""
    base = base_of(node)
    return base if base.target is ops.save_if_open.default else None


def readers(node: fx.Node) -> Iterator[fx.Node]:
    """All nodes that read the values of `node`, directly or through views of the same tensor."""
    pending, seen = [base_of(node)], set()
    while pending:
        for user in pending.pop().users:
            if user in seen:
                continue
            seen.add(user)
            if user.target in VIEWS:
                pending.append(user)
            else:
                yield user


def is_pointwise(node: fx.Node) -> bool:
    """Whether each element of the result depends on one element of each argument, and on nothing random."""
    tags = getattr(node.target, "tags", ())
    random = torch.Tag.nondeterministic_seeded in tags
    return node.op == "call_function" and not random and (torch.Tag.pointwise in tags or node.target in COPIES)


def inputs_of(graph: fx.Graph) -> dict[InputKey, fx.Node]:
    """The primals of a graph by their position in the captured graph, whatever AOTAutograd did to their order.

    An input that is a tensor subclass (torchao, DTensor) comes in parts, each by its descriptor.
    """
    primals = {
        node: node.meta["desc"] for node in graph.find_nodes(op="placeholder") if node.name.startswith("primals")
    }
    return {source.idx if isinstance(source, PlainAOTInput) else source: node for node, source in primals.items()}


def dependent_on_gradients(graph: fx.Graph) -> set[fx.Node]:
    """The nodes of a joint or backward graph that depend on an output's gradient: only the backward can run them."""
    closure: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "output":
            continue
        if ("tangents" in node.name and node.op == "placeholder") or not closure.isdisjoint(node.all_input_nodes):
            closure.add(node)
    return closure


def gates_of(graph: fx.Graph) -> fx.Node:
    """The input that `expose_gates` added behind the others."""
    inputs = inputs_of(graph)
    return inputs[max(key for key in inputs if isinstance(key, int))]


def is_tensor(node: Any) -> bool:
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), Tensor)


def module_of(node: fx.Node) -> str:
    """The path of the innermost module that ran when the node was traced."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack")
    if not stack:
        return ""
    path, _ = list(stack.values())[-1]
    path = re.sub(r"_modules\['([^']+)'\]", r"\1", path)
    path = re.sub(r"\[['\"]?([^'\"\]]+)['\"]?\]", r".\1", path)
    return re.sub(r"^(L\.)?(self|model|module)\b", "", path).strip(".")
