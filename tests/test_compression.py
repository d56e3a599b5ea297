"""What codecs do to whole graphs: the forward is untouched, gradients are near, bytes are as reported."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import count_calls, handed_over, no_recompile, reference, run, tensors, transformed
from hypothesis import given
from hypothesis import strategies as st
from programs import Program, programs
from slimfit_fx.passes.compress import trace
from torch import nn

import slimfit_fx
from slimfit_fx.codecs import BitMask, Derivative, FixedPoint, Float8, Quantize, Recompute, TopK, TopOfBlock, WhenFrozen
from slimfit_fx.errors import ConfigError, ModelError
from slimfit_fx.graph.nodes import module_of
from slimfit_fx.presets import PRESETS
from slimfit_fx.runtime.registry import session_of

aten, ops = torch.ops.aten, torch.ops.slimfit_fx
EVERYTHING = {role: Quantize(8, 32) for role in slimfit_fx.ROLES if role not in ("dropout mask", "indices")}


def relative_error(found, exact) -> float:
    """Of all gradients together."""
    names = [name for name, gradient in exact.items() if gradient is not None and found[name] is not None]
    difference = sum((found[n] - exact[n]).double().square().sum() for n in names)
    return float(difference / sum(exact[n].double().square().sum() for n in names).clamp(min=1e-30)) ** 0.5


def rows(model: nn.Module) -> dict[str, dict]:
    """The report's rows by role, of the tensors that the caller does not hold."""
    return {row["role"]: row for row in slimfit_fx.report(model).rows if row["bytes"]}


@given(programs(), st.sampled_from(sorted(PRESETS)), st.floats(0, 1))
def test_forward_is_bit_identical_and_bytes_are_as_reported(program: Program, preset, freeze_rate):
    """Invariants 1 and 5 under every preset."""
    model = program.model()
    expected, _ = run(reference(model), program.inputs())
    slim, inputs = transformed(model, preset=preset, freeze_rate=freeze_rate), program.inputs()
    outputs, _ = run(slim, inputs)
    assert torch.equal(outputs, expected)
    report = slimfit_fx.report(slim)
    assert report.saved_bytes_after == handed_over(slim(**inputs), slim, inputs)


@given(programs((torch.float32,)))
def test_eight_bits_everywhere_leave_the_gradients_near(program: Program):
    """Every float that is saved goes through a codec; the steps of 8 bits are 0.8% of a group's largest element."""
    model, inputs = program.model(), program.inputs()
    _, exact = run(transformed(model, freeze_rate=0.0), inputs)
    slim = transformed(model, codecs=EVERYTHING, freeze_rate=0.0)
    _, found = run(slim, program.inputs())
    assert relative_error(found, exact) < 0.1


@given(programs((torch.float32,)))
def test_rebuilding_changes_no_gradient(program: Program):
    """`exact` rebuilds: the same operators on the same numbers."""
    model, inputs = program.model(), program.inputs()
    _, expected = run(reference(model), inputs)
    slim = transformed(model, freeze_rate=0.0)
    _, found = run(slim, program.inputs())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-5)
    stored = [row["bytes_stored"] for row in slimfit_fx.report(slim).rows]
    assert sum(stored) <= slimfit_fx.report(slim).saved_bytes_before


@given(programs((torch.float32,)))
def test_recompute_stores_no_more_than_its_alternative(program: Program):
    model = program.model()
    stored = []
    for codec in (None, Recompute(otherwise=None)):
        slim = transformed(model, codecs=dict.fromkeys(EVERYTHING, codec), freeze_rate=0.0)
        _, gradients = run(slim, program.inputs())
        stored.append((slimfit_fx.report(slim).saved_bytes_after, gradients))
    assert stored[1][0] <= stored[0][0]
    for name, gradient in stored[0][1].items():
        torch.testing.assert_close(stored[1][1][name], gradient, rtol=1e-4, atol=1e-5)


class Block(nn.Module):
    """A transformer block with every role in it."""

    def __init__(self, activation: nn.Module, width: int = 64):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.activation = activation

    def forward(self, x):
        heads = [layer(x).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v)]
        query, key, value = heads
        weights = F.dropout(torch.softmax(query @ key.transpose(-1, -2) / 4, -1), 0.1, self.training)
        x = self.norm(x + self.o((weights @ value).transpose(1, 2).flatten(2)))
        return x + F.dropout(self.down(self.activation(self.up(x))), 0.1, self.training)


