"""What only generated code can show. Compiles a few small models; everything else is tested in the interpreter."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap

import pytest
import torch
import transformers
from helpers import gated_parameters, handed_over, no_recompile, reference, run, transformed

import slimfit_fx
from slimfit_fx.inspection.gradient_difference import gradient_errors

pytestmark = pytest.mark.inductor


def small_bert(depth: int = 1):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=depth,
        num_attention_heads=2,
        intermediate_size=64,
        problem_type="single_label_classification",  # else the model sets it in its first forward: a recompile
    )
    inputs = {
        "input_ids": torch.randint(2, 50, (4, 8)),
        "attention_mask": torch.ones(4, 8, dtype=torch.long),
        "labels": torch.randint(0, 2, (4,)),
    }
    return transformers.BertForSequenceClassification(config).train(), inputs


def test_bert():
    """The invariants under Inductor, and 200 steps with random gates without a recompile."""
    model, inputs = small_bert()
    expected, expected_gradients = run(reference(model, "inductor"), inputs)
    slim = transformed(model, mode="inductor", freeze_rate=0.5)
    gates, layer_of = slimfit_fx.gates(slim), gated_parameters(slim)
    outputs, _ = run(slim, inputs)
    assert torch.equal(outputs.logits, expected.logits)
    assert torch.equal(outputs.loss, expected.loss)

    generator = torch.Generator().manual_seed(0)
    sizes = {}
    with no_recompile():
        for _ in range(200):
            gates.set_flags((torch.rand(len(gates), generator=generator) < 0.5).tolist())
            outputs, found = run(slim, inputs)
            for name, gradient in expected_gradients.items():
                if name in layer_of and not gates[layer_of[name]]:
                    assert found[name] is None
                else:
                    torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)
        kept = "bert.encoder.layer.0.attention.output.dense.weight"  # its input is no function of what is saved
        for open_names in ([], [kept], gates.names):
            gates.set(open_names)
            outputs = slim(**inputs)
            sizes[len(open_names)] = handed_over(outputs, slim, inputs)
            assert slimfit_fx.report(slim).saved_bytes_after == sizes[len(open_names)]
    assert sizes[0] < sizes[1] == sizes[len(gates)], "the other layers' inputs are rebuilt"


def test_bert_compressed():
    """Codecs under Inductor: the forward is untouched, both modes agree, bytes are as reported, nothing recompiles."""
    model, inputs = small_bert()
    expected, exact = run(reference(model, "inductor"), inputs)
    slim = transformed(model, mode="inductor", preset="balanced", freeze_rate=0.0)
    outputs, found = run(slim, inputs)
    assert torch.equal(outputs.logits, expected.logits)
    assert torch.equal(outputs.loss, expected.loss)
    errors = gradient_errors(found, exact)
    assert 0 < errors["all"].relative < 0.02
    interpreted = transformed(model, preset="balanced", freeze_rate=0.0)
    run(interpreted, inputs)
    for ours, theirs in zip(slimfit_fx.graphs(slim)[0], slimfit_fx.graphs(interpreted)[0], strict=True):
        assert shapes(ours) == shapes(theirs)

    gates = slimfit_fx.gates(slim)
    generator = torch.Generator().manual_seed(0)
    with no_recompile():
        for _ in range(5):
            gates.set_flags((torch.rand(len(gates), generator=generator) < 0.5).tolist())
            outputs = slim(**inputs)
            assert slimfit_fx.report(slim).saved_bytes_after == handed_over(outputs, slim, inputs)
            outputs.loss.backward()


def test_blocks_compressed():
    """Blocks that share their compiled code: the same, each by its own gates."""
    model, inputs = small_bert(depth=2)
    expected, exact = run(reference(model, "inductor", "blocks"), inputs)
    slim = transformed(model, mode="inductor", preset="balanced", freeze_rate=0.0, regions="blocks")
    outputs, found = run(slim, inputs)
    assert torch.equal(outputs.logits, expected.logits)
    assert 0 < gradient_errors(found, exact)["all"].relative < 0.02
    gates = slimfit_fx.gates(slim)
    with no_recompile():
        for block in (0, 1):
            gates.set([name for name in gates.names if f"layer.{block}." in name])
            outputs, found = run(slim, inputs)
            assert torch.equal(outputs.logits, expected.logits)
            assert {name for name, gradient in found.items() if gradient is None} == set(gates.closed)
            outputs = slim(**inputs)
            assert slimfit_fx.report(slim).saved_bytes_after == handed_over(outputs, slim, inputs)


def shapes(graph: torch.fx.GraphModule) -> list[str]:
    """Of all inputs; a size that is known at run time only is called u."""
    values = [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]
    return sorted(re.sub(r"u\d+", "u", f"{value.dtype} {tuple(value.shape)}") for value in values)


def test_autocast_and_changing_sizes():
    """bf16 products, dynamic batch and width of the input: one recompile, then none."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(16, 32), torch.nn.GELU(), torch.nn.LayerNorm(32), torch.nn.Linear(32, 8)
    )
    plain, slim = reference(model, "inductor"), transformed(model, mode="inductor", always_open=())
    gates = slimfit_fx.gates(slim)
    with torch.autocast("cpu", torch.bfloat16):
        for batch in (4, 6):
            run(slim, {"input": torch.randn(batch, 3, 16)})
        with no_recompile():
            for batch, frozen in ((7, set()), (9, {"0.weight"}), (5, {"0.weight", "3.weight"})):
                gates.set(set(gates.names) - frozen)
                x = torch.randn(batch, 3, 16)
                _, found = run(slim, {"input": x})
                _, expected = run(plain, {"input": x})
                assert {name for name, gradient in found.items() if gradient is None} == frozen
                for name in found.keys() - frozen:
                    assert found[name].dtype is torch.float32
                    # fused kernels round intermediate values to bf16 (2**-8) in other places
                    assert (found[name] - expected[name]).norm() <= 2**-7 * expected[name].norm()


