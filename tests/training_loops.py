"""A small model, and the ordinary loop that tests of training share."""

from __future__ import annotations

import helpers
import torch
from torch import nn

WIDTH = 8


def net(depth: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(depth)))


def batches(count: int, rows: int = 4):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(rows, WIDTH, generator=generator) for _ in range(count)]


def transformed(model: nn.Module, **config) -> nn.Module:
    return helpers.transformed(model, **{"freeze_rate": 0.0, "always_open": (), **config})


def assert_same(slim: nn.Module, model: nn.Module, tolerance: float = 1e-5) -> None:
    for name, value in model.state_dict().items():
        torch.testing.assert_close(slim.state_dict()[name], value, rtol=tolerance, atol=tolerance)


def adamw(parameters, **options) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01, **options)


def plain_loop(model, make=adamw, steps: int = 6) -> None:
    optimizer = make(model.parameters())
    for x in batches(steps):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