def block(activation=None, **config) -> tuple[nn.Module, torch.Tensor]:
    """A transformed block behind a linear layer, after one training step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), Block(activation or nn.GELU()))
    slim = transformed(model, always_open=(), freeze_rate=0.0, **config)
    x = torch.randn(4, 32, 64)
    run(slim, {"input": x})
    return slim, x


def test_balanced_stores_every_role_as_its_table_says():
    slim, _ = block(preset="balanced")
    found = {role: row["stored_as"] for role, row in rows(slim).items()}
    assert found["activation input"] == found["attention operand"] == "int8, group 128"
    assert found["norm input"] == "int8, group 64, asymmetric"
    assert found["dropout mask"] == "bits"
    assert found["softmax output"] == "recomputed"
    assert found["feed-forward input"] == "rebuilt"
    report = slimfit_fx.report(slim)
    assert report.saved_bytes_after < report.saved_bytes_before / 6


@pytest.mark.parametrize("activation", [nn.GELU(), nn.GELU(approximate="tanh"), nn.SiLU()], ids=repr)
def test_the_derivative_is_stored_instead_of_the_input(activation):
    codecs = {"activation input": Derivative(Quantize(4, 32, symmetric=False))}
    slim, x = block(activation, codecs=codecs)
    assert rows(slim)["activation input"]["stored_as"].startswith("derivative, int4")
    assert rows(slim)["feed-forward input"]["stored_as"] == ""  # not a function of what is saved any more
    _, backward = slimfit_fx.graphs(slim)[0]
    assert not count_calls(backward, aten.erf.default) + count_calls(backward, aten.tanh.default)
    exact, _ = block(activation)
    _, expected = run(exact, {"input": x})
    _, found = run(slim, {"input": x})
    assert relative_error(found, expected) < 0.1


def test_an_exact_derivative_changes_no_gradient():
    """Moving the cut behind the derivative is exact up to rounding."""
    slim, x = block(nn.SiLU(), codecs={"activation input": Derivative(codec=None)})
    assert rows(slim)["activation input"]["stored_as"] == "derivative"
    exact, _ = block(nn.SiLU())
    _, expected = run(exact, {"input": x})
    _, found = run(slim, {"input": x})
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)


def test_a_gated_products_operand_falls_back_to_its_input():
    """SwiGLU's backward reads the gate's value besides its derivative."""

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.up, self.down = nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(32, 16)

        def forward(self, x):
            return self.down(F.silu(self.gate(x)) * self.up(x))

    torch.manual_seed(0)
    slim = transformed(nn.Sequential(nn.Linear(16, 16), Gated()), preset="tight", always_open=(), freeze_rate=0.0)
    run(slim, {"input": torch.randn(4, 8, 16)})
    assert rows(slim)["activation input"]["stored_as"] == "int4, group 64"
    assert rows(slim)["feed-forward input"]["stored_as"] == "rebuilt"


@pytest.mark.parametrize(
    "codec",
    [
        Quantize(8),
        Quantize(4, 32, symmetric=False, stochastic=True),
        Quantize(2, 32),
        FixedPoint(8, 1 / 16, -8.0),
        Float8(),
        TopK(0.5),
        TopOfBlock(4),
    ],
    ids=lambda codec: codec.label,
)
def test_any_codec_for_any_role(codec):
    roles = [role for role in slimfit_fx.ROLES if role not in ("dropout mask", "indices")]
    slim, x = block(codecs={**dict.fromkeys(roles, codec), "dropout mask": BitMask()})
    stored = [row for row in slimfit_fx.report(slim).rows if row["bytes_stored"] and row["dtype"] == "float32"]
    assert {row["stored_as"] for row in stored} == {codec.label}
    inputs = {"input": x}
    assert slimfit_fx.report(slim).saved_bytes_after == handed_over(slim(x), slim, inputs)


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


def test_query_key_and_value_are_computed_again():
    """From the norm whose output their linear layers read."""
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), Block(nn.GELU()))
    inputs, found = {"input": torch.randn(4, 32, 64)}, []
    for codec in (None, Recompute(otherwise=None)):
        slim = transformed(model, preset="exact", codecs={"attention operand": codec}, freeze_rate=0.0)
        _, gradients = run(slim, inputs)
        rows = [row for row in slimfit_fx.report(slim).rows if row["role"] == "attention operand"]
        found.append((sum(row["bytes_stored"] for row in rows), gradients))
    (kept, expected), (stored, gradients) = found
    assert kept >= 3 * 4 * 32 * 64 * 4 > stored == 0
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5)


def test_one_storage_is_stored_once():
    """Query, key and value as slices of one projection, each taken by the backward in two forms."""

    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.o = nn.Linear(16, 48), nn.Linear(16, 16)

        def forward(self, x):
            q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            return self.o((torch.softmax(q @ k.transpose(-1, -2), -1) @ v).transpose(1, 2).flatten(2))

    torch.manual_seed(0)
    slim = transformed(nn.Sequential(nn.Linear(16, 16), Fused()), preset="balanced", always_open=(), freeze_rate=0.0)
    x = torch.randn(2, 8, 16)
    run(slim, {"input": x})
    operands = [row for row in slimfit_fx.report(slim).rows if row["role"] == "attention operand"]
    # a step of two bytes for each head of each token
    assert 3 * 2 * 8 * 16 < sum(row["bytes_stored"] for row in operands) <= 3 * (2 * 8 * 16 + 2 * 8 * 2 * 2)
    assert slimfit_fx.report(slim).saved_bytes_after == handed_over(slim(x), slim, {"input": x})


def test_a_mask_is_not_rebuilt_from_rounded_numbers():
    """ReLU's sign is a function of its output, which the next layer keeps; it is stored as bits all the same."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))
    slim = transformed(model, preset="balanced", always_open=(), freeze_rate=0.0)
    run(slim, {"input": torch.randn(8, 16)})
    found = rows(slim)
    assert found["dropout mask"]["stored_as"] == "bits"
    assert found["feed-forward input"]["stored_as"] == "int8, group 128"


