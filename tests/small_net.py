"""A model that tests of calls share, and what must hold for its gradients."""

from __future__ import annotations

import torch
from helpers import run
from torch import nn

import slimfit_fx


class Net(nn.Module):
    """Blocks of one kind, and a head; `fault` is called behind the first."""

    def __init__(self, depth: int = 3, broken: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(depth))
        self.head = nn.Linear(8, 3)
        self.broken = broken  # by a graph break
        self.fault = lambda x: None

    def features(self, x):
        x = self.body[0](x)
        if self.broken:
            torch._dynamo.graph_break()
        self.fault(x)
        for block in self.body[1:]:
            x = block(x)
        return x

    def forward(self, x, y=None):
        if y is not None and x is not None:
            raise ValueError("give x or y, not both")
        return self.head(self.features(x if y is None else y))


X = torch.linspace(-1, 1, 32).view(4, 8)


def weights(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.dim() > 1]


def check_gates(slim: nn.Module, plain: nn.Module, x: torch.Tensor = X) -> None:
    """Open layers have the untransformed model's gradients, closed ones none."""
    gates = slimfit_fx.gates(slim)
    gates.set(gates.names[::2])
    _, expected = run(plain, {"x": x})
    _, found = run(slim, {"x": x})
    for name, gradient in found.items():
        if name in gates.closed:
            assert gradient is None, name
        else:
            assert (gradient - expected[name]).norm() <= 1e-5 * expected[name].norm(), name
