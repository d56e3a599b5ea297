"""Finds the saved tensors that no codec may change, whatever else they are to the backward."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import fx

from slimfit_fx.analysis.conditioning import Error, error_of, gradient_error_of, operator_of, reads_as_mask
from slimfit_fx.analysis.find_role import is_softmax, is_sum, leads_to
from slimfit_fx.graph.decide_in_forward import decide_in_forward
from slimfit_fx.graph.nodes import COPIES, VIEWS, aten, dependent_on_gradients, is_tensor, storage_of
from slimfit_fx.graph.plan import Plan
from slimfit_fx.graph.split import SplitGraph
from slimfit_fx.roles import EXACT, MASK

# Masks are made of numbers that no score reaches; some models take a large one in the place of infinity.
_HUGE = 1e4
_MIXES = frozenset({"where", "masked_fill", "add", "sub", "mul", "neg", "cat", "stack", "maximum", "minimum", "index"})
_NEVER_ENCODED = frozenset({"statistics", "logits", "indices"})
_FARTHEST = 64
_CONSTANTS = frozenset({aten.full.default, aten.full_like.default, aten.scalar_tensor.default})


def mark_exact(split: SplitGraph, plan: Plan) -> None:
    """Gives rows another role where a rounded tensor would spoil the backward: in a denominator, or in a mask.

    Where it only spoils comparisons (ReLU's sign), and a codec is chosen for it, they are made in the forward instead.
    """
    gradients = dependent_on_gradients(split.backward.graph)
    order = {node: index for index, node in enumerate(split.backward.graph.nodes)}
    fixed = _fixed(split)
    found, readings = {}, {}
    for produced, taken in split.saved():
        row = plan.find(taken.name)
        if row is None or row.borrowed or row.dynamic or not taken.meta["val"].is_floating_point():
            continue
        if _may_be_infinite(produced, fixed):
            found[storage_of(produced)] = MASK
            continue
        readings[taken] = _Reading(taken, gradients, order)
        _, choice = plan.rules.chosen(row.role, row.module, taken.meta["val"].dtype)
        lossless = choice is None or choice.lossless
        if readings[taken].is_close or (lossless and readings[taken].decisions):
            found.setdefault(storage_of(produced), EXACT)
    decided: dict[fx.Node, bool] = {}
    for produced, taken in list(split.saved()):
        row = plan.find(taken.name)
        if row is None or row.borrowed or row.role in _NEVER_ENCODED:
            continue
        row.role = found.get(storage_of(produced), row.role)
        if storage_of(produced) in found or taken not in readings:
            continue
        for decision in readings[taken].decisions:
            if decision not in decided:
                decided[decision] = decide_in_forward(split, plan, taken, decision)
            if not decided[decision]:
                row.role = EXACT


class _Reading:
    """What the backward does with a saved tensor before it meets a gradient, then, and in what is left of the same
    operator's backward. Behind that, the backward is linear.

    Attributes:
        is_close: whether an error of a codec may grow without limits.
        decisions: comparisons, which an error may turn.
    """

    def __init__(self, taken: fx.Node, gradients: Collection[fx.Node], order: Mapping[fx.Node, int]) -> None:
        self.is_close, self.decisions = False, list[fx.Node]()
        errors, pending = {taken: Error.SCALED}, set(taken.users)
        while pending and not self.is_close:
            node = min(pending, key=order.__getitem__)
            pending.remove(node)
            if node.op != "call_function":
                continue
            linear = node in gradients
            error = gradient_error_of(node, errors, gradients) if linear else error_of(node, errors)
            if error is Error.UNBOUNDED and is_tensor(node) and node.meta["val"].dtype is torch.bool:
                self.decisions.append(node)
                error = Error.NONE
            self.is_close = error is Error.UNBOUNDED
            if error:
                errors[node] = error
                pending.update(user for user in node.users if not linear or _same_formula(user, node))


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
    copies = {node, *(user for user in node.users if user.target in VIEWS or user.target in COPIES)}
    attention = any(reads_as_mask(reader, copies) for copy in copies for reader in copy.users)
    return attention or leads_to(node, is_softmax, is_sum)
