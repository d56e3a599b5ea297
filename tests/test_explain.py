"""`slimfit_fx.explain`: recompiles with the input that caused them, graph breaks, layers in no graph."""

from __future__ import annotations

import warnings

import pytest
import torch
from helpers import transformed
from torch import nn

import slimfit_fx
from slimfit_fx import StateError


class Net(nn.Module):
    """Two layers, with a break between them where `breaks` says so, and a recurrent one where `recurs` does."""

    def __init__(self, breaks: bool = False, recurs: bool = False):
        super().__init__()
        self.first, self.head = nn.Linear(8, 8), nn.Linear(8, 2)
        self.memory = nn.LSTM(8, 8, batch_first=True) if recurs else None
        self.breaks = breaks

    def forward(self, x, scale=1):
        y = self.first(x) * scale
        if self.breaks:
            torch._dynamo.graph_break()
        if self.memory is not None:
            y, _ = self.memory(y)
        return self.head(y)


def x(*sizes):
    return torch.randn(*sizes, 8)


def step(model, *arguments, **named):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of layers outside of the graphs
        model(*arguments, **named).sum().backward()


@pytest.mark.parametrize("mode", ["eager", pytest.param("inductor", marks=pytest.mark.inductor)])
def test_one_graph_and_nothing_to_say(mode):
    model = transformed(Net(), mode=mode)
    step(model, x(4))
    step(model, x(4))
    found = slimfit_fx.explain(model)
    assert (len(found.graphs), found.recompiles, found.breaks, found.uncovered) == (1, [], [], [])
    assert str(found) == "1 graph; 2 of 2 layers in them.\nNo recompile, no graph break."


def test_a_recompile_names_the_input_that_changed():
    model = transformed(Net())
    step(model, x(4), scale=1)
    step(model, x(6), scale=1)
    step(model, x(6), scale=2.5)
    sizes, scale = slimfit_fx.explain(model).recompiles
    assert "'x' size mismatch at index 0. expected 4, actual 6" in sizes.changed or "'args[0]'" in sizes.changed
    assert "scale" in scale.changed
    text = str(slimfit_fx.explain(model))
    assert "Compiled again (2)" in text and "actual 6" in text
    assert all(len(line) <= 100 for line in text.splitlines())


def test_blocks_are_named():
    blocks = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)) for _ in range(2)))
    model = transformed(nn.Sequential(blocks, nn.Linear(8, 2)), regions="blocks")
    step(model, x(4))
    step(model, x(6))
    found = slimfit_fx.explain(model)
    assert {origin.path for origin in found.graphs} >= {"0.0", "1"}
    assert {origin.path for origin in found.recompiles} >= {"0.0", "1"}
    assert not found.uncovered


def test_a_graph_break_says_where_and_why():
    model = transformed(Net(breaks=True))
    step(model, x(4))
    found = slimfit_fx.explain(model)
    (broken,) = found.breaks
    assert "User-inserted graph break" in broken.broke and "Developer debug" not in broken.broke
    assert broken.place.startswith(__file__)
    assert len(found.graphs) == 2 and not found.uncovered
    assert "Graph breaks (1)" in str(found)


def test_layers_in_no_graph_are_named_with_the_reason():
    model = transformed(Net(recurs=True))
    step(model, x(4, 3))
    found = slimfit_fx.explain(model)
    assert "memory.weight_ih_l0" in found.uncovered
    assert any("LSTM" in reason for reason in found.left_out)
    assert "In no graph" in str(found) and "LSTM" in str(found)


def test_before_the_first_forward():
    with pytest.raises(StateError, match="run one training forward"):
        slimfit_fx.explain(transformed(Net()))
    with pytest.raises(StateError, match="not transformed"):
        slimfit_fx.explain(Net())
