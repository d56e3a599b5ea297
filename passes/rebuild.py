"""Does not save what the backward can rebuild from other saved tensors.

A linear layer's input is often a pointwise function of a tensor that is saved anyway: GELU's output of GELU's input,
a norm's affine image of the normalised value, a view of anything. It is computed again in the backward, right before
it is used. One storage is thereby saved once, whatever views of it the backward takes.

Tensors whose choice is `Recompute` may also go through matrix products and reductions: the softmax of attention, from
query and key, and those from the input of their linear layers. If that is an activation that an earlier graph made, it
is saved for the purpose: one tensor for three.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_symbols

from slimfit_fx.analysis.conditioning import Error, error_of
from slimfit_fx.analysis.mutated_inputs import mutated_inputs
from slimfit_fx.codecs import Recompute
from slimfit_fx.graph.gate_ops import ops
from slimfit_fx.graph.nodes import CONVERSIONS, CREATIONS, VIEWS, aten, base_of, call, is_pointwise, is_tensor, keep_of
from slimfit_fx.graph.plan import Plan, SavedTensor
from slimfit_fx.graph.split import SplitGraph
from slimfit_fx.roles import EXACT, MASK

# Operators whose result has all that their argument has.
_RESTORABLE = frozenset(
    {
        aten.permute.default,
        aten.view.default,
        aten._unsafe_view.default,
        aten.alias.default,
        aten.detach.default,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.unsqueeze.default,
    }
)
_PRODUCTS = frozenset({aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default})
_REDUCTIONS = frozenset(
    {aten.amax.default, aten.sum.dim_IntList, aten.any.dim, aten.any.dims, aten.logical_not.default}
)
# A rebuilt tensor should cost about one fused kernel.
_LONGEST = 40


def rebuild(split: SplitGraph, plan: Plan) -> None:
    """Drops saved tensors that can be rebuilt, the last produced first, and says so in the plan.

    What is saved compressed later is compressed for all its readers.
    """
    recipes = _Recipes(split, plan)
    order = {node: index for index, node in enumerate(split.forward.graph.nodes)}
    for produced, taken in sorted(split.saved(), key=lambda pair: -order[pair[0]]):
        row = plan.find(taken.name)
        if row is None or row.borrowed:
            continue
        choice = row.undecided if isinstance(row.undecided, Recompute) else None
        if choice is None and not row.rebuildable:
            continue
        steps = recipes.find(produced, _recomputable if choice else _cheap, recomputed=choice is not None)
        if choice:
            row.decide(choice.otherwise)
        if steps is not None and recipes.are_accurate(steps, produced, row.role):
            split.replace_saved(taken, [], lambda _, steps=steps, node=produced: recipes.replay(steps, node))
            row.store(0, choice.label if choice else "rebuilt")


def _cheap(node: fx.Node) -> bool:
    return is_pointwise(node) or node.target in VIEWS or node.target in CREATIONS


def _recomputable(node: fx.Node) -> bool:
    return _cheap(node) or node.target in _PRODUCTS or node.target in _REDUCTIONS


@dataclass(frozen=True)
class _Step:
    """One node of the forward to compute in the backward: as the forward does, or by undoing one of its views."""

    node: fx.Node
    view: fx.Node | None = None

    @property
    def sources(self) -> list[fx.Node]:
        if self.view is not None:
            return [self.view]
        # the gates do not matter here: what is kept is rebuilt whole
        return self.node.all_input_nodes[:1] if self.keeps else self.node.all_input_nodes

    @property
    def keeps(self) -> bool:
        return self.node.target is ops.save_if_open.default

    @property
    def rounds(self) -> bool:
        """Whether the view is a copy with fewer digits, or a smaller range."""
        if self.view is None or self.view.target not in CONVERSIONS:
            return False
        source, copy = (x.meta["val"].dtype for x in (self.node, self.view))
        return torch.promote_types(source, copy) != copy


class _Recipes:
    """How to compute nodes of the forward in the backward, from what is saved at the moment."""

    def __init__(self, split: SplitGraph, plan: Plan) -> None:
        self.split, self.plan = split, plan
        # of an input that an earlier graph made, only what is saved is alive
        activations = {node for position, node in split.inputs().items() if position in split.activations}
        mutated = mutated_inputs(split.forward.graph)
        self.unusable = activations | mutated
        # forward nodes that what was rebuilt of them needs to the last bit
        self.exact: set[fx.Node] = set()
        self.kept_inputs = _kept_inputs(split, plan, activations - mutated)

    def find(self, wanted: fx.Node, allowed: Callable[[fx.Node], bool], *, recomputed: bool) -> list[_Step] | None:
        """The steps, in order, that make `wanted` without its being saved; None if there are none.

        Kept tensors are no sources: they are empty when their gates are closed. What is `recomputed` may take an input
        of which a copy is kept, which `replay` saves, and a saved copy in another dtype instead of what was converted.
        """
        saved = dict.fromkeys(node for node, _ in self.split.saved() if keep_of(node) is None and node is not wanted)
        views, savable = _viewed(saved, _RESTORABLE), {}
        if recomputed:
            views, savable = _viewed(saved, _RESTORABLE | CONVERSIONS) | views, self.kept_inputs
        steps: dict[fx.Node, _Step] = {}
        tried: set[fx.Node] = set()

        def visit(node: fx.Node) -> bool:
            if node in saved or node in steps:
                return True
            if node.op == "placeholder":
                return is_tensor(node) and (node not in self.unusable or node in savable)
            if node in tried:
                return False
            tried.add(node)
            step = _Step(node, views.get(node))
            possible = step.view is not None or step.keeps or allowed(node)
            if not is_tensor(node) or not possible or len(steps) >= _LONGEST:
                return False
            if not all(map(visit, step.sources)):
                return False
            steps[node] = step
            return True

        return list(steps.values()) if visit(wanted) else None

    def are_accurate(self, steps: list[_Step], wanted: fx.Node, role: str) -> bool:
        """Whether `wanted` can be computed from what codecs will have made of its sources; notes those that then have
        to stay exact.

        Masks and what stays exact itself are not made from rounded numbers; nor is anything by a division through
        them, a logarithm, a comparison.
        """
        worst = Error.SCALED
        if role in (EXACT, MASK) or wanted in self.exact or not wanted.meta["val"].is_floating_point():
            worst = Error.NONE
        sources = {source for step in steps for source in step.sources} - {step.node for step in steps}
        taken = dict(self.split.saved())
        rounded = {node for node in sources if self._is_rounded(node, taken.get(node))}
        if _error(steps, wanted, rounded) > worst:
            return False
        self.exact |= {source for source in sources - rounded if _error(steps, wanted, rounded | {source}) > worst}
        return True

    def _is_rounded(self, source: fx.Node, taken: fx.Node | None) -> bool:
        """Whether a codec changes what is saved, or would be saved, of a tensor."""
        row = self.kept_inputs.get(source) if taken is None else self.plan.find(taken.name)
        format = row and (row.undecided or row.codec)
        return format is not None and format.accepts(source.meta["val"].dtype)

    def replay(self, steps: list[_Step], wanted: fx.Node) -> fx.Node:
        """Adds the steps to the backward; returns the node that is `wanted` there."""
        there: dict[fx.Node, fx.Node] = dict(self.split.saved())
        for source in (source for step in steps for source in step.sources):
            if source.op == "placeholder" and source not in there:
                there[source] = self._save(source)
        with self.split.insertion():
            for step in steps:
                there[step.node] = self._copy(step, there)
        return there[wanted]

    def _save(self, source: fx.Node) -> fx.Node:
        """Hands an input over; an activation gets a static row beside that of its kept copy, which counts its bytes."""
        taken = self.split.save(source)
        if (kept := self.kept_inputs.get(source)) is not None:
            row = replace(kept, name=taken.name, gates=(), rows=0, nbytes=0, stored=0)
            if isinstance(row.undecided, Recompute):  # it is a source, and no longer to be computed
                row.decide(row.undecided.otherwise)
            self.plan.saved.insert(self.plan.saved.index(kept), row)
        return taken

    def _copy(self, step: _Step, there: dict[fx.Node, fx.Node]) -> fx.Node:
        graph = self.split.backward.graph
        if step.view is not None:
            copy = call(graph, *_undone(step.view, there[step.view]), step.node)
        elif step.keeps:
            return there[step.sources[0]]
        else:
            copy = graph.node_copy(step.node, there.__getitem__)
        self.split.deferred.add(copy)
        return copy


def _error(steps: list[_Step], wanted: fx.Node, rounded: Collection[fx.Node]) -> Error:
    """The error of what the steps make of sources of which some are rounded."""
    errors = dict.fromkeys(rounded, Error.SCALED)
    for step in steps:
        if step.view is not None or step.keeps:
            same = errors.get(step.sources[0], Error.NONE)
            errors[step.node] = max(same, Error.SCALED) if step.rounds else same
        else:
            errors[step.node] = error_of(step.node, errors)
    return errors.get(wanted, Error.NONE)


def _kept_inputs(split: SplitGraph, plan: Plan, activations: Collection[fx.Node]) -> dict[fx.Node, SavedTensor]:
    """Those of `activations` that a `save_if_open` hands over, with its row."""
    found = {}
    for produced, taken in split.saved():
        kept = keep_of(produced)
        if kept is not None and (source := base_of(kept.args[0])) in activations:  # type: ignore[arg-type]
            row = plan.find(taken.name)
            if row is not None:
                found[source] = row
    return found


def _viewed(saved: Collection[fx.Node], restorable: Collection[Any]) -> dict[fx.Node, fx.Node]:
    """Tensors of which a saved tensor is a view, or a copy, with all the elements: {tensor: its view}."""
    views = {}
    for node in saved:
        while _undoable(node, restorable):
            source = node.all_input_nodes[0]
            if source.op == "placeholder" or source in saved:
                break
            views[source] = node
            node = source
    return views


def _undoable(node: fx.Node, restorable: Collection[Any]) -> bool:
    if node.target not in restorable or not is_tensor(node) or free_symbols(node.meta["val"].shape):
        return False
    return node.target not in CONVERSIONS or _is_between_floats(node)


def _is_between_floats(conversion: fx.Node) -> bool:
    return all(x.meta["val"].is_floating_point() for x in (conversion, *conversion.all_input_nodes))


def _undone(view: fx.Node, there: fx.Node) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The call that makes the source of a view from the view, `there`."""
    if view.target is aten.permute.default:
        dims = [int(dim) % len(view.args[1]) for dim in view.args[1]]  # type: ignore[arg-type, union-attr]
        return aten.permute.default, (there, [dims.index(dim) for dim in range(len(dims))])
    source = view.all_input_nodes[0].meta["val"]
    if view.target in CONVERSIONS:
        return torch.ops.prims.convert_element_type.default, (there, source.dtype)
    return aten.view.default, (there, list(source.shape))
