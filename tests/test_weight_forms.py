"""Weights that are read in unusual forms: permuted or not, as tensor subclasses of several parts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import reference, run, transformed
from torch import Tensor, nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import slimfit_fx

USES = {
    "tensordot": lambda h, w: torch.tensordot(h, w, 1),
    "tensordot of the last dimensions": lambda h, w: torch.tensordot(h, w.mT, ([-1], [1])),
    "identity permute": lambda h, w: h @ w.permute(0, 1),
    "identity permute, negative": lambda h, w: h @ w.permute(-2, -1),
    "identity movedim": lambda h, w: h @ w.movedim(0, 0),
    "identity transpose": lambda h, w: h @ w.transpose(1, 1),
    "permute": lambda h, w: F.linear(h, w.permute(1, 0)),
    "permute, negative": lambda h, w: F.linear(h, w.permute(-1, -2)),
    "transpose": lambda h, w: F.linear(h, w.transpose(-1, 0)),
    "twice": lambda h, w: h @ w.t().permute(1, 0),
    "einsum": lambda h, w: torch.einsum("bli,io->blo", h, w),
    "einsum, transposed": lambda h, w: torch.einsum("bli,oi->blo", h, w.mT),
    "row vectors": lambda h, w: (h.flatten(0, 1) @ w).unflatten(0, h.shape[:2]),
    "columns": lambda h, w: (w.mT @ h.mT).mT,
}


class Net(nn.Module):
    def __init__(self, use, features: int) -> None:
        super().__init__()
        self.into, self.head = nn.Linear(8, 8), nn.Linear(features, 3)
        self.weight = nn.Parameter(torch.randn(8, features))
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.use(F.gelu(self.into(x)), self.weight))


@pytest.mark.parametrize("features", [8, 5])
@pytest.mark.parametrize("use", USES)
def test_a_weight_is_read_through_views(use, features):
    torch.manual_seed(0)
    model, inputs = Net(USES[use], features).train(), {"x": torch.randn(3, 5, 8)}
    _, expected = run(reference(model), inputs)
    slim = transformed(model, freeze_rate=0.0)
    _, found = run(slim, inputs)
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm(), name
    slimfit_fx.gates(slim)["weight"] = False
    _, found = run(slim, inputs)
    assert found["weight"] is None
    assert found["into.weight"] is not None


class Adapted(nn.Module):
    """A base and trained matrices, in any order among the inputs of the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.base1, self.down, self.up = nn.Linear(32, 32), nn.Linear(32, 4), nn.Linear(4, 32)
        self.base2, self.head = nn.Linear(32, 32), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.base2(torch.tanh(self.base1(x) + self.up(self.down(x))))))


@pytest.mark.parametrize("preset", ["exact", "balanced"])
@pytest.mark.parametrize("bases", [("base1",), ("base2",), ("base1", "base2")])
def test_quantised_bases(bases, preset):
    """One parameter is several inputs of the graph, with one gradient at most."""
    torch.manual_seed(0)
    model = Adapted().train()
    for name in bases:
        model.get_submodule(name).requires_grad_(False)
    quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda _, name: name in bases)
    inputs = {"x": torch.randn(8, 32)}
    _, expected = run(reference(model), inputs)
    slim = transformed(model, preset=preset, freeze_rate=0.0)
    _, found = run(slim, inputs)
    for name, gradient in expected.items():
        assert (found[name] is None) == (gradient is None), name
        if gradient is not None:
            assert (found[name] - gradient).norm() <= (1e-5 if preset == "exact" else 0.05) * gradient.norm(), name
    gates = slimfit_fx.gates(slim)
    gates.set(["up.weight"])
    _, found = run(slim, inputs)
    assert {name for name in gates if found[name] is not None} == {"up.weight"}
