"""The scheduler of a model: its rate, optimizer steps, states and history."""

from __future__ import annotations

import copy
import gc
import json
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import slimfit_fx
from slimfit_fx import Config, StateError
from slimfit_fx.model.gate_table import Gates
from slimfit_fx.model.layers import find_layers
from slimfit_fx.policies import POLICIES
from slimfit_fx.scheduling import Scheduler
from slimfit_fx.scheduling.listeners import _listeners
from slimfit_fx.scheduling.rate import freeze_rate_at


def small_model(width: int = 4, depth: int = 5) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(depth)))


def bare_scheduler(model: nn.Module, **config) -> Scheduler:
    """A scheduler that no optimizer talks to."""
    config = Config(always_open=(), **config)
    layers = find_layers(model, config)
    return Scheduler(Gates([layer.name for layer in layers]), layers, dict(model.named_parameters()), config)


def test_a_layer_that_the_forward_does_not_use_loses_no_turn():
    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = nn.Linear(4, 4), nn.Linear(4, 4)
            self.both = False

        def forward(self, x):
            return self.spare(self.used(x)) if self.both else self.used(x)

    model = slimfit_fx.transform(Sometimes(), mode="eager", freeze_rate=0.5, always_open=())
    train(model, 6)
    assert slimfit_fx.scheduler(model).state.score[1] > 1e8, "its first turn is still to come"


@given(st.integers(0, 20), st.integers(1, 20), st.floats(0, 1), st.sampled_from(["linear", "cosine"]))
def test_the_rate_rises_to_its_end(warmup, rise, rate, schedule):
    config = Config(freeze_rate=rate, rate_schedule=schedule, rise_steps=rise, warmup_steps=warmup)
    rates = [freeze_rate_at(config, step) for step in range(warmup + rise + 3)]
    assert rates == sorted(rates)
    assert rates[:warmup] == [0.0] * warmup
    assert rates[warmup + rise :] == [rate] * 3
    assert freeze_rate_at(Config(freeze_rate=rate), 0) == rate


@pytest.mark.parametrize("rate", [0.0, 0.5, 0.9, 0.95, 1.0])
def test_freeze_rate(rate):
    scheduler = bare_scheduler(small_model(depth=40), freeze_rate=rate)
    assert len(scheduler.gates.closed) == int(rate * 40)


def test_static_policy_trains_only_biases_and_the_head():
    model = small_model()
    slimfit_fx.transform(model, mode="eager", policy="static", always_open=r"^4\.")
    before = copy.deepcopy(model.state_dict())
    train(model, steps=2)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"0.bias", "1.bias", "2.bias", "3.bias", "4.bias", "4.weight"}


def train(model: nn.Module, steps: int, optimizer=None, zero: bool = False) -> torch.optim.Optimizer:
    """An ordinary loop."""
    if optimizer is None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for step in range(steps):
        optimizer.zero_grad(set_to_none=not zero)
        torch.manual_seed(step)
        model(torch.randn(3, 4)).square().sum().backward()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("zero", [False, True], ids=["none", "zeroed"])
def test_frozen_means_frozen(zero):
    """No update, no momentum, no decay, also where gradients are zeroed instead of dropped."""
    model = slimfit_fx.transform(small_model(), mode="eager", freeze_rate=0.6, always_open=())
    gates, optimizer = slimfit_fx.gates(model), None
    opened = []
    for _ in range(8):
        before = copy.deepcopy(model.state_dict())
        states = {n: copy.deepcopy(optimizer.state.get(p)) for n, p in model.named_parameters()} if optimizer else {}
        slimfit_fx.scheduler(model).step()
        closed = gates.closed
        opened.append(frozenset(gates.open))
        optimizer = train(model, 1, optimizer, zero)
        for name, parameter in model.named_parameters():
            if name in closed:
                assert parameter.grad is None
                assert torch.equal(parameter, before[name])
                assert str(optimizer.state.get(parameter) or None) == str(states.get(name) or None)
            else:
                assert not torch.equal(parameter, before[name])
    assert len(set(opened)) > 1


def test_gates_change_only_after_an_optimizer_step():
    model = slimfit_fx.transform(small_model(), mode="eager", freeze_rate=0.6, always_open=())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        sets = set()
        for _ in range(3):
            model(torch.randn(2, 4)).sum().backward()
            sets.add(tuple(slimfit_fx.gates(model).open))
        assert len(sets) == 1
        optimizer.step()
        optimizer.zero_grad()


@settings(max_examples=10)
@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=6))
def test_a_layer_that_the_user_freezes_takes_no_turn(steps):
    """With `requires_grad`, at any time and again: of the others just the asked number is closed."""
    model = slimfit_fx.transform(small_model(), mode="eager", freeze_rate=0.6, always_open=["4"])
    gates, scheduler, optimizer = slimfit_fx.gates(model), slimfit_fx.scheduler(model), train(model, 1)
    for thawed in steps:
        for layer, trains in zip(model, thawed, strict=True):
            layer.weight.requires_grad_(trains)
        scheduler.step()
        assert not any(f"{i}.weight" in gates.open for i in range(5) if not thawed[i])
        left = sum(thawed[:4])
        assert len([name for name in gates.open if name != "4.weight"]) == left - int(0.6 * left)
        assert ("4.weight" in gates.open) == thawed[4]
        assert scheduler.freeze_rate == (int(0.6 * left) / left if left else 0)
        train(model, 1, optimizer)
        assert [layer.weight.grad is None for layer in model.children()] == [
            f"{i}.weight" in gates.closed for i in range(5)
        ]


