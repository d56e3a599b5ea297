"""Numbers of Python that change from call to call."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import run
from small_net import X
from torch import nn

import slimfit_fx

USES = {
    "dropout": lambda h, t: F.dropout(h, t / 4, True),
    "power": lambda h, t: h.abs() ** t,
    "clamp": lambda h, t: h.clamp(max=t),
    "add": lambda h, t: torch.add(h, h, alpha=t),
    "fill": lambda h, t: h + torch.full_like(h, t),
    "layer norm": lambda h, t: F.layer_norm(h, (8,), eps=t * 1e-5),
    "attention": lambda h, t: F.scaled_dot_product_attention(h[None], h[None], h[None], scale=t)[0],
    "branch": lambda h, t: h if t < 9 else -h,
    "product": lambda h, t: h * t,
    "interpolation": lambda h, t: torch.lerp(h, h.tanh(), t / 2),
    "item": lambda h, t: h * torch.tensor(t).item(),
}


@pytest.mark.parametrize("use", USES)
def test_a_number_that_changes_from_call_to_call(use):
    """An annealed temperature, drop rate or weight of a loss: as many graphs as torch.compile makes."""

    class Annealed(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.last, self.t = nn.Linear(8, 8), nn.Linear(8, 3), 1.0

        def forward(self, x):
            return self.last(USES[use](torch.tanh(self.first(x)), self.t))

    found = []
    for kind in ("torch.compile", "slimfit_fx"):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model = Annealed()
        if kind == "slimfit_fx":
            slimfit_fx.transform(model, mode="eager", preset="exact", freeze_rate=0.0)
        else:
            model.compile(backend="aot_eager_decomp_partition")
        steps = []
        for step in range(4):
            model.t = 1.0 - 0.13 * step
            steps.append(run(model, {"x": X}, seed=step)[1])
        found.append((steps, torch._dynamo.utils.counters["stats"]["unique_graphs"]))
    (expected, least), (steps, graphs) = found
    assert graphs <= least
    for wanted, gradient in zip(expected, steps, strict=True):
        for name in wanted:
            assert (gradient[name] - wanted[name]).norm() <= 1e-5 * wanted[name].norm(), name
