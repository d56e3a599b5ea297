"""Keeps Inductor from saving copies of a model's inputs and weights.

Where a graph has convolutions, Inductor may lay out in channels-last order whatever four-dimensional tensor the
forward hands to the backward. For an input or a weight that is a copy, which lives until the backward. Outputs that
the user sees keep their strides, and so do these.
"""

from __future__ import annotations

from torch import fx

from slimfit_fx.graph.nodes import base_of, is_tensor

_VISIBLE = "user_visible_output_idxs"


def save_inputs_unchanged(forward: fx.GraphModule) -> None:
    """Marks the inputs that a forward graph saves as outputs of which the strides count."""
    output = forward.graph.find_nodes(op="output")[0]
    (results,) = output.args
    inputs = {
        place
        for place, node in enumerate(results)  # type: ignore[arg-type]
        if is_tensor(node) and base_of(node).op == "placeholder"  # type: ignore[arg-type]
    }
    output.meta[_VISIBLE] = sorted(inputs.union(output.meta.get(_VISIBLE, ())))
