from __future__ import annotations

import pytest
import torch
from torch import nn

import slimfit_fx
from slimfit_fx import StateError

pytest.importorskip("matplotlib")


def trained(steps: int) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    slimfit_fx.transform(model, mode="eager", preset="exact", freeze_rate=0.5, always_open=())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        model(torch.randn(2, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_the_map_has_a_row_per_layer_and_a_dot_per_open_gate(tmp_path):
    model = trained(8)
    figure = slimfit_fx.plot_history(model)
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == list(slimfit_fx.gates(model).names)
    opened = sum(len(choice.open) for choice in slimfit_fx.scheduler(model).history)
    assert len(axes.collections[0].get_offsets()) == opened
    figure.savefig(tmp_path / "history.png")
    assert len(slimfit_fx.plot_history(model, last=3).axes[0].collections[0].get_offsets()) == 6


def test_nothing_to_plot():
    with pytest.raises(StateError, match="train for a step"):
        slimfit_fx.plot_history(trained(0))
    with pytest.raises(StateError, match="no sample"):
        slimfit_fx.plot_memory([])


def test_memory(tmp_path):
    samples = [(0.0, 0), (0.1, 2**20), (0.2, 0)]
    figure = slimfit_fx.plot_memory(samples, [(0.1, "backward")])
    figure.savefig(tmp_path / "memory.png")
    assert figure.axes[0].get_ylabel() == "MiB over weights"
