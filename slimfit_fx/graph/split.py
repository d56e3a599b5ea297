"""The split graph: a forward that also returns what the backward needs, and a backward.

    forward:   primals                                    -> outputs, saved tensors, saved sizes
    backward:  saved sizes, saved tensors, tangents       -> gradients

Passes change what is saved with `replace_saved` and `save`; where a node of the backward runs is settled at the end,
by `finalize`: directly before its first reader, so that decoded tensors are not alive together.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from slimfit_fx.torch_internals import SavedForBackwardsAOTOutput

from .nodes import VIEWS, InputKey, fake_result, gates_of, inputs_of, is_tensor, origin_of


@dataclass
class SplitGraph:
    """A forward and a backward graph that fit together, as the partitioner returns them.

    Attributes:
        activations: positions of inputs that only what is saved keeps alive, as in the joint graph.
        deferred: nodes of the backward that `finalize` moves to their first reader.
    """

    forward: fx.GraphModule
    backward: fx.GraphModule
    num_outputs: int
    activations: frozenset[int] = frozenset()
    deferred: set[fx.Node] = field(default_factory=set)

    def inputs(self) -> dict[InputKey, fx.Node]:
        """The forward's inputs, parameters included: see `inputs_of`."""
        return inputs_of(self.forward.graph)

    @property
    def gates(self) -> fx.Node:
        """The forward's last input."""
        return gates_of(self.forward.graph)

    def saved(self) -> Iterator[tuple[fx.Node, fx.Node]]:
        """Every saved tensor as (node of the forward, placeholder of the backward), in the order of handing over."""
        handed = [node for node in self._handed_over() if is_tensor(node)]
        taken = filter(is_tensor, self.backward.graph.find_nodes(op="placeholder"))
        return zip(handed, itertools.islice(taken, len(handed)), strict=True)

    def sizes(self) -> dict[Any, fx.Node]:
        """The backward's symbolic sizes: expression -> placeholder."""
        placeholders = self.backward.graph.find_nodes(op="placeholder")
        values = ((node.meta.get("val"), node) for node in placeholders)
        return {value.node.expr: node for value, node in values if isinstance(value, torch.SymInt)}

    def save(self, node: fx.Node) -> fx.Node:
        """Hands over one more tensor, a node of the forward; returns its placeholder."""
        first = next((taken for _, taken in self.saved()), None)
        if first is None:
            raise AssertionError("the tensor that is replaced is still saved")
        (placeholder,) = self._hand_over(0, first, [node])
        return placeholder

    def replace_saved(
        self, taken: fx.Node, produced: Sequence[fx.Node], restore: Callable[[list[fx.Node]], fx.Node]
    ) -> None:
        """Hands over other tensors instead of the one that the backward takes as `taken`.

        Args:
            taken: a placeholder of the backward.
            produced: nodes of the forward.
            restore: makes, from the placeholders of `produced`, the node that takes the place of `taken`. It adds
                nodes to the backward with `insertion()`.
        """
        restored = restore(self._hand_over(self._place(taken), taken, produced))
        taken.replace_all_uses_with(restored)
        if free_unbacked_symbols(taken.meta["val"]):
            _refresh_views(restored)
        handed = self._handed_over()
        del handed[self._place(taken)]
        self._set_handed_over(handed)
        self.backward.graph.erase_node(taken)

    def insertion(self) -> Any:
        """Where nodes of the backward are added, before anything that could read them; see `deferred`."""
        first = next(node for node in self.backward.graph.nodes if node.op != "placeholder")
        return self.backward.graph.inserting_before(first)

    def finalize(self) -> None:
        """Settles where deferred nodes run, removes what nobody reads, and checks both graphs."""
        graph = self.backward.graph
        waiting = set(self.deferred)

        def settle(node: fx.Node, reader: fx.Node) -> None:
            for argument in node.all_input_nodes:
                if argument in waiting:
                    waiting.discard(argument)
                    settle(argument, reader)
                    reader.prepend(argument)

        for node in list(graph.nodes):
            if node not in self.deferred:
                settle(node, node)
        for module in (self.forward, self.backward):
            module.graph.eliminate_dead_code()
            module.graph.lint()
            module.recompile()

    def _place(self, taken: fx.Node) -> int:
        return [placeholder for _, placeholder in self.saved()].index(taken)

    def _hand_over(self, place: int, before: fx.Node, produced: Sequence[fx.Node]) -> list[fx.Node]:
        """Adds saved tensors at `place`, and their placeholders in front of `before`."""
        handed = self._handed_over()
        handed[place:place] = produced
        self._set_handed_over(handed)
        placeholders = []
        with self.backward.graph.inserting_before(before):
            for node in produced:
                placeholder = self.backward.graph.placeholder(node.name)
                placeholder.target = placeholder.name  # generated code takes arguments by target, which may be taken
                placeholder.meta = {**origin_of(node), "val": node.meta["val"]}
                placeholders.append(placeholder)
        return placeholders

    def _handed_over(self) -> list[Any]:
        (results,) = self._output.args
        return list(results[self.num_outputs :])  # type: ignore[index]

    def _set_handed_over(self, handed: list[Any]) -> None:
        output = self._output
        (results,) = output.args
        output.args = ([*results[: self.num_outputs], *handed],)  # type: ignore[index]
        if "desc" in output.meta:
            saved = [SavedForBackwardsAOTOutput(place) for place in range(len(handed))]
            output.meta["desc"] = [*output.meta["desc"][: self.num_outputs], *saved]

    @property
    def _output(self) -> fx.Node:
        return self.forward.graph.find_nodes(op="output")[0]


def _refresh_views(node: fx.Node) -> None:
    """Computes the fake values of views again: the tensor behind them has got as many rows as it always has."""
    for user in node.users:
        if user.target in VIEWS:
            user.meta["val"] = fake_result(user)
            _refresh_views(user)