def test_a_norm_that_trains_keeps_its_input_whole():
    """The paper's rule: a closed norm's input is pruned; with an open one's whole no gradient has an error."""
    codecs = {"norm input": WhenFrozen(TopK(0.1))}
    exact, x = block(codecs={})
    slim, _ = block(codecs=codecs)
    norms = [name for name in slimfit_fx.gates(slim).names if name.endswith("norm.weight")]
    assert norms
    inputs = {"input": x}
    for gates in (slimfit_fx.gates(slim), slimfit_fx.gates(exact)):
        gates.set(gates.names)
    opened, expected = run(slim, inputs)[1], run(exact, inputs)[1]
    assert all(torch.equal(opened[name], expected[name]) for name in expected)
    whole = slimfit_fx.report(slim)
    assert whole.saved_bytes_after == handed_over(slim(x), slim, inputs)

    for model in (slim, exact):
        slimfit_fx.gates(model)[norms[0]] = False
    closed, expected = run(slim, inputs)[1], run(exact, inputs)[1]
    assert closed[norms[0]] is None
    assert 0 < relative_error(closed, expected) < 0.5
    pruned = slimfit_fx.report(slim)
    assert pruned.saved_bytes_after == handed_over(slim(x), slim, inputs)
    kept = [row for row in pruned.rows if row["layers"] == [norms[0]]]
    assert [row["bytes_now"] for row in kept] == [0]
    assert whole.saved_bytes_after - pruned.saved_bytes_after == kept[0]["bytes_stored"] == x.nbytes


def test_overrides_by_role_and_by_module():
    slim, _ = block(preset="balanced", codecs={"norm input": None, "activation input": Quantize(4), r"1\.up$": TopK()})
    found = rows(slim)
    assert found["norm input"]["stored_as"] == ""
    assert found["activation input"]["stored_as"] == "largest 10%"  # the module's override goes before the role's
    slim, _ = block(preset="balanced", codecs={r"^1": Quantize(4)})
    stored = {row["stored_as"] for row in slimfit_fx.report(slim).rows if row["module"].startswith("1")}
    assert stored >= {"bits", "int4, group 128"}  # masks have no four bits
    assert all(not row["stored_as"] for row in slimfit_fx.report(slim).rows if row["role"] == "statistics")


@pytest.mark.parametrize(
    ("codecs", "message"),
    [
        ({"norm input": "int8"}, "must be a codec"),
        ({"norm imput": Quantize(8)}, "matches no module"),
        ({"dropout mask": Quantize(8)}, "does not encode bool"),
        ({"(": Quantize(8)}, "not a regular expression"),
        ([Quantize(8)], "a mapping"),
    ],
)
def test_bad_overrides_are_named(codecs, message):
    with pytest.raises(ConfigError, match=message):
        slimfit_fx.transform(nn.Linear(4, 4), codecs=codecs)


