"""Each pass by itself, on a small graph that is written down here."""

from __future__ import annotations

import copy

import pytest
import torch
from hand_built import planned, split_graph, targets, tracing
from slimfit_fx.passes.choose_codecs import choose_codecs
from slimfit_fx.passes.chunk_loss import chunk_loss
from slimfit_fx.passes.compress import compress
from slimfit_fx.passes.expose_gates import expose_gates
from slimfit_fx.passes.gate_dynamic import gate_dynamic
from slimfit_fx.passes.keep_trained import keep_trained
from slimfit_fx.passes.make_plan import make_plan
from slimfit_fx.passes.mark_exact import mark_exact
from slimfit_fx.passes.partition import partition
from slimfit_fx.passes.rebuild import rebuild
from slimfit_fx.passes.save_derivatives import save_derivatives
from slimfit_fx.passes.save_old_values import save_old_values
from torch import fx
from torch._functorch._aot_autograd.descriptors import GradAOTOutput, PlainAOTInput
from torch.fx.experimental.proxy_tensor import make_fx

from slimfit_fx.codecs import Derivative, FixedPoint, Quantize, Recompute, TopK, WhenFrozen
from slimfit_fx.compiler import pipeline
from slimfit_fx.graph.captured import Captured
from slimfit_fx.graph.head_ops import head_cross_entropy
from slimfit_fx.graph.joint import JointGraph
from slimfit_fx.graph.nodes import keep_of
from slimfit_fx.graph.plan import Plan
from slimfit_fx.graph.split import SplitGraph
from slimfit_fx.roles import EXACT

aten, ops = torch.ops.aten, torch.ops.slimfit_fx
X, W = torch.linspace(-3, 3, 7 * 36).view(7, 36), torch.linspace(-1, 1, 36 * 100).view(36, 100).sin()
OPEN, CLOSED = torch.tensor([True]), torch.tensor([False])


def test_every_pass_has_a_test_here_or_a_file():
    here = {name.removeprefix("test_").partition("__")[0] for name in globals() if name.startswith("test_")}
    assert {entry.name for entry in pipeline.PIPELINE} - here == {
        "rebuild_if_open",
        "redraw_masks",
        "separate_seeds",
    }  # files of their own


def activation(x, w, gates):
    """y = 2 gelu(x w), which saves the product."""
    hidden = x @ w
    return [aten.gelu(hidden) * 2, hidden]


def activation_backward(hidden, tangent):
    return [aten.gelu_backward(tangent * 2, hidden)]


def run(split: SplitGraph, *inputs: torch.Tensor, gates: torch.Tensor = OPEN) -> tuple[list, list]:
    """The forward's results without what it saves, and the gradients, for tangents of ones."""
    split.finalize()
    results = split.forward(*inputs, gates)
    outputs, saved = results[: split.num_outputs], results[split.num_outputs :]
    return outputs, split.backward(*saved, *map(torch.ones_like, outputs))


def expected() -> torch.Tensor:
    hidden = (X @ W).requires_grad_()
    (torch.nn.functional.gelu(hidden) * 2).sum().backward()
    assert hidden.grad is not None
    return hidden.grad


def test_expose_gates():
    captured = fx.symbolic_trace(torch.nn.Identity())
    exposed, inputs = expose_gates(captured, [X], Captured(gates=3))
    names = [node.name for node in exposed.graph.find_nodes(op="placeholder")]
    assert (names[-1], len(names), len(inputs)) == ("slimfit_gates", 2, 2)
    assert (inputs[-1].shape, inputs[-1].dtype) == ((3,), torch.bool)
    assert len(captured.graph.find_nodes(op="placeholder")) == 1  # Dynamo goes on using its own


def head_and_loss(x, w, labels):
    logits = torch.nn.functional.linear(x, w)
    return torch.nn.functional.cross_entropy(logits.float().view(-1, 100), labels), logits


