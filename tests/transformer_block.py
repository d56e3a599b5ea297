"""A transformer block that tests of compression share, and what they ask of it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from helpers import run, transformed
from torch import nn

import slimfit_fx


def relative_error(found, exact) -> float:
    """Of all gradients together."""
    names = [name for name, gradient in exact.items() if gradient is not None and found[name] is not None]
    difference = sum((found[n] - exact[n]).double().square().sum() for n in names)
    return float(difference / sum(exact[n].double().square().sum() for n in names).clamp(min=1e-30)) ** 0.5


def rows(model: nn.Module) -> dict[str, dict]:
    """The report's rows by role, of the tensors that the caller does not hold."""
    return {row["role"]: row for row in slimfit_fx.report(model).rows if row["bytes"]}


class Block(nn.Module):
    """A transformer block with every role in it."""

    def __init__(self, activation: nn.Module, width: int = 64):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.activation = activation

    def forward(self, x):
        heads = [layer(x).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v)]
        query, key, value = heads
        weights = F.dropout(torch.softmax(query @ key.transpose(-1, -2) / 4, -1), 0.1, self.training)
        x = self.norm(x + self.o((weights @ value).transpose(1, 2).flatten(2)))
        return x + F.dropout(self.down(self.activation(self.up(x))), 0.1, self.training)


def block(activation=None, **config) -> tuple[nn.Module, torch.Tensor]:
    """A transformed block behind a linear layer, after one training step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), Block(activation or nn.GELU()))
    slim = transformed(model, always_open=(), freeze_rate=0.0, **config)
    x = torch.randn(4, 32, 64)
    run(slim, {"input": x})
    return slim, x
