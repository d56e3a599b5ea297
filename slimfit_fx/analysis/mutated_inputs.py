"""Inputs that the model changes in place: when the backward runs, their old values are gone."""

from __future__ import annotations

from torch import fx

from slimfit_fx.graph.nodes import aten, base_of
from slimfit_fx.torch_internals import InputMutationAOTOutput


def mutated_inputs(graph: fx.Graph) -> set[fx.Node]:
    """Placeholders of a joint or forward graph that are changed: by AOTAutograd when the graph has run, or in the
    graph, by a last copy."""
    inputs = {node.meta.get("desc"): node for node in graph.find_nodes(op="placeholder")}
    described = graph.find_nodes(op="output")[0].meta.get("desc", ())
    after = {inputs.get(desc.mutated_input) for desc in described if isinstance(desc, InputMutationAOTOutput)}
    copied = {base_of(node.args[0]) for node in graph.nodes if node.target is aten.copy_.default}
    return {node for node in after | copied if node is not None and node.op == "placeholder"}
