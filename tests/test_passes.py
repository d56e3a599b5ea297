"""Structure of the rewritten graphs, pass by pass."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import transformers
from helpers import count_calls
from slimfit_fx.passes.expose_gates import expose_gates
from torch import nn

import slimfit_fx
from slimfit_fx.graph.captured import Captured
from slimfit_fx.runtime.registry import session_of

ops = torch.ops.slimfit_fx


def graphs(model: nn.Module, x: torch.Tensor):
    """The split graph of `model`, every layer gated, and the fates of its gated parameters."""
    slimfit_fx.transform(model.train(), mode="eager", preset="exact", always_open=())
    model(x)
    forward, backward = slimfit_fx.graphs(model)[-1]
    session = session_of(model)
    fates = {session.layers[g.gate].name: g.conditional for g in session.plan.gradients}
    return forward, backward, fates


def kept_layers(forward) -> list[list[int]]:
    """Gates are numbered as the graph's inputs."""
    return [list(node.args[2]) for node in forward.graph.nodes if node.target is ops.save_if_open.default]


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o, self.i = (nn.Linear(16, 16) for _ in range(5))

    def forward(self, x):
        x = self.i(x)
        q, k, v = (layer(x).unflatten(-1, (2, 8)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_layers_that_share_an_input_share_one_kept_tensor():
    forward, backward, fates = graphs(Attention(), torch.randn(2, 4, 16))
    assert kept_layers(forward) == [[1, 2, 3]], "i runs first, then q, k and v"
    assert all(fates.values())
    assert count_calls(backward, ops.weight_gradient.default) == 5


def test_what_attentions_backward_reads_is_static():
    """The flash kernel's backward reads its output, which is also the output projection's input."""
    forward, backward, _ = graphs(Attention(), torch.randn(2, 4, 16))
    reads = {str(node.target) for node in backward.graph.nodes}
    assert any("flash_attention_for_cpu_backward" in name for name in reads)
    assert all(4 not in layers for layers in kept_layers(forward))


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.Tanh(), nn.Sigmoid(), nn.GELU(), nn.SiLU()], ids=str)
def test_an_activations_output_is_saved_once(activation):
    """tanh's backward reads its result: static. GELU's reads its input, of which the result is rebuilt. ReLU's needs
    one bit, so the result is dynamic."""
    model = nn.Sequential(nn.Linear(4, 4), activation, nn.Linear(4, 4))
    forward, _, fates = graphs(model, torch.randn(3, 4))
    assert kept_layers(forward) == ([[1]] if isinstance(activation, nn.ReLU) else [])
    assert fates == {"0.weight": True, "2.weight": True}
    saved = {row["dtype"]: row["bytes"] for row in slimfit_fx.report(model).rows if row["kind"] == "static"}
    assert saved["bool"] == (12 if isinstance(activation, nn.ReLU) else 2)


def test_an_input_of_the_model_is_not_copied():
    forward, backward, _ = graphs(nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 3, 4))
    assert kept_layers(forward) == []
    assert count_calls(backward, ops.weight_gradient.default) == 1


def test_conv1d_of_gpt2():
    """x @ w + b: the activation comes first in the product, transposed."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), transformers.pytorch_utils.Conv1D(6, 4))
    forward, _, fates = graphs(model, torch.randn(2, 3, 4))
    assert kept_layers(forward) == [[1]]
    assert fates == {"0.weight": True, "2.weight": True}


class Mixed(nn.Module):
    """One of each kind of parameter without a conditional form."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.conv = nn.Conv1d(4, 4, 3, padding=1)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.norm(self.conv(self.embed(x).transpose(1, 2)).transpose(1, 2)))


def test_what_has_no_conditional_form_is_computed_then_dropped():
    _, backward, fates = graphs(Mixed(), torch.randint(0, 7, (2, 5)))
    assert fates == {"embed.weight": False, "conv.weight": False, "norm.weight": False}  # the embedding is tied
    assert count_calls(backward, ops.pass_gradient.default) == 3


def test_nothing_gated_in_a_graph():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    slimfit_fx.transform(model, mode="eager", preset="exact", never_gate="^0", always_open=())
    model(torch.randn(2, 4))
    forward, backward = slimfit_fx.graphs(model)[0]
    assert count_calls(forward, ops.save_if_open.default) == 1
    assert count_calls(backward, ops.weight_gradient.default) == 1


def test_the_gates_are_the_last_input_and_dynamos_graph_stays_as_it_is():
    seen = []

    def backend(module, inputs):
        before = str(module.graph)
        exposed, examples = expose_gates(module, inputs, Captured(gates=3))
        assert str(module.graph) == before
        placeholders = exposed.graph.find_nodes(op="placeholder")
        assert len(placeholders) == len(examples) == len(inputs) + 1
        assert all(hasattr(node, "_dynamo_source") for node in placeholders)
        assert examples[-1].shape == (3,)
        assert not placeholders[-1].users
        torch.testing.assert_close(exposed(*inputs, torch.ones(3, dtype=torch.bool)), module(*inputs))
        seen.append(exposed)
        return module.forward

    torch.compile(nn.Linear(4, 4), backend=backend)(torch.randn(2, 4))
    assert len(seen) == 1


def test_the_partitioners_contract_is_kept():
    """The forward's outputs are the model's, then what the backward takes; each pass leaves a linted graph."""
    forward, backward, _ = graphs(Attention(), torch.randn(2, 4, 16))
    outputs = forward.graph.find_nodes(op="output")[0].args[0]
    taken = [n.meta["val"] for n in backward.graph.find_nodes(op="placeholder") if "tangents" not in n.name]
    handed = [node.meta["val"] for node in outputs[1:]]
    assert [(t.shape, t.dtype) for t in handed] == [(t.shape, t.dtype) for t in taken]
    gates = [node for node in forward.graph.find_nodes(op="placeholder") if node.meta["val"].dtype is torch.bool]
    assert outputs[1:].count(*gates) == 1
    forward.graph.lint()
    backward.graph.lint()
