"""Finds the saved tensors that no codec may change, whatever else they are to the backward."""

from __future__ import annotations

from collections.abc import Collection

from torch import fx

from slimfit_fx.graph import COPIES, VIEWS, aten, dependent_on_gradients, is_tensor, storage_of
from slimfit_fx.plan import Plan
from slimfit_fx.roles import EXACT, MASK
from slimfit_fx.split_graph import SplitGraph

from .conditioning import Error, error_of, gradient_error_of, operator_of
from .find_role import is_softmax, is_sum, leads_to, readers_of_copies

# Masks are made of numbers that no score reaches; some models take a large one in the place of infinity.
_HUGE = 1e4
_MIXES = frozenset({"where", "masked_fill", "add", "sub", "mul", "neg", "cat", "stack", "maximum", "minimum", "index"})
_NEVER_ENCODED = frozenset({"statistics", "logits", "indices"})
_FARTHEST = 64
_CONSTANTS = frozenset({aten.full.default, aten.full_like.default, aten.scalar_tensor.default})


def mark_exact(split: SplitGraph, plan: Plan) -> None:
    """Gives rows another role where a rounded tensor would spoil the backward: in a denominator, or in a mask."""
    gradients = dependent_on_gradients(split.backward.graph)
    order = {node: index for index, node in enumerate(split.backward.graph.nodes)}
    fixed = _fixed(split)
    found = {}
    for produced, taken in split.saved():
        row = plan.find(taken.name)
        if row is None or row.borrowed or row.dynamic or not taken.meta["val"].is_floating_point():
            continue
        if _may_be_infinite(produced, fixed):
            found[storage_of(produced)] = MASK
        elif _is_read_closely(taken, gradients, order):
            found.setdefault(storage_of(produced), EXACT)
    for produced, taken in split.saved():
        row = plan.find(taken.name)
        if row is not None and storage_of(produced) in found and not row.borrowed and row.role not in _NEVER_ENCODED:
            row.role = found[storage_of(produced)]


def _is_read_closely(taken: fx.Node, gradients: Collection[fx.Node], order: dict[fx.Node, int]) -> bool:
    """Whether an error of a codec in `taken` may grow without limits before it meets a gradient, when it does, or in
    what is left of the same operator's backward. Behind that, the backward is linear."""
    errors = {taken: Error.SCALED}
    pending = set(taken.users)
    while pending:
        node = min(pending, key=order.__getitem__)
        pending.remove(node)
        if node.op != "call_function":
            continue
        linear = node in gradients
        errors[node] = gradient_error_of(node, errors, gradients) if linear else error_of(node, errors)
        if errors[node] is Error.UNBOUNDED:
            return True
        if errors[node]:
            pending.update(user for user in node.users if not linear or _same_formula(user, node))
    return False


def _same_formula(node: fx.Node, other: fx.Node) -> bool:
    """Whether two nodes belong to one operator's backward."""
    return node.meta.get("seq_nr") is not None and node.meta.get("seq_nr") == other.meta.get("seq_nr")


def _fixed(split: SplitGraph) -> set[fx.Node]:
    """Nodes of the forward that no gradient flows through: made of data, positions and constants."""
    (gradients,) = split.backward.graph.find_nodes(op="output")[0].args
    inputs = list(split.inputs().values())
    trained = {node for node, gradient in zip(inputs, gradients, strict=False) if gradient is not None}  # type: ignore[arg-type]
    fixed = set()
    for node in split.forward.graph.nodes:
        if node not in trained and fixed.issuperset(node.all_input_nodes):
            fixed.add(node)
    return fixed


def _may_be_infinite(node: fx.Node, fixed: Collection[fx.Node]) -> bool:
    """Whether `node` is a mask, or scores with a mask in them."""
    pending, seen = [node], set()
    while pending and len(seen) < _FARTHEST:
        node = pending.pop(0)
        if node in seen or not is_tensor(node) or not node.meta["val"].is_floating_point():
            continue
        seen.add(node)
        name = operator_of(node)
        if _has_huge_constant(node, fixed) or (node in fixed and (name == "log" or _masks_scores(node))):
            return True
        if node.target in VIEWS or node.target in COPIES or name in _MIXES:
            pending.extend(node.all_input_nodes)
    return False


def _has_huge_constant(node: fx.Node, fixed: Collection[fx.Node]) -> bool:
    if node.target in _CONSTANTS or (node in fixed and operator_of(node) in _MIXES):
        return any(isinstance(part, (int, float)) and abs(part) >= _HUGE for part in node.args)
    return False


def _masks_scores(node: fx.Node) -> bool:
    """Whether data and constants are added to what a softmax reads, or given to an attention that does so."""
    attention = any(operator_of(reader).startswith("_scaled_dot_product") for reader in readers_of_copies(node))
    return attention or leads_to(node, is_softmax, is_sum)
