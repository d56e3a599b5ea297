"""Saves copies of what the backward wants of inputs that the model changes in place.

The partitioner takes any input for one that stays as it is. Autograd refuses one that has changed.
"""

from __future__ import annotations

from slimfit_fx.analysis.mutated_inputs import mutated_inputs
from slimfit_fx.graph.nodes import aten, call, insertion_behind, is_tensor, storage_of
from slimfit_fx.graph.plan import Plan
from slimfit_fx.graph.split import SplitGraph


def save_old_values(split: SplitGraph, _: Plan) -> None:
    """Saves copies of inputs that change before the backward reads them."""
    mutated = {storage_of(node) for node in mutated_inputs(split.forward.graph) if is_tensor(node)}
    for produced, taken in list(split.saved()):
        if storage_of(produced) in mutated:
            with insertion_behind(produced):
                copy = call(split.forward.graph, aten.clone.default, (produced,), produced)
            split.replace_saved(taken, [copy], lambda placeholders: placeholders[0])
