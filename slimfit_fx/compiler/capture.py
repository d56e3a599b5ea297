"""One captured graph."""

from __future__ import annotations

from dataclasses import dataclass, field

from slimfit_fx.graph.plan import Plan
from slimfit_fx.graph.split import SplitGraph

from .inductor_fixes.library_calls import LibraryCalls
from .origin import Origin


@dataclass(eq=False)
class Capture:
    """One captured graph: what is gated in it, and what the passes made of it.

    Attributes:
        gated: positions of the gated parameters among the inputs of the captured graph, each with a gate of its own.
        origin: why Dynamo made the graph.
        activations: positions of inputs that an earlier graph of the same forward made (after a graph break).
        retainable: whether `backward(retain_graph=True)` works; otherwise the backward reuses the memory of saved
            tensors ("donated buffers").
        library_calls: what Inductor decides for the forward without the passes; None where it has no choice.
        ran: whether it was called.
        split: the rewritten pair; None until the first training call compiled it.
        plan: of `split`.
    """

    gated: tuple[int, ...]
    origin: Origin = field(default_factory=Origin)
    activations: frozenset[int] = frozenset()
    retainable: bool = False
    library_calls: LibraryCalls | None = None
    ran: bool = False
    split: SplitGraph | None = None
    plan: Plan = field(default_factory=Plan)
