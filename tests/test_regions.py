"""Repeated blocks: compiled once, gated and compressed each by itself."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import timm
import torch
from helpers import gradients, handed_over, loss_of, no_recompile, reference, run, transformed
from small_bert import bert
from torch import nn
from torch.utils.checkpoint import checkpoint

import slimfit_fx
from slimfit_fx.codecs import Quantize
from slimfit_fx.runtime.registry import session_of


def test_blocks_share_a_graph_and_keep_their_gates():
    """As many graphs for three layers as for five. Each layer obeys its own gates, without a recompile."""
    captures = []
    for depth in (3, 5):
        model, inputs = bert(depth)
        slim = transformed(model, regions="blocks", freeze_rate=0.5)
        _, expected = run(reference(model, regions="blocks"), inputs)
        run(slim, inputs)
        captures.append(len(session_of(slim).captures))
        gates = slimfit_fx.gates(slim)
        generator = torch.Generator().manual_seed(0)
        with no_recompile():
            for _ in range(5):
                gates.set_flags((torch.rand(len(gates), generator=generator) < 0.5).tolist())
                _, found = run(slim, inputs)
                for name, gradient in found.items():
                    if name in gates and not gates[name]:
                        assert gradient is None, name
                    else:
                        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5)
    assert captures[0] == captures[1]


@pytest.mark.parametrize("preset", ["exact", "balanced", "tight", "paper"])
def test_the_forward_is_untouched_and_bytes_are_as_reported(preset):
    model, inputs = bert()
    slim = transformed(model, regions="blocks", preset=preset)
    expected, _ = run(reference(model, regions="blocks"), inputs)
    for open_names in ([], ["bert.encoder.layer.1.output.dense.weight"], slimfit_fx.gates(slim).names):
        slimfit_fx.gates(slim).set(open_names)
        outputs, _ = run(slim, inputs)
        assert torch.equal(outputs.logits, expected.logits)
        assert torch.equal(outputs.loss, expected.loss)
        outputs = slim(**inputs)
        report = slimfit_fx.report(slim)
        assert report.saved_bytes_after == handed_over(outputs, slim, inputs)
    modules = {row["module"] for row in report.rows}
    assert {f"bert.encoder.layer.{i}.attention.self" for i in range(3)} <= modules


def test_tight_computes_query_key_and_value_again_from_a_blocks_input():
    """One tensor that is saved instead of three, whatever is frozen."""
    model, inputs = bert()
    slim = transformed(model, regions="blocks", preset="tight")
    slimfit_fx.gates(slim).set([])
    slim(**inputs)
    rows = [row for row in slimfit_fx.report(slim).rows if row["module"].startswith("bert.encoder.layer.1.")]
    operands = [row for row in rows if row["role"] == "attention operand"]
    assert [row["stored_as"] for row in operands if row["dtype"] == "float32"].count("recomputed") >= 3
    (given,) = [row for row in rows if row["role"] == "linear input" and row["kind"] == "static"]
    assert given["module"].endswith("attention.self.query")
    assert "int4" in given["stored_as"]
    assert 0 < given["bytes_now"] < sum(row["bytes"] for row in operands) / 8


def test_a_frozen_block_keeps_none_of_its_linear_inputs():
    model, inputs = bert()
    slim = transformed(model, regions="blocks", always_open=())
    slimfit_fx.gates(slim).set([])
    slim(**inputs)
    dynamic = [row for row in slimfit_fx.report(slim).rows if row["kind"] == "dynamic"]
    assert dynamic
    assert not any(row["bytes_now"] for row in dynamic)
    assert {"bert.encoder.layer.2.attention.self.query.weight"} <= {name for row in dynamic for name in row["layers"]}


def test_a_codec_for_one_layer_is_used_there_only():
    model, inputs = bert()
    slim = transformed(model, regions="blocks", codecs={r"layer\.1\.": Quantize(4)})
    slim(**inputs)
    coded = {row["module"].split(".")[3] for row in slimfit_fx.report(slim).rows if "int4" in row["stored_as"]}
    assert coded == {"1"}


def test_parameters_outside_of_all_regions_train_always():
    model = timm.models.VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=3)
    slim = transformed(model.train(), regions="blocks")
    assert "blocks.0.attn.qkv.weight" in slimfit_fx.gates(slim)
    assert not {"cls_token", "pos_embed"} & set(slimfit_fx.gates(slim))
    slimfit_fx.gates(slim).set([])
    loss_of(slim(torch.randn(2, 3, 32, 32))).backward()
    assert slim.cls_token.grad is not None


def test_a_memory_budget_counts_every_block():
    model, inputs = bert()
    free = transformed(model, regions="blocks", freeze_rate=0.0, preset="paper")
    free(**inputs)
    report = slimfit_fx.report(free)
    closed = slimfit_fx.Report(report.plan, report.layers, [layer.always_open for layer in report.layers])
    budget = (report.saved_bytes_after + closed.saved_bytes_after) // 2
    slim = transformed(model, regions="blocks", preset="paper", memory_budget=budget)
    optimizer = torch.optim.SGD(slim.parameters(), lr=0.1)
    for _ in range(3):
        slim(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert slimfit_fx.report(slim).saved_bytes_after <= budget
    assert slimfit_fx.report(slim).saved_bytes_after > closed.saved_bytes_after


class Listed(nn.Module):
    """Two blocks, called in whatever way `call` says."""

    def __init__(self, call):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.GELU()) for _ in range(2))
        self.call = call

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = self.call(block, x)
        return x


def test_checkpointing_inside_of_a_block_composes():
    model, inputs = bert()
    model.config.attention_probs_dropout_prob = 0.0
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    whole = transformed(model, regions="blocks", freeze_rate=0.0)
    _, expected = run(whole, inputs)
    model.gradient_checkpointing_enable()
    slim = transformed(model, regions="blocks", freeze_rate=0.0)
    _, found = run(slim, inputs)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)
    assert slimfit_fx.report(slim).saved_bytes_after < slimfit_fx.report(whole).saved_bytes_after / 2


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_around_blocks_is_refused_by_name(reentrant):
    model = Listed(lambda block, x: checkpoint(block, x, use_reentrant=reentrant))
    slim = slimfit_fx.transform(model.train(), mode="eager", regions="blocks", always_open=())
    with pytest.raises(slimfit_fx.ModelError, match=r"blocks\.1 is computed again.*regions='model'"):
        slim(torch.randn(2, 4)).sum().backward()


def test_skipped_blocks():
    """A block that hands its input on is no block that was not compiled; a model that ran none of its graphs is."""
    slim = slimfit_fx.transform(Listed(lambda _, x: x).train(), mode="eager", regions="blocks", always_open=())
    slim(torch.randn(2, 4)).sum().backward()
    assert {run.path for run in session_of(slim).active} == {"first"}


def test_a_region_that_torch_gave_up_on_is_named():
    model = Listed(lambda block, x: block(x))
    slim = slimfit_fx.transform(model.train(), mode="eager", regions="blocks", always_open=())
    with (
        torch._dynamo.config.patch(recompile_limit=1),
        pytest.raises(slimfit_fx.BackendError, match="first ran without"),
    ):
        for dtype in (torch.float32, torch.float64):
            slim.to(dtype)(torch.randn(2, 4, dtype=dtype))


def test_a_named_backend_has_no_regions():
    model, inputs = bert(1)
    compiled = torch.compile(model, backend="slimfit_fx", options={"regions": "blocks", "mode": "eager"})
    with pytest.raises(Exception, match="needs slimfit_fx.transform"):
        compiled(**inputs)


@pytest.mark.parametrize("regions", ["model", "blocks"])
def test_an_outer_compiler_leaves_the_calls_alone(regions):
    """As Trainer's and accelerate's."""
    model, inputs = bert()
    slim = transformed(model, regions=regions, freeze_rate=0.5)
    outer = []
    torch.compile(slim, backend=lambda graph, _: outer.append(graph) or graph)(**inputs).loss.backward()
    assert len(session_of(slim).active) == (1 if regions == "model" else 6)
    assert not outer
    assert {name for name, gradient in gradients(slim).items() if gradient is None} == set(
        slimfit_fx.gates(slim).closed
    )


def test_undo_copies_and_evaluation_are_plain():
    model, inputs = bert()
    keys = list(model.state_dict())
    slim = transformed(model, regions="blocks")
    assert list(slim.state_dict()) == keys
    with torch.no_grad():
        slim(**inputs)
    slim.eval()(**inputs)
    assert not session_of(slim).captures
    plain = copy.deepcopy(slim)
    assert all(module._compiled_call_impl is None for module in plain.modules())
    slimfit_fx.undo(slim)
    assert all(module._compiled_call_impl is None for module in slim.modules())
    slim.train()(**inputs).loss.backward()
    assert all(gradient is not None for gradient in gradients(slim).values())


def test_a_session_dies_with_its_model():
    model, inputs = bert(2)
    slim = transformed(model, regions="blocks")
    slim(**inputs).loss.backward()
    alive = weakref.ref(session_of(slim))
    del slim
    gc.collect()
    assert alive() is None


def test_a_block_that_is_compiled_already_is_refused():
    model, _ = bert()
    model.bert.encoder.layer[1].compile()
    with pytest.raises(slimfit_fx.StateError, match="compiled already"):
        slimfit_fx.transform(model, regions="blocks")
