"""Norms whose pruned inputs are kept whole while they train, where one norm stands in several places."""

from __future__ import annotations

import pytest
import torch
from helpers import handed_over, run, transformed
from torch import Tensor, nn

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