_WARM = textwrap.dedent(
    """
    import json, sys, torch, slimfit_fx
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU(), torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
    slimfit_fx.transform(model, always_open=(), freeze_rate=0.0, **json.loads(sys.argv[1]))
    gates = slimfit_fx.gates(model)
    gates.set([])
    model(torch.ones(4, 8)).sum().backward()
    row = slimfit_fx.report(model)
    frozen = sorted(name for name, p in model.named_parameters() if p.grad is None)
    hits = torch._dynamo.utils.counters["inductor"]["fxgraph_cache_hit"]
    print(json.dumps([frozen, row.saved_bytes_before, row.saved_bytes_after, hits]))
    """
)


def test_a_warm_cache_never_gives_another_configurations_code(tmp_path):
    """Pins the trap that an AOTAutograd cache hit skips the passes: four processes, one cache folder."""

    def process(**config):
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
        command = [sys.executable, "-c", _WARM, json.dumps(config)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return json.loads(done.stdout.splitlines()[-1])

    *cold, hits = process()
    assert cold[0] == ["0.weight", "2.weight", "3.weight"]
    assert hits == 0
    *other, _ = process(never_gate=["^2"])
    assert other[0] == ["0.weight", "3.weight"]
    for expected, config in ((cold, {}), (other, {"never_gate": ["^2"]})):
        *warm, hits = process(**config)
        assert warm == expected
        assert hits > 0, "the generated code was not found again"


def test_the_code_generator_knows_how_large_saved_tensors_are(monkeypatch):
    """By its own estimate a group's step is as large as what it scales: dead buffers would be kept for that."""
    from torch._inductor import memory

    counted = []
    estimate = memory.estimate_peak_memory

    def spy(nodes, inputs, outputs):
        counted.append(sum(buffer.mpi_buffer.size_free for name, buffer in inputs.items() if "tangent" not in name))
        return estimate(nodes, inputs, outputs)

    monkeypatch.setattr(memory, "estimate_peak_memory", spy)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 8))
    slim = transformed(model, mode="inductor", preset="balanced", always_open=["^0"], freeze_rate=1.0)
    with torch._inductor.config.patch(force_disable_caches=True):
        run(slim, {"input": torch.randn(32, 64)})
    quantised = sum(row.stored for row in slimfit_fx.report(slim).plan.saved if row.form)
    assert 0 < quantised <= counted[-1] < 1.1 * quantised


@pytest.mark.parametrize("preset", ["balanced", "tight", "paper"])
def test_a_kept_tensor_is_freed_when_its_codes_are_made(preset):
    """A result with as many rows as it has does not keep it: Inductor thinks so, for their number is read from it."""
    from torch._inductor.utils import run_and_get_code

    torch.manual_seed(0)
    layers = [torch.nn.Sequential(torch.nn.Linear(52, 52), Running()) for _ in range(3)]
    slim = transformed(torch.nn.Sequential(*layers, torch.nn.Linear(52, 3)), mode="inductor", preset=preset)
    with torch._inductor.config.patch(force_disable_caches=True):
        _, (forward, *_) = run_and_get_code(lambda: slim(torch.randn(3, 37, 52)).sum().backward())
    body = forward.partition("def call")[2]
    kept = re.findall(r"(buf\d+) = torch.ops.slimfit_fx.save_if_open", body)
    handed_over = set(re.findall(r"buf\d+", body.partition("return (")[2].partition(")")[0]))
    assert len(kept) >= 3
    assert not handed_over & set(kept)
    assert [name for name in kept if f"del {name}\n" not in body] == []


class Running(torch.nn.Module):
    """A sum over tokens, which nothing rebuilds."""

    def forward(self, x):
        return torch.cumsum(x, 1)
