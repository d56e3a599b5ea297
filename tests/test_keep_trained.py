"""Norms whose pruned inputs are kept whole while they train."""

from __future__ import annotations

import pytest
import torch
from helpers import handed_over, run, transformed
from torch import Tensor, nn
from transformer_block import block, relative_error

import slimfit_fx
from slimfit_fx.codecs import TopK, WhenFrozen


class Shared(nn.Module):
    def __init__(self, norm: nn.Module, uses: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(uses + 1))
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = x + self.norm(layer(x))
        return self.layers[-1](x)


@pytest.mark.parametrize("uses", [1, 2, 3])
@pytest.mark.parametrize("norm", [lambda: nn.LayerNorm(16), lambda: nn.RMSNorm(16)], ids=["layer", "rms"])
def test_every_input_of_a_shared_norm_is_kept_whole_while_it_trains(norm, uses):
    torch.manual_seed(0)
    model, inputs = Shared(norm(), uses), {"x": torch.randn(8, 16)}
    exact = transformed(model, always_open=(), freeze_rate=0.0)
    slim = transformed(model, always_open=(), freeze_rate=0.0, codecs={"norm input": WhenFrozen(TopK(0.1))})
    (_, found), (_, expected) = run(slim, inputs), run(exact, inputs)
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm(), name
    whole = handed_over(slim(**inputs), slim, inputs)
    slimfit_fx.gates(slim)["norm.weight"] = False
    pruned = handed_over(slim(**inputs), slim, inputs)
    assert whole - pruned == uses * 8 * 16 * 4
    assert pruned == slimfit_fx.report(slim).saved_bytes_after


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
