"""Moves computations of the backward that read saved tensors to the forward: what they make is handed over."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import SymInt, fx

from .nodes import insertion_behind, is_tensor


def between(sources: Collection[fx.Node], result: fx.Node) -> set[fx.Node]:
    """The nodes that compute `result` from `sources`, sizes and other inputs among them."""
    needed, pending = set(), [result]
    while pending:
        node = pending.pop()
        if node not in sources and node not in needed:
            needed.add(node)
            pending.extend(node.all_input_nodes)
    return needed


def move_to_forward(sources: Mapping[fx.Node, fx.Node], result: fx.Node) -> fx.Node | None:
    """Makes the forward compute what the backward computes as `result`, right behind what it reads.

    Args:
        sources: what is saved: {placeholder of the backward: node of the forward}.
        result: a node of the backward that depends on them and on sizes alone.

    Returns:
        The node of the forward; None if it takes something else, or a size that the forward does not compute.
    """
    needed = between(sources, result)
    forward = next(iter(sources.values())).graph
    values = ((node.meta.get("val"), node) for node in reversed(forward.nodes))
    sizes = {value.node.expr: node for value, node in values if isinstance(value, SymInt)}
    copies = dict(sources)
    for node in (node for node in result.graph.nodes if node in needed):
        if node.op == "placeholder":
            size = None if is_tensor(node) else sizes.get(node.meta["val"].node.expr)
            if size is None:
                return None
            copies[node] = size
            continue
        arguments = [copies[argument] for argument in node.all_input_nodes]
        if (same := _same(node, arguments, copies)) is not None:
            copies[node] = same
            continue
        last = max(arguments or [next(iter(sources.values()))])  # nodes compare by their place in the graph
        with insertion_behind(last):
            copies[node] = forward.node_copy(node, copies.__getitem__)
    return copies[result]


def _same(node: fx.Node, arguments: Sequence[fx.Node], copies: Mapping[fx.Node, fx.Node]) -> fx.Node | None:
    """The node of the forward that computes the same already."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), copies.__getitem__)
    twins = (user for argument in arguments[:1] for user in argument.users if user.target is node.target)
    return next((twin for twin in twins if twin.args == args and twin.kwargs == kwargs), None)


def erase_unread(node: fx.Node) -> None:
    """Erases a node of the backward that nobody reads, and what only it read."""
    pending = [node]
    while pending:
        node = pending.pop()
        if node.op == "call_function" and not node.users and not node._erased:
            pending.extend(node.all_input_nodes)
            node.graph.erase_node(node)
