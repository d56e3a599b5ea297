from __future__ import annotations

import copy
import json
from itertools import combinations

import pytest
import torch
from helpers import transformed
from small_bert import bert
from small_net import Net, X

import slimfit_fx
from slimfit_fx import ConfigError, ModelError, StateError
from slimfit_fx.inspection import fake_step, gate_sets
from slimfit_fx.scheduling import unheard


@pytest.mark.parametrize("preset", ["exact", "balanced", "tight"])
def test_saved_bytes_are_those_of_a_real_step(preset):
    model, inputs = bert(2)
    options = {"preset": preset, "freeze_rate": 0.9, "mode": "eager", "regions": "blocks"}
    found = slimfit_fx.preview(model, inputs, **options)
    real = transformed(model, **options)
    for opened in (slimfit_fx.gates(real).open, found.to_dict()["open_layers"], list(slimfit_fx.gates(real))):
        slimfit_fx.gates(real).set(opened)
        real.zero_grad()
        real(**inputs).loss.backward()
        saved = slimfit_fx.report(real).saved_bytes_after
        assert found.saved_bytes_at(opened) == saved
        gradients = sum(p.grad.nbytes for p in real.parameters() if p.grad is not None)
        if len(opened) < len(slimfit_fx.gates(real)):
            assert saved <= found.saved_bytes and gradients <= found.step.gradients


class Mixed(torch.nn.Module):
    """Layers of many sizes, three of which share what they save."""

    def __init__(self):
        super().__init__()
        self.words = torch.nn.Embedding(300, 24)
        self.a, self.b, self.c = (torch.nn.Linear(24, n, bias=False) for n in (12, 12, 12))
        self.up, self.down = torch.nn.Linear(12, 200), torch.nn.Linear(200, 12)
        self.norm, self.head = torch.nn.LayerNorm(12), torch.nn.Linear(12, 3)

    def forward(self, tokens):
        x = self.words(tokens)
        x = self.a(x) * self.b(x).sigmoid() + self.c(x)
        return self.head(self.norm(self.down(torch.nn.functional.gelu(self.up(x)))) + x).logsumexp(-1).sum()


def test_no_set_of_layers_takes_more(monkeypatch):
    """All sets, one by one, against the few that are tried."""
    options, tokens = {"mode": "eager", "freeze_rate": 0.55}, 37
    found = slimfit_fx.preview(Mixed(), torch.zeros(3, tokens, dtype=torch.long), **options)

    def every(plan, gradients, trains, closable, config):
        layers = [i for i, may in enumerate(closable) if may]
        count = gate_sets.open_at_once(config, closable)
        chosen = sorted(combinations(layers, count), key=lambda some: sum(gradients[i] for i in some))
        assert len(chosen) > 20
        return [tuple(not may or i in some for i, may in enumerate(closable)) for some in chosen]

    monkeypatch.setattr(fake_step, "largest_sets", every)
    monkeypatch.setattr(unheard, "_GONE", 10**6)  # else so many forwards look like training
    most = slimfit_fx.preview(Mixed(), torch.zeros(3, tokens, dtype=torch.long), **options)
    assert (found.saved_bytes, found.step.gradients) == (most.saved_bytes, most.step.gradients)
    for name, nbytes in most.phases.items():  # what an operator takes while it runs is not known beforehand
        assert 0.995 * nbytes <= found.phases[name] <= nbytes


def test_what_is_frozen_by_hand_never_opens_and_a_budget_holds():
    model = Mixed()
    model.up.requires_grad_(False)
    x = torch.zeros(3, 37, dtype=torch.long)
    assert "up.weight" not in slimfit_fx.preview(model, x, mode="eager", freeze_rate=0.0).to_dict()["open_layers"]
    budget = 33_000
    found = slimfit_fx.preview(Mixed(), x, mode="eager", memory_budget=budget)
    assert found.saved_bytes <= budget < found.saved_bytes_at(found.step.layers)


def test_meta_device_counts_the_same_and_nothing_is_touched():
    model, inputs = bert(2)
    model.eval()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    options = {"mode": "eager", "regions": "blocks"}
    found = slimfit_fx.preview(model, inputs, **options)
    assert torch.equal(state, torch.get_rng_state())
    assert not model.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    meta = {name: value.to("meta") for name, value in inputs.items()}
    assert slimfit_fx.preview(copy.deepcopy(model).to("meta"), meta, **options).to_dict() == found.to_dict()
    assert json.loads(json.dumps(found.to_dict()))["peak_bytes"] == found.peak
    assert max(map(len, str(found).splitlines())) <= 100


def test_optimizers():
    options = {"loss": torch.sum, "mode": "eager", "freeze_rate": 0.0}
    model = Net()
    weights = sum(p.nbytes for p in model.parameters())
    states = {}
    for optimizer in ("sgd", torch.optim.AdamW, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), None):
        found = slimfit_fx.preview(model, X, optimizer, **options).to_dict()
        assert found["weight_bytes"] == found["gradient_bytes"] == weights
        states[str(optimizer)] = found["optimizer_bytes"]
    plain, adam, momentum, none = states.values()
    assert plain == none == 0
    assert 2 * weights <= adam < 2 * weights + 100  # and the steps that it counts
    assert momentum == weights


def test_largest_batch():
    found = slimfit_fx.preview(Net(), X, loss=torch.sum, mode="eager", optimizer=None, freeze_rate=0.0)
    budget = found.peak * 5
    size = found.largest_batch(budget)
    peaks = [
        slimfit_fx.preview(Net(), torch.empty(n, 8), loss=torch.sum, mode="eager", optimizer=None, freeze_rate=0.0).peak
        for n in (size, size + 1)
    ]
    assert peaks[0] <= budget < peaks[1]
    assert found.fits("1GiB") and not found.fits(100)
    with pytest.raises(ConfigError, match="one example, which takes"):
        found.largest_batch(100)


def test_errors():
    with pytest.raises(ConfigError, match="unknown optimizer 'adamq'"):
        slimfit_fx.preview(Net(), X, "adamq", loss=torch.sum)
    with pytest.raises(StateError, match="transformed or compiled already"):
        slimfit_fx.preview(transformed(Net()), X, loss=torch.sum)
    with pytest.raises(ConfigError, match="this machine has no 'xpu'"):
        slimfit_fx.preview(Net(), X, loss=torch.sum, device="xpu")
    with pytest.raises(ModelError, match="no loss"):
        slimfit_fx.preview(Net(), X, mode="eager")


@pytest.mark.inductor
def test_peak_of_compiled_code():
    """The allocator's own count of a step, with sizes that divide nothing."""
    model = torch.nn.Sequential(
        torch.nn.Linear(44, 176), torch.nn.GELU(), torch.nn.Linear(176, 44), torch.nn.LayerNorm(44)
    )
    x = torch.randn(3 * 37 * 8, 44)
    options = {"freeze_rate": 0.0, "preset": "balanced"}
    found = slimfit_fx.preview(model, x, None, loss=torch.sum, **options)
    real = transformed(model, **{"mode": "inductor", **options})
    real(x).sum().backward()
    real.zero_grad()
    with torch.profiler.profile(profile_memory=True) as profile:
        real(x).sum().backward()
    now, peak = 0, 0
    for event in sorted(
        (e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()
    ):
        now += event.nbytes()
        peak = max(peak, now)
    assert abs(max(found.phases.values()) - peak) <= 0.05 * peak
