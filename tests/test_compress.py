"""Where codecs are spliced into the graphs, and as which operators."""

from __future__ import annotations

import pytest
import torch
from helpers import run, tensors, transformed
from slimfit_fx.passes.compress import trace
from torch import nn
from transformer_block import Block, block

import slimfit_fx
from slimfit_fx.codecs import BitMask, Quantize
from slimfit_fx.graph.nodes import module_of

aten, ops = torch.ops.aten, torch.ops.slimfit_fx


def test_encoding_follows_the_producer():
    slim, _ = block(preset="balanced")
    forward, _ = slimfit_fx.graphs(slim)[0]
    order = {node: index for index, node in enumerate(forward.graph.nodes)}
    for node in forward.graph.nodes:
        if node.target is aten.amax.default and node.args[0].target is aten.abs.default:  # of a group
            source = node
            while source.target in (aten.amax.default, aten.abs.default, aten.view.default, aten.permute.default):
                source = source.all_input_nodes[0]
            assert order[node] - order[source] < 20


def test_decoded_tensors_are_not_alive_together():
    """The first block's are decoded when the backward of the second one is through."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), Block(nn.GELU()), Block(nn.GELU()))
    slim = transformed(model, preset="balanced", always_open=(), freeze_rate=0.0)
    run(slim, {"input": torch.randn(4, 32, 64)})
    _, backward = slimfit_fx.graphs(slim)[0]
    order = {node: index for index, node in enumerate(backward.graph.nodes)}
    names = slimfit_fx.gates(slim).names
    products = [node for node in order if node.target is ops.weight_gradient.default]
    second = max(order[node] for node in products if names[node.args[3]].startswith("2."))
    decoded = [
        min(order[user] for user in node.users)
        for node in backward.graph.find_nodes(op="placeholder")
        if node.meta["val"].dtype in (torch.uint8, torch.int8) and module_of(node).startswith("1.")
    ]
    assert len(decoded) >= 4
    assert min(decoded) > second


def test_trace_decomposes():
    mode = torch._subclasses.FakeTensorMode()
    traced = trace(lambda x: Quantize(4).encode(x), mode.from_tensor(torch.randn(4, 128)))
    assert {node.target.namespace for node in traced.graph.nodes if node.op == "call_function"} <= {"aten", "prims"}
    assert len(tensors(traced(torch.randn(4, 128)))) == 2


@pytest.mark.parametrize("codec", [Quantize(8), Quantize(4, symmetric=False), BitMask()], ids=lambda codec: codec.label)
def test_a_trace_has_no_views_of_views(codec):
    mode, x = torch._subclasses.FakeTensorMode(), torch.randn(4, 6, 128)
    x = x > 0 if isinstance(codec, BitMask) else x

    def there_and_back(x):
        return codec.decode(codec.encode(x.permute(0, 1, 2)), x.shape, x.dtype).permute(0, 1, 2)

    traced = trace(there_and_back, mode.from_tensor(x))
    views = traced.graph.find_nodes(op="call_function", target=aten.view.default)
    assert all(view.args[0].target is not aten.view.default for view in views)
    assert not traced.graph.find_nodes(op="call_function", target=aten.permute.default)
    assert torch.equal(traced(x), there_and_back(x))
