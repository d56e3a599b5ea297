"""Optimizers whose states and steps live on a device: AdamW in its forms, gradient scaling, states on the host."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from device_runs import autocast, model_on, relative, slim, train
from helpers import loss_of
from torch import nn

import slimfit_fx

ADAMW = {
    "foreach": {"foreach": True},
    "one by one": {"foreach": False},
    "fused": {"fused": True},
    "capturable": {"capturable": True, "foreach": True},
}


def adamw(model: nn.Module, form: str) -> torch.optim.Optimizer:
    if form == "capturable" and next(model.parameters()).device.type != "cuda":
        pytest.skip("capturable is about CUDA itself")
    return torch.optim.AdamW(model.parameters(), lr=1e-3, **ADAMW[form])


@pytest.mark.parametrize("form", ADAMW)
def test_all_gates_open_is_the_ordinary_run(form, device):
    model, inputs = model_on(device, "timm vit")
    plain, ours = copy.deepcopy(model), slim(model, preset="exact", freeze_rate=0.0)
    expected = torch.stack(list(train(plain, adamw(plain, form), inputs, 5)))
    found = torch.stack(list(train(ours, adamw(ours, form), inputs, 5)))
    assert relative(found, expected) < 1e-3
    assert expected[0] != expected[-1]


@pytest.mark.parametrize("form", ADAMW)
def test_closed_layers_stay(form, device):
    """With momentum, weight decay and lengthened updates, whatever was open before."""
    model, inputs = model_on(device, "timm vit")
    ours = slim(model, preset="balanced", freeze_rate=0.6, catch_up=0.5, decay_moments=True)
    optimizer, gates = adamw(ours, form), slimfit_fx.gates(ours)
    moved: set[str] = set()
    for _ in range(8):
        before = {name: parameter.detach().clone() for name, parameter in ours.named_parameters()}
        list(train(ours, optimizer, inputs, 1))
        for name in gates.names:
            if torch.equal(ours.get_parameter(name), before[name]):
                assert name in gates.closed, f"{name} is open and stayed"
            else:
                assert name in gates.open, f"{name} is closed and moved"
                moved.add(name)
    assert len(moved) > 0.4 * len(gates) + 1


@pytest.mark.parametrize("form", ["foreach", "fused"])
@pytest.mark.parametrize("policy", ["update", "gradient"])
def test_steps_that_overflow_are_skipped_and_measure_nothing(form, policy, device):
    """The first and the fourth step of eight overflow."""
    model, inputs = model_on(device, "timm vit")
    ours = slim(model, preset="balanced", freeze_rate=0.5, policy=policy)
    optimizer, scaler = adamw(ours, form), torch.amp.GradScaler(device.type, init_scale=2.0**10)
    scheduler, gates = slimfit_fx.scheduler(ours), slimfit_fx.gates(ours)
    learnt = []
    for step in range(8):
        before = {name: value.clone() for name, value in ours.state_dict().items()}
        torch.manual_seed(step)
        with autocast(device, torch.float16):
            loss = loss_of(ours(**inputs)) * (1e38 if step in (0, 3) else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        same = all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())
        assert same == (step in (0, 3))
        learnt.append([score for score in scheduler.state.score if score >= 0])
    assert scaler.get_scale() == 2.0**8
    assert gates.open and gates.closed
    assert all(value.isfinite().all() for value in ours.state_dict().values())
    # a skipped step moves nothing: measured, it would leave a zero, or what is not finite
    assert learnt[-1] and all(0 < score < math.inf for score in learnt[-1])


@pytest.mark.parametrize("form", ["foreach", "fused", "capturable"])
def test_states_of_closed_layers_wait_on_the_host(form, device):
    """The run is that of states that stay: with another's moments a weight would be off by a hundredth."""
    model, inputs = model_on(device, "timm vit")
    runs = []
    for place in ("device", "host"):
        ours = slim(model, preset="balanced", freeze_rate=0.7, closed_state=place, closed_state_after=1)
        optimizer, gates = adamw(ours, form), slimfit_fx.gates(ours)
        list(train(ours, optimizer, inputs, 10))
        runs.append([parameter.detach() for parameter in ours.parameters()])
        for name in gates.names:
            state = optimizer.state.get(ours.get_parameter(name), {})
            moments = [state[key] for key in ("exp_avg", "exp_avg_sq") if key in state]
            away = place == "host" and name in gates.closed
            assert all(moment.device == (torch.device("cpu") if away else device) for moment in moments)
            if away and device.type == "cuda":
                assert all(moment.is_pinned() for moment in moments)
        near, far = slimfit_fx.scheduler(ours).optimizer_bytes()
        assert near > 0
        assert (far > 0) == (place == "host" and device.type == "cuda")
        saved = optimizer.state_dict()["state"]
        assert all(torch.as_tensor(value).isfinite().all() for state in saved.values() for value in state.values())
    assert relative(runs[1], runs[0]) < (1e-4 if device.type == "cuda" else 1e-7)
