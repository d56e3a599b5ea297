"""One call of a captured graph."""

from __future__ import annotations

from dataclasses import dataclass

from slimfit_fx.compiler.capture import Capture
from slimfit_fx.graph.plan import Plan


@dataclass(frozen=True)
class Run:
    """A captured graph, called for a training forward.

    Attributes:
        layers: the layer behind each gate of the graph; None where there is none.
        path: of the module that was called.
    """

    capture: Capture
    layers: tuple[int | None, ...]
    path: str

    @property
    def plan(self) -> Plan:
        """What this call saves, in terms of the model."""
        return self.capture.plan.in_model(self.layers, self.path)
