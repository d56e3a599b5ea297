"""Keeps a normalised input whole for the steps at which its norm trains (SlimFit, section 4).

A norm's weight gradient is a sum over its input times a gradient: what was pruned is missing there. Where a row's
choice is `WhenFrozen`, the input is handed over a second time, by a `save_if_open` with the norm's gate. The backward
reads that one if it has rows.
"""

from __future__ import annotations

from collections import deque

from torch import fx

from slimfit_fx.codecs import WhenFrozen
from slimfit_fx.graph.gate_ops import ops
from slimfit_fx.graph.nodes import VIEWS, aten, bytes_of, call, hint, insertion_behind, is_pointwise
from slimfit_fx.graph.plan import Plan, SavedTensor
from slimfit_fx.graph.split import SplitGraph


def keep_trained(split: SplitGraph, plan: Plan) -> None:
    """Adds a dynamic row for every static one whose choice is `WhenFrozen`, and leaves the codec for frozen steps."""
    for produced, taken in list(split.saved()):
        row = plan.find(taken.name)
        if row is None or not isinstance(row.undecided, WhenFrozen):
            continue
        choice = row.undecided
        row.decide(choice.codec)
        gate = None if row.borrowed or row.dynamic else _trained_by(taken)
        if gate is not None:
            _keep_beside(split, plan, row, choice, produced, taken, gate)


def _trained_by(taken: fx.Node) -> int | None:
    """The gate of the nearest gated gradient that is a sum over something pointwise of `taken`."""
    pending, seen = deque(taken.users), set(taken.users)
    while pending:
        node = pending.popleft()
        if node.target is aten.sum.dim_IntList and (gate := _gate_of(node)) is not None:
            return gate
        if is_pointwise(node) or node.target in VIEWS:
            pending.extend(user for user in node.users if user not in seen)
            seen.update(node.users)
    return None


def _gate_of(total: fx.Node) -> int | None:
    """The gate of the layer whose gradient `total` is, up to shape and dtype, or a term of: a norm may be shared."""
    for user in total.users:
        if user.target is ops.pass_gradient.default:
            return user.args[2]  # type: ignore[return-value]
        reshaped = (user.target in VIEWS or is_pointwise(user)) and len(user.all_input_nodes) == 1
        if (reshaped or user.target is aten.add.Tensor) and (gate := _gate_of(user)) is not None:
            return gate
    return None


def _keep_beside(
    split: SplitGraph, plan: Plan, row: SavedTensor, choice: WhenFrozen, produced: fx.Node, taken: fx.Node, gate: int
) -> None:
    graph = split.forward.graph
    with insertion_behind(produced):
        kept = call(graph, ops.save_if_open.default, (produced, split.gates, [gate]), produced)

    def kept_or(placeholders: list[fx.Node]) -> fx.Node:
        static, whole = placeholders
        row.name = static.name
        rows = hint(produced.meta["val"].shape[0])
        again = SavedTensor(whole.name, row.module, row.role, row.shape, row.dtype, (gate,), nbytes=0, rows=rows)
        again.choice = choice
        again.store(bytes_of(kept, rows))
        plan.saved.insert(plan.saved.index(row) + 1, again)
        with split.insertion():
            node = call(split.backward.graph, ops.kept_or.default, (whole, static), taken)
        split.deferred.add(node)
        return node

    split.replace_saved(taken, [produced, kept], kept_or)
