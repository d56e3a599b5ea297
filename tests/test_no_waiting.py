"""The host waits for no device: layers on `meta`, whose numbers nobody can read, go through a scheduler's steps."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor, nn

from slimfit_fx import Config
from slimfit_fx.model.gate_table import Gates
from slimfit_fx.model.layers import find_layers
from slimfit_fx.policies import POLICIES
from slimfit_fx.scheduling import Scheduler
from slimfit_fx.scheduling.closed_states import ClosedStates
from slimfit_fx.scheduling.statistics import Measurement

OPTIONS = [
    *({"policy": policy} for policy in POLICIES),
    {"catch_up": 0.5, "decay_moments": True},
    {"closed_state": "host", "closed_state_after": 1},
]


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_step_reads_nothing_of_a_device(options, scaled, monkeypatch):
    """But for what `_to_host` sends on its way, which is replaced here by numbers that have arrived."""
    sent: list[Tensor] = []

    def to_host(value: Tensor) -> tuple[Tensor, tuple[()]]:
        assert value.device.type == "meta"
        sent.append(value)
        return torch.zeros(value.shape) if value.dim() == 0 else torch.ones(value.shape), ()

    monkeypatch.setattr(sys.modules[Measurement.__module__], "_to_host", to_host)
    monkeypatch.setattr(sys.modules[ClosedStates.__module__], "_to_pinned", lambda value: torch.zeros(value.shape))
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(6)))
    config = Config(freeze_rate=0.5, always_open=(), **options)
    layers = find_layers(model, config)
    gates = Gates([layer.name for layer in layers])
    scheduler = Scheduler(gates, layers, dict(model.named_parameters()), config)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    opened = []
    for _ in range(6):
        scheduler.begin_forward()
        opened.append(tuple(gates.open))
        for name in gates.open:
            model.get_parameter(name).grad = torch.empty(4, 4, device="meta")
        if scaled:  # as a gradient scaler leaves them for an optimizer that skips a step by itself
            optimizer.grad_scale = optimizer.found_inf = torch.empty((), device="meta")  # type: ignore[attr-defined]
        scheduler.before_optimizer_step(optimizer)
        for name in gates.open:
            moments = (torch.empty(4, 4, device="meta") for _ in range(2))
            optimizer.state[model.get_parameter(name)] = dict(zip(("exp_avg", "exp_avg_sq"), moments, strict=True))
        scheduler.after_optimizer_step(optimizer)
        optimizer.zero_grad()
    measures = POLICIES[options.get("policy", "update")].measures
    assert bool(sent) == bool(measures or scaled)
    assert len(set(opened)) > 1 or options.get("policy") == "static"
