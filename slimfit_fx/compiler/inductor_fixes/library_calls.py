"""Keeps what a forward calls of libraries as it is without the passes.

Inductor decides by a result's readers whether a linear layer's bias is added by the product (`addmm`) or by a kernel
behind it, and by the number of operators whether convolutions take their channels last. Codecs read results, and are
operators. Another call may round in another way, and the forward would not be bit-identical. So the joint graph is cut
as torch.compile cuts it, too, and what Inductor decides for that forward it decides for ours.

CPU code has no such choices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import fx

from slimfit_fx.graph.joint import JointGraph
from slimfit_fx.graph.nodes import aten, is_tensor
from slimfit_fx.torch_internals import (
    GraphLowering,
    V,
    detect_fake_mode,
    min_cut_rematerialization_partition,
    post_grad,
)

from .replaced import replaced

_CHECK = "should_prefer_unfused_addmm"


@dataclass(frozen=True)
class LibraryCalls:
    """What Inductor decides for a forward graph.

    Attributes:
        unfused: by the name of the node that a product and its bias end in, whether a kernel adds the bias.
        channels_last: whether convolutions take and give tensors in that order.
    """

    unfused: Mapping[str, bool]
    channels_last: bool


def decided_without_passes(
    joint: fx.GraphModule, inputs: Sequence[object], num_fwd_outputs: int, **options: Any
) -> LibraryCalls | None:
    """What Inductor decides for the forward of a joint graph that no pass of ours has seen; None if there is no choice.

    Takes what AOTAutograd hands to a partitioner. The joint graph stays as it is.
    """
    if not any(_is_choice(node) for node in joint.graph.nodes):
        return None
    module = JointGraph.copy_of(joint, num_fwd_outputs).module
    forward, _ = min_cut_rematerialization_partition(module, inputs, num_fwd_outputs=num_fwd_outputs, **options)
    unfused: dict[str, bool] = {}
    prefers = getattr(post_grad, _CHECK)

    def noted(match: Any) -> bool:
        return unfused.setdefault(match.output_node().name, prefers(match))

    mode = detect_fake_mode([node.meta["val"] for node in forward.graph.nodes if is_tensor(node)])
    with V.set_fake_mode(mode), _checked_by(noted):
        post_grad.view_to_reshape(forward)
        post_grad.post_grad_passes(forward, is_inference=False)
    return LibraryCalls(unfused, GraphLowering.decide_layout_opt(forward, is_inference=False))


@contextmanager
def as_decided(calls: LibraryCalls | None) -> Iterator[None]:
    """Inside, Inductor decides as noted."""
    if calls is None:
        yield
        return
    prefers = getattr(post_grad, _CHECK)

    def repeated(match: Any) -> bool:
        name = match.output_node().name
        return calls.unfused[name] if name in calls.unfused else prefers(match)

    layout = staticmethod(lambda *_, **__: calls.channels_last)
    with _checked_by(repeated), replaced(GraphLowering, "decide_layout_opt", layout):
        yield


def _is_choice(node: fx.Node) -> bool:
    """Whether a node of a GPU's is a product with a bias, or a convolution."""
    if not is_tensor(node) or node.meta["val"].device.type == "cpu":
        return False
    if node.target is aten.mm.default:
        return any(user.target is aten.add.Tensor for user in node.users)
    return node.target in (aten.addmm.default, aten.convolution.default)


@contextmanager
def _checked_by(check: Callable[[Any], bool]) -> Iterator[None]:
    """Puts `check` where Inductor asks whether a bias is better added by a kernel: in the pattern that takes it out of
    a product, which holds the function, and in the one that puts it in, which looks it up."""
    original = getattr(post_grad, _CHECK)
    with ExitStack() as stack:
        stack.enter_context(replaced(post_grad, _CHECK, check))
        for patterns in post_grad.pass_patterns:
            for entry in (entry for entries in patterns.patterns.values() for entry in entries):
                if entry.extra_check is original:
                    stack.enter_context(replaced(entry, "extra_check", check))
        yield
