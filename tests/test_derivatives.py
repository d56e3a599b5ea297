"""Derivatives that are saved instead of inputs, negative ones (GELU's below -0.75, SiLU's below -1.28) among them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import count_calls, run, transformed
from torch import nn
from transformer_block import block, relative_error, rows

import slimfit_fx
from slimfit_fx.codecs import Derivative, Quantize

aten = torch.ops.aten
ACTIVATIONS = [nn.GELU(), nn.GELU(approximate="tanh"), nn.SiLU(), nn.Mish()]


def model_of(activation: nn.Module) -> nn.Module:
    """Almost all of the activation's inputs lie between -4 and -1."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.Linear(64, 64), activation, nn.Linear(64, 4))
    with torch.no_grad():
        model[1].bias.fill_(-2.2)
    return model


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize(
    ("config", "tolerance"),
    [
        ({"codecs": {"activation input": Derivative(None)}}, 1e-5),
        ({"codecs": {"activation input": Derivative(Quantize(8))}}, 0.02),
        ({"codecs": {"activation input": Derivative(Quantize(4, 32, symmetric=False))}}, 0.1),
        ({"preset": "tight"}, 0.5),
    ],
    ids=["exact", "int8", "int4", "tight"],
)
def test_negative_derivatives_stay_negative(activation, config, tolerance):
    model, x = model_of(activation), torch.randn(32, 16)
    slim = transformed(model, always_open=(), freeze_rate=0.0, **config)
    _, found = run(slim, {"input": x})
    _, expected = run(transformed(model, always_open=(), freeze_rate=0.0), {"input": x})
    forms = [row["stored_as"] for row in slimfit_fx.report(slim).rows if row["role"] == "activation input"]
    assert forms
    assert all(form.startswith("derivative") for form in forms)
    for name in ("0.weight", "0.bias", "1.weight", "1.bias"):
        assert (found[name] - expected[name]).norm() <= tolerance * expected[name].norm(), name
    _, backward = slimfit_fx.graphs(slim)[0]
    assert not sum(count_calls(backward, op) for op in (aten.erf.default, aten.tanh.default, aten.exp.default))


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