@pytest.mark.parametrize("only_loss", [False, True])
def test_chunk_loss(only_loss):
    inputs = {"x": X[:, :20], "w": W.t()[:, :20].contiguous(), "labels": torch.arange(7)}
    graphs = []
    torch.compile(head_and_loss, backend=lambda module, _: graphs.append(module) or module)(**inputs)
    (graph,) = graphs
    captured = Captured(gates=0, only_loss=only_loss)
    found, _ = chunk_loss(fx.GraphModule(graph, copy.deepcopy(graph.graph)), [], captured)
    assert len(found.graph.find_nodes(op="call_function", target=head_cross_entropy)) == only_loss
    expected = ([1], [""], []) if only_loss else ([], [], [""])
    assert (captured.left_out, captured.heads, captured.whole_heads) == expected
    by_shape = {value.shape: value for value in inputs.values()}
    outputs = found(*[by_shape[x.meta["example_value"].shape] for x in found.graph.find_nodes(op="placeholder")])
    assert len(outputs) == 1 + (not only_loss)
    torch.testing.assert_close(outputs[0], head_and_loss(**inputs)[0])


def joint_graph() -> JointGraph:
    """relu(x) w, of which w has a gate; x' gradient is wanted, too."""

    def joint(x, w, gates, tangent):
        hidden = aten.relu(x)
        return [aten.mm(hidden, w), aten.mm(tangent, w.t()), aten.mm(hidden.t(), tangent)]

    module = make_fx(joint, tracing_mode="fake")(X, W, OPEN, torch.ones(7, 100))
    placeholders = module.graph.find_nodes(op="placeholder")
    for place, (node, name) in enumerate(
        zip(placeholders, ["primals_1", "primals_2", "primals_3", "tangents_1"], strict=True)
    ):
        node._rename(name)
        node.target = name
        node.meta["desc"] = PlainAOTInput(place)
    output = module.graph.find_nodes(op="output")[0]
    output.meta["desc"] = [None, GradAOTOutput(PlainAOTInput(0)), GradAOTOutput(PlainAOTInput(1))]
    return JointGraph.copy_of(module, 1, gated=(1,))


def test_gate_dynamic():
    joint, plan = joint_graph(), Plan()
    gate_dynamic(joint, plan)
    (kept,) = joint.graph.find_nodes(op="call_function", target=ops.save_if_open.default)
    assert kept.args[0].target is aten.relu.default and kept.args[2] == [0]
    (gradient,) = plan.gradients
    assert (gradient.gate, gradient.conditional, gradient.output) == (0, True, 1)
    outputs = {flag: joint.module(X, W, torch.tensor([flag]), torch.ones(7, 100)) for flag in (True, False)}
    assert torch.equal(outputs[True][-1], X.relu().t() @ torch.ones(7, 100))
    assert outputs[False][-1].shape == (0, 100)


def test_partition():
    joint, plan = joint_graph(), Plan()
    gate_dynamic(joint, plan)
    placeholders = joint.graph.find_nodes(op="placeholder")
    split = partition(joint, [node.meta["val"] for node in placeholders], static_lifetime_input_indices=[])
    assert split.num_outputs == 1
    assert "slimfit_fx.save_if_open" in targets(split.forward)
    assert "slimfit_fx.weight_gradient" in targets(split.backward)
    assert len([pair for pair in split.saved() if keep_of(pair.node)]) == 1
    assert len(split.forward.graph.find_nodes(op="output")[0].args[0]) == 1 + len(list(split.saved()))


def test_save_old_values():
    def forward(x, w, gates):
        result = [x * w, x, w]
        aten.copy_(x, x + 1)
        return result

    split = split_graph(forward, lambda x, w, tangent: [tangent * w, tangent * x], [X, X.cos()])
    (changed,) = split.forward.graph.find_nodes(op="call_function", target=aten.copy_.default)
    split.forward.graph.find_nodes(op="output")[0].replace_input_with(changed, changed.args[0])  # as min-cut has it
    save_old_values(split, Plan())
    assert [node.target is aten.clone.default for node, _ in split.saved()] == [True, False]
    _, (_, gradient) = run(split, X.clone(), X.cos())
    assert torch.equal(gradient, X)


def test_make_plan():
    split, plan = split_graph(activation, activation_backward, [X, W]), Plan()
    make_plan(split, plan)
    (row,) = plan.saved
    assert (row.role, row.shape, row.dtype, row.nbytes) == ("activation input", (7, 100), "float32", 2800)
    assert not row.dynamic and not row.borrowed and row.codec is None


