"""Inductor's C++ loop split drops what is left over where a number does not divide a loop's length (torch 2.13)."""

from __future__ import annotations

import pytest
import torch
from helpers import transformed
from torch import nn

from slimfit_fx.compiler.inductor_fixes import loop_split

pytestmark = pytest.mark.inductor


class BlockScaled(nn.Module):
    """A user's own groups: a scale for each ten of 36 features, the last group shorter."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(36, 36), nn.Linear(36, 3)
        self.scale = nn.Parameter(torch.rand(4) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = self.scale[:, None].expand(4, 10).reshape(40)[:36]
        return self.out(torch.tanh(self.into(x)) * scale)


def gradients_of(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_a_users_graph_that_divides(monkeypatch):
    """Ten does not divide 36: without the guard, the last 6 elements of a row are what the memory held before."""
    refused = []
    divides = loop_split._divides
    monkeypatch.setattr(loop_split, "_divides", lambda node: divides(node) or refused.append(node))
    torch.manual_seed(0)
    model, x = BlockScaled().train(), torch.randn(64, 36)
    expected = gradients_of(model, x)
    with torch._inductor.config.patch(force_disable_caches=True):
        found = gradients_of(transformed(model, mode="inductor", freeze_rate=0.0), x)
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-4 * gradient.norm(), name
    assert refused, "this graph does not meet what it is a test of"
