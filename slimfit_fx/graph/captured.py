"""What passes on a captured graph are told beside the graph, and what they tell."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Captured:
    """What is known of a graph from Dynamo.

    Attributes:
        gates: how many there are, one for each gated input.
        only_loss: whether logits may be left out of what the graph returns.
        left_out: places among the graph's outputs that are left out.
        heads: paths of the modules whose linear head and loss are computed in parts.
        whole_heads: the same of those that are not, because the graph returns their logits.
    """

    gates: int
    only_loss: bool = False
    left_out: list[int] = field(default_factory=list)
    heads: list[str] = field(default_factory=list)
    whole_heads: list[str] = field(default_factory=list)