def test_mark_exact():
    split = split_graph(
        lambda x, w, gates: [x / (x @ w).sin()[:, :36], (x @ w)], lambda h, t: [t / h[:, :36], t * h[:, :36]], [X, W]
    )
    plan = planned(split)
    mark_exact(split, plan)
    assert [row.role for row in plan.saved] == [EXACT]


def test_choose_codecs():
    split = split_graph(activation, activation_backward, [X, W])
    plan = planned(split)
    choose_codecs(split, plan)
    assert [row.codec for row in plan.saved] == [Quantize(8)]
    plan = planned(split, "exact", **{"activation input": FixedPoint(8, 1.0, 0.0)})
    choose_codecs(split, plan)
    assert [row.codec for row in plan.saved] == [FixedPoint(8, 1.0, 0.0)]


def test_save_derivatives():
    split = split_graph(activation, activation_backward, [X, W])
    plan = planned(split, "exact", **{"activation input": Derivative(None)})
    choose_codecs(split, plan)
    _decompose_gelu(split)
    save_derivatives(split, plan)
    assert plan.saved[0].derived
    _, (gradient,) = run(split, X, W)
    torch.testing.assert_close(gradient, expected())
    assert not {"aten.erf", "aten.exp"} & set(targets(split.backward))


def _decompose_gelu(split: SplitGraph) -> None:
    """The backward in the operators that Inductor's decompositions make of it."""
    from torch._inductor.decomposition import select_decomp_table

    placeholders = split.backward.graph.find_nodes(op="placeholder")
    values, names = [node.meta["val"] for node in placeholders], [node.name for node in placeholders]
    with values[0].fake_mode:
        traced = make_fx(split.backward, decomposition_table=select_decomp_table())(*values)
    for node, name in zip(traced.graph.find_nodes(op="placeholder"), names, strict=True):
        node._rename(name)
        node.target = node.name
    split.backward = traced


@pytest.mark.parametrize("wish", [None, Recompute(None)])
def test_rebuild(wish):
    """A pointwise image of what is saved is made again; a product only if that is asked for."""

    def forward(x, w, gates):
        hidden = x @ w
        return [aten.relu(hidden) * 3, hidden, aten.relu(hidden)]

    split = split_graph(forward, lambda h, r, t: [t * h * r], [X, W])
    plan = planned(split, "exact", **({"other": wish} if wish else {}))
    choose_codecs(split, plan)
    before = split.forward(X, W, OPEN)
    rebuild(split, plan)
    assert [row.stored for row in plan.saved] == ([0, 0] if wish else [2800, 0])
    _, (gradient,) = run(split, X, W)
    assert torch.equal(gradient, torch.ones(7, 100) * before[1] * before[2])


def test_keep_trained():
    """The input of a norm is saved pruned and whole, the latter with the norm's gate."""

    def forward(x, gain, gates):
        return [x * gain, x.clone(), gates]

    def backward(x, gates, tangent):
        return [ops.pass_gradient((x * tangent).sum([0]), gates, 0)]

    split = split_graph(forward, backward, [X, X[0]])
    plan = planned(split, "exact", **{"other": WhenFrozen(TopK(0.25))})
    choose_codecs(split, plan)
    keep_trained(split, plan)
    assert [(row.gates, row.stored) for row in plan.saved[:2]] == [((), 1008), ((0,), 1008)]
    with tracing(split):
        compress(split, plan)
    assert plan.saved[0].stored < 1008 == plan.saved[1].stored
    _, (trained,) = run(split, X, X[0])
    assert torch.equal(trained, X.sum(0))


def test_compress():
    split = split_graph(activation, activation_backward, [X, W])
    plan = planned(split)
    choose_codecs(split, plan)
    compress(split, plan)
    codes, steps = split.saved()
    assert (codes.node.meta["val"].dtype, steps.node.meta["val"].dtype) == (torch.int8, torch.bfloat16)
    assert plan.saved[0].stored == 7 * 100 + 2 * steps.node.meta["val"].numel()
    outputs, (gradient,) = run(split, X, W)
    assert torch.equal(outputs[0], activation(X, W, OPEN)[0])
    difference = (gradient - expected()).norm() / expected().norm()
    assert 0 < difference < 0.02