def test_configurations_with_codecs_survive_json():
    config = slimfit_fx.Config(codecs={"norm input": None, "softmax output": Recompute(Quantize(4)), "^x": TopK(0.2)})
    assert slimfit_fx.Config.from_json(config.to_json()) == config
    with pytest.raises(ConfigError, match="unknown codec 'Quantise'"):
        slimfit_fx.Config.from_json('{"codecs": {"norm input": {"codec": "Quantise"}}}')
    with pytest.raises(ConfigError, match="unknown option of Quantize 'bit'"):
        slimfit_fx.Config.from_json('{"codecs": {"norm input": {"codec": "Quantize", "bit": 8}}}')


def test_checkpointed_blocks_and_memory_budgets_save_less_still():
    """What torch's own recomputation leaves is compressed all the same."""

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Block(nn.GELU()) for _ in range(2))

        def forward(self, x):
            for part in self.blocks:
                x = torch.utils.checkpoint.checkpoint(part, x, use_reentrant=False)
            return x

    torch.manual_seed(0)
    for model, budget in ((Checkpointed(), 1.0), (nn.Sequential(*(Block(nn.GELU()) for _ in range(2))), 0.5)):
        model = nn.Sequential(nn.Linear(64, 64), model)
        saved, inputs = {}, {"input": torch.randn(4, 32, 64)}
        with torch._functorch.config.patch(activation_memory_budget=budget):
            for preset in ("exact", "balanced"):
                slim = transformed(model, preset=preset, always_open=(), freeze_rate=0.0)
                outputs, gradients = run(slim, inputs)
                saved[preset] = handed_over(slim(**inputs), slim, inputs), gradients, outputs
                assert slimfit_fx.report(slim).saved_bytes_after == saved[preset][0]
        assert saved["balanced"][0] < saved["exact"][0] / 2
        assert torch.equal(saved["balanced"][2], saved["exact"][2])
        assert relative_error(saved["balanced"][1], saved["exact"][1]) < 0.1


def test_changing_sizes():
    """Dynamic batch and length: one recompile, then none; codes that do not fill their bytes."""
    torch.manual_seed(0)
    layers = (nn.Linear(16, 36), nn.GELU(), nn.Linear(36, 36), nn.LayerNorm(36), nn.Dropout(0.1), nn.Linear(36, 8))
    model = nn.Sequential(*layers)
    codecs = {"norm input": Quantize(4, 64), "activation input": Derivative(Quantize(2, 64)), "dropout mask": BitMask()}
    exact, slim = transformed(model, always_open=()), transformed(model, always_open=(), codecs=codecs)
    gates = slimfit_fx.gates(slim)
    for batch, length in ((4, 3), (6, 5)):
        run(slim, {"input": torch.randn(batch, length, 16)})
        run(exact, {"input": torch.randn(batch, length, 16)})
    assert {"int4, group 64", "derivative, int2, group 64", "bits"} <= {row["stored_as"] for row in rows(slim).values()}
    with no_recompile():
        for batch, length in ((7, 2), (3, 9)):
            inputs = {"input": torch.randn(batch, length, 16)}
            for model in (slim, exact):
                slimfit_fx.gates(model).set(gates.names)
            outputs, expected = slim(**inputs), exact(**inputs)
            assert outputs.shape == expected.shape
            assert relative_error(run(slim, inputs)[1], run(exact, inputs)[1]) < 0.5


def test_the_gradient_error_of_a_sample():
    slim, x = block(preset="tight")
    slim.zero_grad()
    state, before = torch.get_rng_state(), copy.deepcopy(slim.state_dict())
    report = slimfit_fx.report(slim, sample=x, loss=lambda outputs: outputs.square().mean())
    errors = report.gradient_errors
    assert set(errors) == {"all", *(name for name, _ in slim.named_parameters())}
    assert 0 < errors["all"].relative < 0.5
    assert errors["all"].cosine > 0.9
    assert "relative error" in str(report)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in slim.parameters())
    assert all(torch.equal(value, before[name]) for name, value in slim.state_dict().items())
    assert len(session_of(slim).captures) == 1
    with pytest.raises(ModelError, match="pass loss="):
        slimfit_fx.report(slim, sample=x)


def test_stochastic_rounding_is_seeded():
    """The same numbers whatever torch's random state, other numbers under another seed."""

    def gradients(seed):
        slim, x = block(codecs={"norm input": Quantize(2, 32, stochastic=True, seed=seed)})
        slim.eval().train()
        return run(slim, {"input": x})[1]["0.weight"]

    assert torch.equal(gradients(0), gradients(0))
    assert not torch.equal(gradients(0), gradients(1))


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