def test_two_optimizers_share_a_step():
    """The second optimizer to step still sees the gates of the forward."""
    model = slimfit_fx.transform(small_model(), mode="eager", freeze_rate=0.4, always_open=())
    optimizers = [torch.optim.SGD(part, lr=0.1) for part in (model[:2].parameters(), model[2:].parameters())]
    for _ in range(4):
        model(torch.randn(2, 4)).square().sum().backward()
        open_names = slimfit_fx.gates(model).open
        before = copy.deepcopy(model.state_dict())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        moved = {n for n in slimfit_fx.gates(model).names if not torch.equal(model.state_dict()[n], before[n])}
        assert moved == set(open_names)
    assert slimfit_fx.scheduler(model).state.step == 4


def test_an_optimizer_of_another_model_changes_nothing():
    model = slimfit_fx.transform(small_model(), mode="eager", freeze_rate=0.6)
    other = small_model()
    other(torch.randn(2, 4)).sum().backward()
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    assert slimfit_fx.scheduler(model).state.step == 0


def test_a_scheduler_dies_with_its_model():
    other = slimfit_fx.transform(small_model(), mode="eager")
    train(other, 1)
    gc.collect()
    train(other, 1)
    before = len(_listeners)
    model = slimfit_fx.transform(small_model(), mode="eager")
    train(model, 1)
    alive = weakref.ref(slimfit_fx.scheduler(model))
    assert len(_listeners) == before + 2  # the scheduler, and what watches gradients from outside of the graphs
    del model
    gc.collect()
    assert alive() is None
    train(other, 1)
    assert len(_listeners) == before


@pytest.mark.parametrize("way", ["collected", "undone"])
def test_a_model_may_go_during_an_optimizer_step(way):
    """torch walks through its hooks then, and would fail if one went."""
    model = slimfit_fx.transform(small_model(), mode="eager")
    others = [slimfit_fx.transform(small_model(), mode="eager") for _ in range(3)]
    schedulers = {id(slimfit_fx.scheduler(other)) for other in others}
    optimizer = torch.optim.SGD(list(model.parameters()), lr=0.1)

    def let_go(*_: Any) -> None:
        if way == "undone" and others:
            slimfit_fx.undo(others[0])
        others.clear()
        gc.collect()

    hooks = (register_optimizer_step_pre_hook, register_optimizer_step_post_hook)
    handles = [register(hook) for register in hooks for hook in (let_go, lambda *_: None)]  # a hook behind it
    try:
        for _ in range(2):
            model(torch.randn(2, 4)).sum().backward()
            optimizer.step()
    finally:
        for handle in handles:
            handle.remove()
    assert not schedulers & {id(listener.owner()) for listener in _listeners}
    assert slimfit_fx.scheduler(model).state.step == 2


@pytest.mark.parametrize("policy", POLICIES)
def test_a_resumed_run_is_bit_equal(policy):
    config: dict[str, Any] = dict(mode="eager", freeze_rate=0.6, policy=policy, always_open=())
    whole = slimfit_fx.transform(small_model(), **config)
    optimizer = train(whole, 3)
    saved = copy.deepcopy((whole.state_dict(), optimizer.state_dict()))
    plain = json.loads(json.dumps(slimfit_fx.scheduler(whole).state_dict()))
    train(whole, 4, optimizer)

    resumed = slimfit_fx.transform(small_model(), **config)
    resumed.load_state_dict(saved[0])
    optimizer = torch.optim.AdamW(resumed.parameters(), lr=1e-2, weight_decay=0.1)
    optimizer.load_state_dict(saved[1])
    slimfit_fx.scheduler(resumed).load_state_dict(plain)
    train(resumed, 4, optimizer)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert slimfit_fx.scheduler(whole).state_dict() == slimfit_fx.scheduler(resumed).state_dict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 0}, "scheduler state of version 0"),
        ({"score": [1.0]}, "damaged: it does not have 5 numbers"),
        ({"measured": [1]}, "damaged"),
        ({"policy": "random"}, "scheduler state of policy 'random', the model has 'update'"),
        ({"layers": ["0.weight"]}, "scheduler state of another model: layers differ, for example '1.weight'"),
    ],
)
def test_a_foreign_state_is_refused(change, message):
    scheduler = bare_scheduler(small_model())
    before = scheduler.state_dict()
    with pytest.raises(StateError, match=message):
        scheduler.load_state_dict({**before, **change})
    assert scheduler.state_dict() == before


def test_history():
    model = slimfit_fx.transform(small_model(), mode="eager", freeze_rate=0.6, always_open=())
    train(model, 3)
    slimfit_fx.scheduler(model).step()
    history = list(slimfit_fx.scheduler(model).history)
    assert [choice.step for choice in history] == [0, 1, 2, 3]
    assert list(history[-1].open) == slimfit_fx.gates(model).open
    assert all(len(choice.scores) == 5 for choice in history)
