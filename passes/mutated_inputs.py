"""Inputs that the model changes in place: when the backward runs, their old values are gone."""

from __future__ import annotations

from torch import fx
from torch._functorch._aot_autograd.descriptors import InputMutationAOTOutput

from slimfit_fx.graph import aten, base_of, call, insertion_behind, is_tensor, storage_of
from slimfit_fx.split_graph import SplitGraph


def mutated_inputs(graph: fx.Graph) -> set[fx.Node]:
    """Placeholders of a joint or forward graph that are changed: by AOTAutograd when the graph has run, or in the
    graph, by a last copy."""
    inputs = {node.meta.get("desc"): node for node in graph.find_nodes(op="placeholder")}
    described = graph.find_nodes(op="output")[0].meta.get("desc", ())
    after = {inputs.get(desc.mutated_input) for desc in described if isinstance(desc, InputMutationAOTOutput)}
    copied = {base_of(node.args[0]) for node in graph.nodes if node.target is aten.copy_.default}
    return {node for node in after | copied if node is not None and node.op == "placeholder"}


def save_old_values(split: SplitGraph) -> None:
    """Hands over copies of what the backward wants of changed inputs. Autograd refuses the inputs themselves."""
    mutated = {storage_of(node) for node in mutated_inputs(split.forward.graph) if is_tensor(node)}
    for produced, taken in list(split.saved()):
        if storage_of(produced) in mutated:
            with insertion_behind(produced):
                copy = call(split.forward.graph, aten.clone.default, (produced,), produced)
            split.replace_saved(taken, [copy], lambda placeholders: placeholders[0])
