"""The invariants of docs/architecture.md on generated models, in the interpreter mode."""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import torch
from differential import compared
from helpers import (
    count_calls,
    gated_parameters,
    handed_over,
    loss_of,
    no_recompile,
    reference,
    run,
    transformed,
)
from hypothesis import given
from hypothesis import strategies as st
from programs import Program, programs

import slimfit_fx
from slimfit_fx.graph.nodes import base_of, storage_of
from slimfit_fx.runtime.registry import session_of

ops = torch.ops.slimfit_fx


def assert_gradients_match(found, expected, frozen=()):
    """Frozen parameters have no gradient, all others the expected one."""
    for name, gradient in expected.items():
        if name in frozen:
            assert found[name] is None, f"{name} is frozen"
        elif gradient is None:
            assert found[name] is None, f"{name} never had a gradient"
        else:
            # the same operators on the same numbers; a kept copy may have another memory order, hence rounding
            tolerance = 1e-5 if gradient.dtype == torch.float32 else 2e-2
            torch.testing.assert_close(found[name], gradient, rtol=tolerance, atol=tolerance, msg=f"gradient of {name}")
    kept = {name: None if name in frozen else gradient for name, gradient in expected.items()}
    if any(gradient is not None and gradient.any() for gradient in kept.values()):
        each = 1e-4 if all(g is None or g.dtype == torch.float32 for g in kept.values()) else 2e-2
        assert not compared("gradients", found, kept, expected, each)


def choose_gates(data, model) -> set[str]:
    """Closes a random part of the gates; returns the names of the frozen parameters."""
    gates = slimfit_fx.gates(model)
    gates.set(name for name in gates.names if data.draw(st.booleans(), label=name))
    return {name for name, layer in gated_parameters(model).items() if not gates[layer]}


def grad_of_input(inputs):
    return inputs["x"].grad if inputs["x"].is_floating_point() else None


@given(programs(), st.data())
def test_forward_is_bit_identical_and_gradients_obey_the_gates(program: Program, data):
    """Invariants 1, 2 and 3."""
    model = program.model()
    expected_inputs, inputs = program.inputs(), program.inputs()
    expected, expected_gradients = run(reference(model), expected_inputs)

    slim = transformed(model, freeze_rate=0.5)
    frozen = choose_gates(data, slim)
    outputs, found = run(slim, inputs)

    assert torch.equal(outputs, expected)
    assert_gradients_match(found, expected_gradients, frozen)
    if grad_of_input(inputs) is not None:
        assert_gradients_match({"x": grad_of_input(inputs)}, {"x": grad_of_input(expected_inputs)})


@given(programs((torch.float32,)), st.data())
def test_a_backward_uses_the_gates_of_its_own_forward(program: Program, data):
    """Invariant 4: several forwards, each with its own gates, before one backward; one graph serves them all."""
    model = program.model()
    plain, slim = reference(model), transformed(model, freeze_rate=0.5)
    run(slim, program.inputs())  # captured once
    slim.zero_grad()

    losses, expected = [], dict[str, Any].fromkeys(name for name, _ in model.named_parameters())
    with no_recompile():
        for turn in range(3):
            frozen = choose_gates(data, slim)
            torch.manual_seed(turn)
            losses.append(loss_of(slim(**program.inputs(turn))))
            _, gradients = run(plain, program.inputs(turn), seed=turn)
            for name in expected.keys() - frozen:
                if gradients[name] is not None:
                    expected[name] = gradients[name] + (0 if expected[name] is None else expected[name])
        choose_gates(data, slim)
        torch.stack(losses).sum().backward()
    assert_gradients_match({name: p.grad for name, p in slim.named_parameters()}, expected)


@given(programs(), st.data())
def test_gradient_accumulation(program: Program, data):
    """Two micro-batches under the same gates add up."""
    model = program.model()
    plain, slim = reference(model), transformed(model, freeze_rate=0.5)
    frozen = choose_gates(data, slim)
    for turn in range(2):
        for m in (plain, slim):
            torch.manual_seed(turn)
            loss_of(m(**program.inputs(turn))).backward()
    expected = {name: p.grad for name, p in plain.named_parameters()}
    assert_gradients_match({name: p.grad for name, p in slim.named_parameters()}, expected, frozen)


