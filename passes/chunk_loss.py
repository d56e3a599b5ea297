"""Computes a linear head and its cross entropy for one part of the tokens after the other: the logits are never whole.

Runs on Dynamo's graph, where the loss is one call with all its options:

    logits = linear(x, weight)                          [..., v]
    cross_entropy(view(float(logits)), targets)

becomes `head_cross_entropy(x, weight, targets, ...)`. Between the two there may be conversions, views and slices of the
leading dimensions, products with numbers, and a soft cap. What else reads the logits needs them whole; so do the
model's outputs, if they contain them: with `outputs="loss"` they are left out there.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from slimfit_fx.graph.captured import Captured
from slimfit_fx.graph.head_ops import head_cross_entropy
from slimfit_fx.graph.nodes import module_of

# How many times as many columns as x the logits must have: x and its gradient are saved instead.
_WORTHWHILE = 4
_SAME = frozenset({"contiguous", "float", "to", "bfloat16", "double", "half", "type", "type_as"})
_FUNCTIONS = {
    operator.getitem: "getitem",
    operator.mul: "mul",
    operator.truediv: "div",
    torch.mul: "mul",
    torch.div: "div",
    torch.tanh: "tanh",
    torch.reshape: "view",
}
_METHODS = {"mul": "mul", "div": "div", "tanh": "tanh", "view": "view", "reshape": "view"}


@dataclass
class _Match:
    """A head and its loss: nodes from the linear layer to the loss, and what is done to the logits between."""

    loss: fx.Node
    nodes: list[fx.Node] = field(default_factory=list)  # from the loss's input back to the linear layer
    scale: float = 1.0
    cap: float = 0.0

    @property
    def linear(self) -> fx.Node:
        return self.nodes[-1]


def chunk_loss(
    module: fx.GraphModule, inputs: Sequence[Any], captured: Captured
) -> tuple[fx.GraphModule, Sequence[Any]]:
    """Computes a linear head and its cross entropy in parts, so that logits are neither saved nor ever whole."""
    losses = module.graph.find_nodes(op="call_function", target=F.cross_entropy)
    matches = [match for match in map(_match, losses) if match is not None]
    inside = {node for match in matches for node in (*match.nodes, match.loss)}
    (returned,) = module.graph.find_nodes(op="output")
    replaced = []
    for match in matches:
        others = {user for node in match.nodes for user in node.users} - inside
        if not others <= {returned}:
            continue
        if others and not captured.only_loss:
            captured.whole_heads.append(module_of(match.linear))
            continue
        replaced.append(match)
    captured.heads += [module_of(match.linear) for match in replaced]
    captured.left_out += _leave_out(returned, {node for match in replaced for node in match.nodes})
    for match in replaced:
        _replace(match)
    module.recompile()
    return module, inputs


def _leave_out(returned: fx.Node, nodes: Collection[fx.Node]) -> list[int]:
    """Takes nodes off the graph's outputs; returns the places that they had."""
    (results,) = returned.args
    found = [place for place, result in enumerate(results) if result in nodes]  # type: ignore[arg-type]
    returned.args = (tuple(result for result in results if result not in nodes),)  # type: ignore[union-attr]
    return found


def _match(loss: fx.Node) -> _Match | None:
    """The head of a loss, if there is nothing between them but what can be done to parts of the tokens."""
    found = _Match(loss)
    logits, targets = _argument(loss, 0, "input"), _argument(loss, 1, "target")
    if not (isinstance(logits, fx.Node) and isinstance(targets, fx.Node)) or _value(targets).is_floating_point():
        return None
    if _argument(loss, 3, "size_average") is not None or _argument(loss, 5, "reduce") is not None:
        return None
    node = logits
    classes = _value(node).shape[-1]
    if _value(node).dim() != 2 or not isinstance(classes, int):
        return None
    while node.target is not F.linear:
        value = node.meta.get("example_value")
        if not isinstance(value, Tensor) or value.shape[-1] != classes or not _follow(node, found):
            return None
        found.nodes.append(node)
        source = next((argument for argument in node.args[:2] if isinstance(argument, fx.Node)), None)
        if source is None:
            return None
        node = source
    found.nodes.append(node)
    weight = _value(node.args[1])
    worthwhile = weight.dim() == 2 and weight.shape[0] >= _WORTHWHILE * weight.shape[1]
    return found if worthwhile and _value(node).shape[-1] == classes else None


