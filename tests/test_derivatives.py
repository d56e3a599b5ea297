"""Derivatives that are saved instead of inputs, where they are negative: GELU's below -0.75, SiLU's below -1.28."""

from __future__ import annotations

import pytest
import torch
from helpers import count_calls, run, transformed
from torch import nn

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
