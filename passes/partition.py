"""Cuts the joint graph into forward and backward."""

from __future__ import annotations

from typing import Any

from slimfit_fx.graph.joint import JointGraph
from slimfit_fx.graph.split import SplitGraph
from slimfit_fx.torch_internals import functorch_config, min_cut_rematerialization_partition


def partition(joint: JointGraph, inputs: Any, **options: Any) -> SplitGraph:
    """Cuts the joint graph into forward and backward by torch's own min-cut, told to prefer memory where that is
    nearly free.

    By default it saves whatever a matrix product of the backward reads. But a pointwise function of another saved
    tensor (the dropped-out softmax, next to the softmax and the mask) costs one small kernel to compute again.

    The extra outputs that earlier passes asked for kept their nodes in the forward; they are taken off again. Those
    that the backward needs are among the saved tensors by now, in the order that AOTAutograd expects.
    """
    total = joint.num_outputs + joint.extra_outputs
    with functorch_config.patch(ban_recompute_materialized_backward=False):
        forward, backward = min_cut_rematerialization_partition(joint.module, inputs, num_fwd_outputs=total, **options)
    output = forward.graph.find_nodes(op="output")[0]
    (results,) = output.args
    output.args = ([*results[: joint.num_outputs], *results[total:]],)  # type: ignore[index]
    if "desc" in output.meta:
        descriptions = list(output.meta["desc"])
        output.meta["desc"] = [*descriptions[: joint.num_outputs], *descriptions[total:]]
    forward.graph.eliminate_dead_code()
    return SplitGraph(forward, backward, joint.num_outputs, joint.activations)
