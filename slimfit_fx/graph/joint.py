"""The joint graph: forward and backward in one, as AOTAutograd traces them.

Its inputs are the model's ("primals") and the gradients of its outputs ("tangents"); its outputs are the model's
outputs and then one gradient, or None, per primal. The partitioner cuts it into a split graph (`split.py`). These two
files are the only ones that know the calling conventions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx

from slimfit_fx.torch_internals import GradAOTOutput, PlainAOTInput, fx_graph_cse

from .nodes import InputKey, call, gates_of, inputs_of, origin_of

_TRACED = "partitioner_tag"  # what AOTAutograd leaves on every node that it traces


@dataclass
class JointGraph:
    """The joint forward and backward graph, before it is partitioned.

    Attributes:
        gated: positions of the inputs that have a gate, in the order of the gates.
        activations: positions of inputs that an earlier graph of the same forward made (after a graph break): only what
            this graph saves of them keeps them alive.
        extra_outputs: how many nodes are kept for the backward, so far.
    """

    module: fx.GraphModule
    num_outputs: int
    gated: tuple[int, ...] = ()
    activations: frozenset[int] = frozenset()
    extra_outputs: int = 0

    @classmethod
    def copy_of(
        cls,
        module: fx.GraphModule,
        num_outputs: int,
        gated: tuple[int, ...] = (),
        activations: frozenset[int] = frozenset(),
    ) -> JointGraph:
        """A copy to rewrite, in which equal computations are one node: one view of an activation, for instance,
        instead of one for each layer that reads it."""
        graph = fx_graph_cse(module.graph)
        _label_replacements(graph)
        return cls(fx.GraphModule(module, graph), num_outputs, gated, activations)

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    @property
    def inputs(self) -> dict[InputKey, fx.Node]:
        """The model's inputs, parameters included: see `inputs_of`."""
        return inputs_of(self.graph)

    @property
    def gates(self) -> fx.Node:
        """The last input."""
        return gates_of(self.graph)

    @property
    def outputs(self) -> list[Any]:
        """What the model returns (and what is kept for the backward, so far)."""
        return self._results()[: self.num_outputs + self.extra_outputs]

    def gradients(self) -> dict[int, fx.Node]:
        """The gradients that the backward returns, by the position of their input.

        One that is a tensor subclass comes in parts, and is not among them.
        """
        results = self._results()
        return {position: results[place] for position, place in self._gradient_places().items()}

    def set_gradient(self, position: int, gradient: fx.Node) -> int:
        """Replaces the gradient of the input at `position`; returns its place among the backward's outputs."""
        place = self._gradient_places()[position]
        results = self._results()
        results[place] = gradient
        self._output.args = (results,)
        return place - self.num_outputs - self.extra_outputs

    def _gradient_places(self) -> dict[int, int]:
        """Where the gradient of an input is among the results. Parts of one input have one gradient."""
        places = {}
        for place, (result, description) in enumerate(zip(self._results(), self._output.meta["desc"], strict=True)):
            if isinstance(description, GradAOTOutput) and isinstance(result, fx.Node):
                source = description.grad_of
                if isinstance(source, PlainAOTInput):
                    places[source.idx] = place
        return places

    def add_output(self, node: fx.Node) -> None:
        """Makes the forward compute `node`, so that the partitioner does not move it to the backward."""
        results = self._results()
        end = self.num_outputs + self.extra_outputs
        self._output.args = ([*results[:end], node, *results[end:]],)
        descriptions = list(self._output.meta["desc"])
        self._output.meta["desc"] = [*descriptions[:end], None, *descriptions[end:]]
        self.extra_outputs += 1

    def insert(self, target: Callable[..., Any], args: tuple[Any, ...], *, before: fx.Node, origin: fx.Node) -> fx.Node:
        """Adds a call in front of the node `before`; its fake value is computed, its origin is that of `origin`."""
        with self.graph.inserting_before(before):
            return call(self.graph, target, args, origin)

    @property
    def _output(self) -> fx.Node:
        return self.graph.find_nodes(op="output")[0]

    def _results(self) -> list[Any]:
        (results,) = self._output.args
        return list(results)  # type: ignore[arg-type]


def _label_replacements(graph: fx.Graph) -> None:
    """Says of what code generation put in the place of a part of a decomposed operator whose part it is.

    Inductor rewrites a scaled softmax before our passes. The last node of the new ones has the origin of the old one,
    the others have none: they look like what the user wrote, a comparison and a difference in front of an exponential.
    """
    if not any(_TRACED in node.meta for node in graph.nodes):
        return
    for node in reversed(graph.nodes):
        if node.op == "call_function" and _TRACED not in node.meta:
            operators = {_decomposed(user) for user in node.users}
            if len(operators) == 1 and None not in operators:
                node.meta |= origin_of(next(iter(node.users)))


def _decomposed(node: fx.Node) -> Any:
    """The operator of whose decomposition a node is a part; None for one that stands for itself."""
    operator = node.meta.get("original_aten")
    return None if operator is None or operator is node.target else operator
