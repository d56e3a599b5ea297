"""Dropout masks that are drawn again in the backward: the same masks, and no bytes for them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import run, transformed
from torch import Tensor, nn

import slimfit_fx

pytestmark = pytest.mark.inductor


class Net(nn.Module):
    """Dropout of activations, of attention probabilities, and twice in a row, at sizes that divide nothing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.project, self.up, self.head = nn.Linear(36, 108), nn.Linear(36, 100), nn.Linear(100, 3)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.project(x).unflatten(-1, (3, 4, 9)).permute(2, 0, 3, 1, 4)
        weights = F.dropout(torch.softmax(query @ key.transpose(-1, -2) / 3, -1), 0.1)
        hidden = F.dropout((weights @ value).transpose(1, 2).flatten(2), 0.5)
        return self.head(F.dropout(F.dropout(F.gelu(self.up(hidden)), 0.1), 0.2))


def masks(model: nn.Module) -> list[tuple[str, int]]:
    rows = slimfit_fx.report(model).plan.saved
    return [(row.form, row.stored) for row in rows if row.role == "dropout mask" and row.nbytes]


@pytest.mark.parametrize("preset", ["exact", "balanced", "tight"])
def test_the_same_masks_are_drawn_again(preset, monkeypatch):
    inputs = {"x": torch.randn(3, 17, 36)}
    saved = transformed(Net(), mode="inductor", preset=preset, freeze_rate=0.5)
    outputs, expected = run(saved, inputs)
    monkeypatch.setattr("slimfit_fx.passes.redraw_masks._FAST", {"cpu"})
    drawn = transformed(Net(), mode="inductor", preset=preset, freeze_rate=0.5)
    again, found = run(drawn, inputs)
    assert torch.equal(outputs, again)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (gradient is None) == (found[name] is None), name
        if gradient is not None:
            torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6 * float(gradient.abs().max()))
    assert {form for form, _ in masks(drawn)} == {"drawn again"}
    assert sum(nbytes for _, nbytes in masks(drawn)) == 0 < sum(nbytes for _, nbytes in masks(saved))
    seeds = [row for row in slimfit_fx.report(drawn).plan.saved if row.role == "indices"]
    assert [row.stored for row in seeds] == [8 * row.shape[0] for row in seeds] and len(seeds) == 1


def test_bytes_and_gradients_are_verified(monkeypatch):
    monkeypatch.setattr("slimfit_fx.passes.redraw_masks._FAST", {"cpu"})
    found = slimfit_fx.verify(Net(), torch.randn(3, 17, 36), loss=lambda y: y.square().sum())
    assert found.ok, str(found)


def test_a_cpu_saves_bits(monkeypatch):
    model = transformed(Net(), mode="inductor", preset="balanced")
    run(model, {"x": torch.randn(3, 17, 36)})
    assert {form for form, _ in masks(model)} == {"bits"} or all("bit" in form for form, _ in masks(model))


def test_published_formats_store_masks(monkeypatch):
    monkeypatch.setattr("slimfit_fx.passes.redraw_masks._FAST", {"cpu"})
    model = transformed(Net(), mode="inductor", preset="paper")
    run(model, {"x": torch.randn(3, 17, 36)})
    assert all(nbytes for _, nbytes in masks(model))