@given(programs(), st.data())
def test_report_counts_what_is_handed_over(program: Program, data):
    """Invariant 5, and what freezing saves: dynamic tensors only, all of them when every gate is closed."""
    slim, inputs = transformed(program.model(), freeze_rate=0.5), program.inputs()
    for _ in range(2):
        choose_gates(data, slim)
        outputs = slim(**inputs)
        report = slimfit_fx.report(slim)
        assert report.saved_bytes_after == handed_over(outputs, slim, inputs)
    slimfit_fx.gates(slim).set([])
    static = sum(row["bytes_stored"] for row in slimfit_fx.report(slim).rows if row["kind"] == "static")
    assert handed_over(slim(**inputs), slim, inputs) == static
    report = slimfit_fx.report(slim)
    assert len(report.rows) == sum(total["tensors"] for total in report.by_role())


@given(programs())
def test_no_activation_is_saved_beside_its_kept_copy(program: Program):
    slim, inputs = transformed(program.model(), freeze_rate=0.5), program.inputs()
    slimfit_fx.gates(slim).set(slimfit_fx.gates(slim).names)
    slim(**inputs)
    forward, _ = slimfit_fx.graphs(slim)[0]
    results = [node for node in forward.graph.find_nodes(op="output")[0].args[0] if isinstance(node, torch.fx.Node)]
    storages = [storage_of(node) for node in results[1:] if base_of(node).target is not ops.save_if_open.default]
    for node in forward.graph.find_nodes(op="call_function", target=ops.save_if_open.default):
        assert storage_of(node.args[0]) not in storages


@given(programs())
def test_every_gated_gradient_passes_a_gate(program: Program):
    """Structure: one gated operator for each gated parameter, products only inside of it."""
    slim = transformed(program.model(), freeze_rate=0.5)
    slim(**program.inputs())
    _, backward = slimfit_fx.graphs(slim)[0]
    products = count_calls(backward, ops.weight_gradient.default)
    conditional = products + count_calls(backward, ops.embedding_gradient.default)
    dropped = count_calls(backward, ops.pass_gradient.default)
    assert conditional + dropped == len(gated_parameters(slim))
    linear = sum(n in ("linear", "linear_2d", "linear_no_bias", "projection") for n in program.steps)
    linear += sum({"branch": 3, "attention": 4, "math_attention": 4, "gated_unit": 3}.get(n, 0) for n in program.steps)
    assert products == linear + 1  # and the head
    assert conditional == products + program.embedded


@given(programs((torch.float32,)), st.data())
def test_a_closed_layer_multiplies_nothing(program: Program, data):
    """Invariant 3: as many weight-gradient products run as linear layers are open."""
    slim, inputs = transformed(program.model(), freeze_rate=0.5), program.inputs()
    outputs = slim(**inputs)
    gates = slimfit_fx.gates(slim)
    gated = [g for g in session_of(slim).plan.gradients if gates.names[g.gate] != "embed.weight"]
    choose_gates(data, slim)
    outputs = slim(**inputs)
    expected = sum(g.conditional and gates.table[g.gate].item() for g in gated)
    with mock.patch("slimfit_fx.graph.gate_ops.torch.mm", wraps=torch.mm) as products:
        loss_of(outputs).backward()
    assert products.call_count == expected


@given(programs())
def test_the_module_stays_what_it_was(program: Program):
    """Invariant 7."""
    model = program.model()
    before = {name: (t.dtype, t.device, t.data_ptr()) for name, t in model.state_dict().items()}
    attributes = set(vars(model))
    assert slimfit_fx.transform(model, mode="eager") is model
    run(model, program.inputs())
    assert {name: (t.dtype, t.device, t.data_ptr()) for name, t in model.state_dict().items()} == before
    assert set(vars(model)) - attributes <= {"_compiled_call_impl"}
    copied = copy.deepcopy(model)
    assert list(copied.state_dict()) == list(before)
