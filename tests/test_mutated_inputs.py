"""Inputs and buffers that the forward changes in place: the backward needs values as they were, or as they became."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import transformed
from torch import Tensor, nn

import slimfit_fx
from slimfit_fx.analysis.mutated_inputs import mutated_inputs

TOLERANCE = {"exact": 1e-5, "balanced": 0.02, "tight": 0.2, "paper": 0.2}


class Base(nn.Module):
    state: Tensor

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.register_buffer("state", torch.linspace(0.5, 1.5, 16))


class Decay(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.state.mul_(0.5)
        return self.head(self.b(F.gelu(self.a(x)) * self.state))


class Counter(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.state.add_(1)
        return self.head(self.b(torch.tanh(self.a(x)) / self.state))


class Running(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        with torch.no_grad():
            self.state.lerp_(h.abs().mean(0), 0.1)
        return self.head(self.b(F.gelu(h / self.state)))


class OldAndNew(Base):
    """The value as it was is read as well, through a copy."""

    def forward(self, x: Tensor) -> Tensor:
        old = self.state.clone()
        self.state[:8] += 1
        return self.head(self.b(self.a(x) * old + F.silu(self.a(x)) * self.state))


class PartOfIt(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.state.view(4, 4)[1].fill_(2.0)
        return self.head(self.b(F.gelu(self.a(x)) * self.state.exp()))


class Data(Base):
    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2)
        return self.head(self.b(F.gelu(self.a(x))))


class DataInThePlaceOf(Base):
    """Scaled where it is read again."""

    def forward(self, x: Tensor) -> Tensor:
        x.sub_(x.mean(-1, keepdim=True))
        return self.head(self.b(F.gelu(self.a(x)) * x.sigmoid()))


MODELS = [Decay, Counter, Running, OldAndNew, PartOfIt, Data, DataInThePlaceOf]


def trained(model: nn.Module) -> tuple[dict[str, Any], Any]:
    torch.manual_seed(1)
    for _ in range(2):
        x = torch.randn(8, 16)
        model(x).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}, model.state


def check(model: nn.Module, slim: nn.Module, tolerance: float) -> None:
    (expected, state), (found, slim_state) = trained(copy.deepcopy(model)), trained(slim)
    torch.testing.assert_close(slim_state, state)
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= tolerance * gradient.norm(), name


@pytest.mark.parametrize("preset", TOLERANCE)
@pytest.mark.parametrize("kind", MODELS)
def test_gradients_are_those_of_the_untransformed_model(kind, preset):
    torch.manual_seed(0)
    model = kind().train()
    check(model, transformed(model, preset=preset, freeze_rate=0.0), TOLERANCE[preset])


@pytest.mark.inductor
def test_the_code_generator_keeps_the_copies():
    torch.manual_seed(0)
    model = OldAndNew().train()
    check(model, transformed(model, preset="exact", freeze_rate=0.0, mode="inductor"), 1e-4)


def test_changed_inputs_are_found():
    slim = transformed(Decay().train(), freeze_rate=0.0)
    slim(torch.randn(8, 16))
    forward, backward = slimfit_fx.graphs(slim)[0]
    (changed,) = mutated_inputs(forward.graph)
    assert changed.meta["val"].shape == (16,)
    assert changed.name not in {node.name for node in backward.graph.find_nodes(op="placeholder")}
