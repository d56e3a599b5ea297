"""Products that Inductor pads before our passes run, as it does for GPUs: weight gradients stay conditional."""

from __future__ import annotations

import pytest
import torch
from slimfit_fx.passes.gate_dynamic import gate_dynamic
from torch import fx
from torch._functorch._aot_autograd.descriptors import GradAOTOutput, PlainAOTInput
from torch.fx.experimental.proxy_tensor import make_fx

from slimfit_fx.graph.gate_ops import ops
from slimfit_fx.graph.joint import JointGraph
from slimfit_fx.graph.plan import Plan

aten = torch.ops.aten
X, W, T = torch.randn(30, 22), torch.randn(22, 37), torch.randn(30, 37)
OPEN, CLOSED = torch.tensor([True]), torch.tensor([False])


def padded(a, b, rows, inner, columns):
    """a b by way of factors that are padded with zeros."""
    product = aten.mm(aten.constant_pad_nd(a, [0, inner, 0, rows]), aten.constant_pad_nd(b, [0, columns, 0, inner]))
    product = aten.slice(product, 0, 0, -rows) if rows else product
    return aten.slice(product, 1, 0, -columns) if columns else product


def joint_graph(gradient) -> JointGraph:
    """tanh(x) w, with `gradient(hidden, tangent)` for w."""

    def joint(x, w, gates, tangent):
        hidden = aten.tanh(x)
        return [padded(hidden, w, 2, 2, 3), gradient(hidden, tangent)]

    module = make_fx(joint, tracing_mode="fake")(X, W, OPEN, T)
    names = ["primals_1", "primals_2", "primals_3", "tangents_1"]
    for place, (node, name) in enumerate(zip(module.graph.find_nodes(op="placeholder"), names, strict=True)):
        node._rename(name)
        node.target = name
        node.meta["desc"] = PlainAOTInput(place)
    module.graph.find_nodes(op="output")[0].meta["desc"] = [None, GradAOTOutput(PlainAOTInput(1))]
    return JointGraph.copy_of(module, 1, gated=(1,))


def gated(gradient) -> tuple[JointGraph, Plan]:
    joint, plan = joint_graph(gradient), Plan()
    gate_dynamic(joint, plan)
    return joint, plan


def kept(joint: JointGraph) -> list[fx.Node]:
    return joint.graph.find_nodes(op="call_function", target=ops.save_if_open.default)


def check(gradient) -> None:
    joint, plan = gated(gradient)
    assert [found.conditional for found in plan.gradients] == [True]
    assert [node.args[0].target for node in kept(joint)] == [aten.tanh.default]
    torch.testing.assert_close(joint.module(X, W, OPEN, T)[-1], X.tanh().t() @ T)
    assert 0 in joint.module(X, W, CLOSED, T)[-1].shape


def test_padded_in_all_directions():
    check(lambda hidden, tangent: padded(hidden.t(), tangent, 2, 2, 3))


def test_padded_and_transposed():
    check(lambda hidden, tangent: padded(tangent.t(), hidden, 3, 2, 2).t())


def test_padded_along_the_tokens_only():
    check(lambda hidden, tangent: padded(hidden.t(), tangent, 0, 2, 0))


@pytest.mark.parametrize(
    "gradient",
    [
        lambda hidden, tangent: aten.constant_pad_nd(aten.mm(hidden.t(), tangent)[:, :-1], [0, 1]),
        lambda hidden, tangent: padded(hidden.t(), aten.constant_pad_nd(tangent, [0, 1], 1.0), 2, 2, 3)[:, :-1],
        lambda hidden, tangent: aten.mm(hidden.t(), aten.constant_pad_nd(tangent, [1, 0]))[:, :-1],
        lambda hidden, tangent: aten.mm(hidden.t(), aten.constant_pad_nd(tangent, [0, 1]))[:, 1:],
    ],
    ids=["less than the product", "padded with ones", "padded in front", "cut in front"],
)
def test_other_parts_of_products(gradient):
    """What is no weight gradient is computed, and right."""
    joint, plan = gated(gradient)
    assert [found.conditional for found in plan.gradients] == [False]
    torch.testing.assert_close(joint.module(X, W, OPEN, T)[-1], gradient(X.tanh(), T))


def test_padding_of_the_users_own():
    """A layer whose input the model pads: the gradient is as wide as the padded input."""
    joint, plan = gated(lambda hidden, tangent: aten.mm(tangent.t(), aten.constant_pad_nd(hidden, [0, 3])))
    assert [found.conditional for found in plan.gradients] == [True]
    assert [node.args[0].target for node in kept(joint)] == [aten.constant_pad_nd.default]