def _follow(node: fx.Node, found: _Match) -> bool:
    """Notes what `node`, between head and loss, does to the logits: whether that is known."""
    kind = _kind(node)
    if kind in ("same", "view"):
        return kind == "same" or _same_columns(node)
    if kind == "getitem":
        return _leaves_columns(node)
    if kind == "tanh" and not found.cap:
        found.cap, found.scale = found.scale, 1.0
        return True
    if kind in ("mul", "div") and len(node.args) == 2 and not node.kwargs:
        number = node.args[1]
        if kind == "mul" and isinstance(number, fx.Node):  # 30 * logits
            number = node.args[0]
        if isinstance(number, (int, float)) and not isinstance(number, bool) and number > 0:
            found.scale *= number if kind == "mul" else 1 / number
            return True
    return False


def _kind(node: fx.Node) -> str | None:
    if node.op == "call_function":
        return _FUNCTIONS.get(node.target)  # type: ignore[arg-type]
    if node.op != "call_method":
        return None
    if node.target in _SAME:
        source = node.args[0]
        return "same" if isinstance(source, fx.Node) and _value(node).is_floating_point() else None
    return _METHODS.get(str(node.target))


def _same_columns(view: fx.Node) -> bool:
    """Whether a view leaves the last dimension as it is."""
    source = view.args[0]
    return isinstance(source, fx.Node) and _value(source).shape[-1] == _value(view).shape[-1]


def _leaves_columns(item: fx.Node) -> bool:
    """Whether slices leave the last dimension as it is."""
    source, index = item.args
    index = index if isinstance(index, tuple) else (index,)
    if not isinstance(source, fx.Node) or not all(isinstance(i, slice) or i is Ellipsis for i in index):
        return False
    dims = _value(source).dim()
    return not (Ellipsis in index or len(index) == dims) or index[-1] in (slice(None), Ellipsis)


def _replace(match: _Match) -> None:
    """Puts the loss in parts in the place of the whole one; views of the logits become views of x."""
    loss, linear = match.loss, match.linear
    x, weight, *bias = linear.args
    bias = bias[0] if bias else linear.kwargs.get("bias")
    graph = loss.graph
    with graph.inserting_before(loss):
        rows: Any = x
        for node in reversed(match.nodes[:-1]):
            if _kind(node) == "getitem":
                rows = graph.call_function(operator.getitem, (rows, node.args[1]))
            elif _kind(node) == "view":
                rows = graph.call_method("reshape", (rows, *_leading(node), _value(x).shape[-1]))
        arguments = (
            rows,
            weight,
            bias,
            _argument(loss, 1, "target"),
            _argument(loss, 2, "weight"),
            _argument(loss, 4, "ignore_index", -100),
            float(_argument(loss, 7, "label_smoothing", 0.0)),
            match.scale,
            match.cap,
            _value(linear).dtype,
            _value(loss).dtype,
            _argument(loss, 6, "reduction", "mean"),
        )
        new = graph.call_function(head_cross_entropy, arguments)
    new.meta = {**loss.meta, **{key: linear.meta[key] for key in ("nn_module_stack",) if key in linear.meta}}
    loss.replace_all_uses_with(new)
    for node in (loss, *match.nodes):
        if not node.users:  # and nothing else: what changes its arguments in place has no users either
            graph.erase_node(node)


def _leading(view: fx.Node) -> tuple[Any, ...]:
    """The sizes that a view asks for, without the last."""
    sizes = view.args[1:]
    if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)):
        sizes = tuple(sizes[0])
    return tuple(sizes[:-1])


def _argument(call: fx.Node, place: int, name: str, default: Any = None) -> Any:
    return call.args[place] if len(call.args) > place else call.kwargs.get(name, default)


def _value(node: Any) -> Tensor:
    return node.meta["example_value"]  # type: ignore[no-any-return]
