"""What codecs do to whole graphs: the forward is untouched, gradients are near, bytes are as reported."""

from __future__ import annotations

import pytest
import torch
from helpers import FLOAT_ROLES, handed_over, no_recompile, reference, run, transformed
from hypothesis import given
from hypothesis import strategies as st
from programs import Program, programs
from torch import nn
from transformer_block import Block, block, relative_error, rows

import slimfit_fx
from slimfit_fx.codecs import BitMask, Derivative, FixedPoint, Float8, Quantize, TopK, TopOfBlock
from slimfit_fx.presets import PRESETS


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
    slim = transformed(model, codecs=dict.fromkeys(FLOAT_ROLES, Quantize(8, 32)), freeze_rate=0.0)
    _, found = run(slim, program.inputs())
    assert relative_error(found, exact) < 0.1


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
    slim, x = block(codecs={**dict.fromkeys(FLOAT_ROLES, codec), "dropout mask": BitMask()})
    stored = [row for row in slimfit_fx.report(slim).rows if row["bytes_stored"] and row["dtype"] == "float32"]
    assert {row["stored_as"] for row in stored} == {codec.label}
    inputs = {"input": x}
    assert slimfit_fx.report(slim).saved_bytes_after == handed_over(slim(x), slim, inputs)


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


def test_stochastic_rounding_is_seeded():
    """The same numbers whatever torch's random state, other numbers under another seed."""

    def gradients(seed):
        slim, x = block(codecs={"norm input": Quantize(2, 32, stochastic=True, seed=seed)})
        slim.eval().train()
        return run(slim, {"input": x})[1]["0.weight"]

    assert torch.equal(gradients(0), gradients(0))
    assert not torch.equal(gradients(0), gradients(1))
