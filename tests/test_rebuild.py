"""What is computed again from other saved tensors instead of being saved."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import FLOAT_ROLES, reference, run, transformed
from hypothesis import given
from programs import Program, programs
from torch import Tensor, nn
from transformer_block import Block, rows

import slimfit_fx
from slimfit_fx.codecs import Recompute


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
        slim = transformed(model, codecs=dict.fromkeys(FLOAT_ROLES, codec), freeze_rate=0.0)
        _, gradients = run(slim, program.inputs())
        stored.append((slimfit_fx.report(slim).saved_bytes_after, gradients))
    assert stored[1][0] <= stored[0][0]
    for name, gradient in stored[0][1].items():
        torch.testing.assert_close(stored[1][1][name], gradient, rtol=1e-4, atol=1e-5)


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


def test_a_mask_is_not_rebuilt_from_rounded_numbers():
    """ReLU's sign is a function of its output, which the next layer keeps; it is stored as bits all the same."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))
    slim = transformed(model, preset="balanced", always_open=(), freeze_rate=0.0)
    run(slim, {"input": torch.randn(8, 16)})
    found = rows(slim)
    assert found["dropout mask"]["stored_as"] == "bits"
    assert found["feed-forward input"]["stored_as"] == "int8, group 128"


class Attention(nn.Module):
    """Under autocast with dropout, a CPU multiplies in float32 and saves query, key and value in bfloat16."""

    def __init__(self, width: int = 44, heads: int = 4):
        super().__init__()
        self.heads = heads
        self.project, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        query, key, value = self.project(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(query, key, value, mask, dropout_p=0.1)
        return x + self.out(y.transpose(1, 2).flatten(2))


class Attentions(nn.ModuleList):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for layer in self:
            x = layer(x, mask)
        return x


@pytest.mark.parametrize("mode", ["eager", pytest.param("inductor", marks=pytest.mark.inductor)])
def test_softmax_under_autocast_is_recomputed_from_the_copies_of_query_and_key(mode):
    torch.manual_seed(0)
    x, mask = torch.randn(3, 37, 44), torch.rand(3, 1, 1, 37) > 0.2
    model = Attentions([Attention() for _ in range(3)]).train()
    found = {}
    for preset in ("exact", "balanced", "tight"):
        twin = copy.deepcopy(model)
        slimfit_fx.transform(twin, mode=mode, preset=preset, freeze_rate=0.0)
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16):
            twin(x, mask).square().mean().backward()
        found[preset] = {name: parameter.grad for name, parameter in twin.named_parameters()}
        rows = slimfit_fx.report(twin).rows
        assert sum(row["role"] == "attention operand" for row in rows) >= 9
        assert not [row for row in rows if row["role"] == "other"]
        softmax = [row["stored_as"] for row in rows if row["role"] == "softmax output"]
        assert softmax == ["" if preset == "exact" else "recomputed"] * 3
    for preset, bound in (("balanced", 0.05), ("tight", 0.15)):
        for name, expected in found["exact"].items():
            assert (found[preset][name] - expected).norm() < bound * expected.norm(), (preset, name)
