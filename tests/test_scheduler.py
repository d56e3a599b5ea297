from __future__ import annotations

import copy
import gc
import json
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import slimfit_fx
from slimfit_fx import Config, StateError
from slimfit_fx.config import POLICIES as POLICY_NAMES
from slimfit_fx.gates import Gates
from slimfit_fx.layers import find_layers
from slimfit_fx.scheduler import POLICIES, Scheduler
from slimfit_fx.scheduler.statistics import relative_update


def small_model(width: int = 4, depth: int = 5) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(depth)))


def bare_scheduler(model: nn.Module, **config) -> Scheduler:
    """A scheduler that no optimizer talks to."""
    config = Config(always_open=(), **config)
    layers = find_layers(model, config)
    return Scheduler(Gates([layer.name for layer in layers]), layers, dict(model.named_parameters()), config)


def simulate(policy: str, layers: int, closed: int, steps: int, measure) -> list[tuple[bool, ...]]:
    """The gates of each step when layer i moves by measure(i, step)."""
    rule, closable, chosen = POLICIES[policy], [True] * layers, []
    state = rule.init(layers, seed=3)
    for step in range(steps):
        flags = rule.select(state, closable, closed)
        chosen.append(flags)
        state = rule.update(state, flags, {i: measure(i, step) for i in range(layers) if flags[i]})
    return chosen


def test_config_knows_every_policy():
    assert tuple(POLICIES) == POLICY_NAMES


@given(st.sampled_from(["update", "random", "cyclic"]), st.integers(2, 12), st.data())
def test_just_the_asked_number_is_closed(policy, layers, data):
    closed = data.draw(st.integers(0, layers))
    for flags in simulate(policy, layers, closed, 10, lambda layer, step: 1 / (1 + layer + step)):
        assert flags.count(False) == closed


@given(st.sampled_from(["update", "cyclic"]), st.integers(2, 12), st.data())
def test_every_layer_gets_its_first_turn_before_any_gets_its_second(policy, layers, data):
    """Paper, section 3: distances start huge."""
    opened = data.draw(st.integers(1, layers))
    steps = -(-layers // opened)
    chosen = simulate(policy, layers, layers - opened, steps, lambda layer, step: 0.1)
    seen = [layer for flags in chosen[: layers // opened] for layer in range(layers) if flags[layer]]
    assert len(seen) == len(set(seen))
    assert {layer for flags in chosen for layer in range(layers) if flags[layer]} == set(range(layers))


def test_the_update_policy_follows_the_paper():
    """The layer that moves most stays; when it slows down below a stale distance, the stale layer comes back."""
    speed = lambda layer, step: {0: 1.0, 1: 0.5, 2: 0.1}[layer] / (1 + step)  # noqa: E731
    chosen = simulate("update", 3, 2, 12, speed)
    turns = [flags.index(True) for flags in chosen]
    assert sorted(turns[:3]) == [0, 1, 2]
    assert set(turns[3:]) >= {0, 1}
    distance = [1e9] * 3
    for step, layer in enumerate(turns):
        if step >= 3:
            assert distance[layer] == max(distance)
        distance[layer] = speed(layer, step)


@given(st.integers(0, 50), st.integers(1, 20))
def test_seeds_decide_the_order(seed, layers):
    rule = POLICIES["random"]
    assert rule.init(layers, seed) == rule.init(layers, seed)
    assert layers < 3 or rule.init(layers, seed).score != rule.init(layers, seed + 1).score


def test_relative_update():
    old = [torch.tensor([1.0, -2.0, 0.0, 4.0])]
    new = [torch.tensor([1.5, -2.0, 1.0, 3.0])]
    assert relative_update(old, new).item() == pytest.approx((0.5 + 0 + 0 + 0.25) / 4)


@given(st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=8), st.data())
def test_relative_update_is_finite_with_zeros_and_denormals(values, data):
    old = torch.tensor(values)
    new = old + torch.tensor(
        data.draw(st.lists(st.floats(-1, 1, width=32), min_size=len(values), max_size=len(values)))
    )
    assert torch.isfinite(relative_update([old.bfloat16()], [new.bfloat16()])) or (old.abs() < 1e-30).any()
    assert not relative_update([old * 0], [new]).isnan()


def test_a_layer_that_diverges_stays_open():
    rule = POLICIES["update"]
    state = rule.update(rule.init(2, 0), [True, True], {0: float("nan"), 1: 0.1})
    assert rule.select(state, [True, True], 1) == (True, False)


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
    from torch.optim.optimizer import _global_optimizer_pre_hooks

    gc.collect()
    before = len(_global_optimizer_pre_hooks)
    model = slimfit_fx.transform(small_model(), mode="eager")
    train(model, 1)
    alive = weakref.ref(slimfit_fx.scheduler(model))
    assert len(_global_optimizer_pre_hooks) == before + 1
    del model
    torch._dynamo.reset()
    gc.collect()
    assert alive() is None
    assert len(_global_optimizer_pre_hooks) == before


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_a_resumed_run_is_bit_equal(policy):
    config = dict(mode="eager", freeze_rate=0.6, policy=policy, always_open=())
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
    assert [step for step, _ in history] == [0, 1, 2, 3]
    assert list(history[-1][1]) == slimfit_fx.gates(model).open
