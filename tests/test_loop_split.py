"""Inductor's C++ loop split drops what is left over where a number does not divide a loop's length (torch 2.13)."""

from __future__ import annotations

from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from helpers import transformed
from torch import nn

from slimfit_fx import backend

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


@pytest.mark.parametrize("guarded", [True, False])
def test_a_users_graph_that_divides(guarded):
    """Right with the guard; the second case tells when it is no longer needed: the fault is torch's."""
    torch.manual_seed(0)
    model, x = BlockScaled().train(), torch.randn(64, 36)
    expected = gradients_of(model, x)
    unguarded = mock.patch.object(backend, "exact_loop_splits", nullcontext)
    with nullcontext() if guarded else unguarded, torch._inductor.config.patch(force_disable_caches=True):
        found = gradients_of(transformed(model, mode="inductor", freeze_rate=0.0), x)
    wrong = [name for name in expected if (found[name] - expected[name]).norm() > 1e-4 * expected[name].norm()]
    assert bool(wrong) is not guarded
