"""Where optimizer states are while their layers are closed, with a second device that every machine has: `meta`."""

from __future__ import annotations

import sys

import pytest
import torch
from helpers import transformed
from torch import nn

import slimfit_fx
from slimfit_fx.scheduling.closed_states import ClosedStates, state_bytes

NEAR, FAR = torch.device("meta"), torch.device("cpu")


def with_states(device: torch.device) -> tuple[torch.optim.Optimizer, list[nn.Parameter]]:
    """Two parameters on `NEAR`; the moments of the first are on `device`, its step count is on the host as always."""
    parameters = [nn.Parameter(torch.empty(4, 3, device=NEAR)) for _ in range(2)]
    optimizer = torch.optim.AdamW(parameters)
    moments = {name: torch.empty(4, 3, device=device) for name in ("exp_avg", "exp_avg_sq")}
    optimizer.state[parameters[0]] = {"step": torch.tensor(7.0), **moments}
    return optimizer, parameters


def places(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, torch.device]:
    return {name: value.device for name, value in optimizer.state[parameter].items()}


def test_states_on_the_host_come_back_before_the_step():
    optimizer, parameters = with_states(FAR)
    ClosedStates("host", 1).before_step(optimizer, parameters)
    assert places(optimizer, parameters[0]) == {"step": FAR, "exp_avg": NEAR, "exp_avg_sq": NEAR}
    assert parameters[1] not in optimizer.state, "what has no state gets none"


def test_states_of_layers_that_stay_closed_stay_where_they_are():
    optimizer, parameters = with_states(FAR)
    ClosedStates("host", 1).before_step(optimizer, parameters[1:])
    assert places(optimizer, parameters[0])["exp_avg"] == FAR


@pytest.mark.parametrize("place", ["device", "host", "none"])
def test_states_are_put_away_when_their_layer_was_closed_for_so_long(place, monkeypatch):
    # pinned memory takes a GPU; by its name, as a function of the package hides the module
    monkeypatch.setattr(sys.modules[ClosedStates.__module__], "_to_pinned", lambda value: torch.zeros(value.shape))
    optimizer, parameters = with_states(NEAR)
    states = ClosedStates(place, 3)
    states.after_step(optimizer, {parameters[0]: 2})
    assert places(optimizer, parameters[0])["exp_avg"] == NEAR, "not yet"
    states.after_step(optimizer, {parameters[0]: 3})
    if place == "none":
        assert parameters[0] not in optimizer.state
    else:
        expected = FAR if place == "host" else NEAR
        assert places(optimizer, parameters[0]) == {"step": FAR, "exp_avg": expected, "exp_avg_sq": expected}


def test_bytes_are_counted_by_place():
    near, far = with_states(NEAR), with_states(FAR)
    assert state_bytes([near[0]], near[1]) == (2 * 12 * 4, 0)
    assert state_bytes([far[0]], far[1]) == (0, 2 * 12 * 4)


def test_the_scheduler_asks_for_trained_states_before_each_step_and_tells_of_closed_ones_behind(monkeypatch):
    asked, told = [], []
    monkeypatch.setattr(ClosedStates, "before_step", lambda self, optimizer, opened: asked.append(set(opened)))
    monkeypatch.setattr(ClosedStates, "after_step", lambda self, optimizer, closed: told.append(set(closed)))
    slim = transformed(nn.Sequential(*(nn.Linear(4, 4) for _ in range(4))), freeze_rate=0.5, closed_state="host")
    optimizer = torch.optim.AdamW(slim.parameters())
    gated = {slim.get_parameter(name) for name in slimfit_fx.gates(slim).names}
    for step in range(3):
        slim(torch.ones(2, 4)).sum().backward()
        trained = {parameter for parameter in gated if parameter.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
        assert asked[step:] == [trained]
        assert told[step:] == [gated - trained]
        assert trained != gated
