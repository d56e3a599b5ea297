from __future__ import annotations

import copy
import gc
import json
import math
import weakref

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

import slimfit_fx
from slimfit_fx import Config, StateError
from slimfit_fx.model.gate_table import Gates
from slimfit_fx.model.layers import find_layers
from slimfit_fx.policies import POLICIES, held_open, select
from slimfit_fx.scheduling import Scheduler
from slimfit_fx.scheduling.rate import freeze_rate_at
from slimfit_fx.scheduling.statistics import measure_gains, measure_gradients, measure_updates, relative_updates, sample


def small_model(width: int = 4, depth: int = 5) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(depth)))


def bare_scheduler(model: nn.Module, **config) -> Scheduler:
    """A scheduler that no optimizer talks to."""
    config = Config(always_open=(), **config)
    layers = find_layers(model, config)
    return Scheduler(Gates([layer.name for layer in layers]), layers, dict(model.named_parameters()), config)


def simulate(policy: str, layers: int, closed: int, steps: int, measure, hold: int = 1) -> list[tuple[bool, ...]]:
    """The gates of each step when layer i moves by measure(i, step), which is known one step later."""
    rule, closable, chosen, waiting = POLICIES[policy], [True] * layers, [], {}
    state = rule.init(layers, seed=3)
    for step in range(steps):
        flags = select(rule.priority(state), closable, closed, held_open(state, hold))
        chosen.append(flags)
        state = rule.advance(rule.learn(state, waiting), flags)
        waiting = {i: measure(i, step) for i in range(layers) if flags[i]} if rule.measures else {}
    return chosen


@given(st.sampled_from(["update", "overdue", "gain", "gradient", "random", "cyclic"]), st.integers(2, 12), st.data())
def test_just_the_asked_number_is_closed(policy, layers, data):
    closed = data.draw(st.integers(0, layers))
    for flags in simulate(policy, layers, closed, 10, lambda layer, step: 1 / (1 + layer + step)):
        assert flags.count(False) == closed


@given(st.sampled_from(["update", "overdue", "gain", "gradient", "cyclic"]), st.integers(2, 12), st.data())
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
    chosen = simulate("update", 3, 2, 14, speed)
    turns = [flags.index(True) for flags in chosen]
    assert sorted(turns[:3]) == [0, 1, 2]
    assert set(turns[3:]) >= {0, 1}
    distance = [1e9] * 3
    for step, layer in enumerate(turns):
        if step >= 4:  # by then the last first turn is known
            assert distance[layer] == max(distance)
        if step >= 1:
            distance[turns[step - 1]] = speed(turns[step - 1], step - 1)


@given(st.integers(0, 50), st.integers(1, 20))
def test_seeds_decide_the_order(seed, layers):
    rule = POLICIES["random"]
    assert rule.init(layers, seed) == rule.init(layers, seed)
    assert layers < 3 or rule.init(layers, seed).score != rule.init(layers, seed + 1).score


def test_relative_updates():
    old = [torch.tensor([1.0, -2.0, 0.0, 4.0]), torch.tensor([1.0])]
    new = [torch.tensor([1.5, -2.0, 1.0, 3.0]), torch.tensor([1.0])]
    assert relative_updates(old, new).tolist() == pytest.approx([0.75, 0.0])
    measured = measure_updates([3, 3], old, new).read()
    assert measured == {3: pytest.approx(0.75 / 5)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(st.lists(st.floats(-10, 10, width=16), min_size=1, max_size=8), st.data())
def test_relative_updates_are_finite_with_zeros_and_denormals(dtype, values, data):
    old = torch.tensor(values)
    new = old + torch.tensor(
        data.draw(st.lists(st.floats(-1, 1, width=16), min_size=len(values), max_size=len(values)))
    )
    assert torch.isfinite(relative_updates([old.to(dtype)], [new.to(dtype)])).all()
    assert relative_updates([old * 0], [new]).item() == 0


@given(st.data())
def test_relative_updates_of_many_tensors_are_those_of_each(data):
    """Chunks, dtypes and sizes do not matter."""
    dtypes = data.draw(st.lists(st.sampled_from([torch.float32, torch.bfloat16]), min_size=1, max_size=6))
    old = [torch.randn(place + 1, 3).to(dtype) for place, dtype in enumerate(dtypes)]
    new = [tensor + 0.5 for tensor in old]
    together = relative_updates(old, new)
    one_by_one = torch.cat([relative_updates([o], [n]) for o, n in zip(old, new, strict=True)])
    assert torch.equal(together, one_by_one)


def test_gradient_norms_relative_to_weights():
    weights, gradients = [torch.tensor([3.0, 4.0]), torch.tensor([0.0])], [torch.tensor([0.0, 10.0]), torch.ones(1)]
    assert measure_gradients([1, 2], gradients, weights, None).read() == {1: pytest.approx(2.0), 2: 0.0}
    assert measure_gradients([1], gradients[:1], weights[:1], torch.tensor(4.0)).read() == {1: pytest.approx(0.5)}


def test_gains_are_what_updates_lower_the_loss_by():
    old, new = [torch.ones(3), torch.ones(2)], [torch.zeros(3), torch.full((2,), 2.0)]
    for tensor in new:
        tensor.grad = torch.ones_like(tensor)
    assert measure_gains([4, 6], old, new, None).read() == {4: 3.0, 6: 0.0}  # the second went uphill
    assert measure_gains([4, 4], old, new, torch.tensor(2.0)).read() == {4: 1.5}  # one layer, two tensors


@given(st.lists(st.integers(1, 700), min_size=1, max_size=2), st.booleans())
@example([150, 438], False)
@example([420, 420], True)
def test_a_sample_is_spread_over_rows_and_columns(shape, transpose):
    tensor = torch.arange(math.prod(shape)).reshape(shape)
    found = sample(tensor.mT if transpose and len(shape) == 2 else tensor)
    assert len(found) <= 2**16
    assert len(found.unique()) == len(found) >= (2**12 if tensor.numel() > 2**16 else tensor.numel())
    if len(shape) == 2 and min(shape) > 1:
        assert len(set((found // shape[1]).tolist())) == shape[0]
        assert len(set((found % shape[1]).tolist())) == shape[1]


def test_a_layer_that_gained_nothing_at_first_is_not_forgotten():
    chosen = simulate("gain", 4, closed=3, steps=500, measure=lambda layer, step: 0.0 if step < 6 else 1.0)
    assert all(sum(flags[layer] for flags in chosen[100:]) > 50 for layer in range(4))


def test_a_layer_that_diverges_stays_open():
    rule = POLICIES["update"]
    state = rule.learn(rule.advance(rule.init(2, 0), [True, True]), {0: float("nan"), 1: 0.1})
    assert select(rule.priority(state), [True, True], 1) == (True, False)


def test_overdue_layers_train_in_proportion_to_their_changes():
    """The paper's rule would train the one that moves most at every step, and the others hardly ever."""
    moves = [4.0, 2.0, 1.0, 1.0]
    chosen = simulate("overdue", 4, closed=3, steps=800, measure=lambda layer, step: moves[layer])
    opened = [sum(flags[layer] for flags in chosen) / len(chosen) for layer in range(4)]
    assert opened == pytest.approx([0.5, 0.25, 0.125, 0.125], abs=0.06)
    chosen = simulate("update", 4, closed=3, steps=800, measure=lambda layer, step: moves[layer])
    assert sum(flags[2] for flags in chosen) == 1


def test_a_skipped_step_is_no_first_turn():
    rule = POLICIES["update"]
    before = rule.init(3, 0)
    after = rule.forget(rule.advance(before, [True, False, False]), {0})
    assert after.score == before.score


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


@given(st.sampled_from(["update", "random", "cyclic"]), st.integers(2, 8), st.integers(1, 5), st.data())
def test_layers_stay_open_for_the_least_number_of_steps(policy, layers, hold, data):
    closed = data.draw(st.integers(0, layers))
    chosen = simulate(policy, layers, closed, 12, lambda layer, step: 1 / (1 + layer * step), hold)
    for layer in range(layers):
        flags = "".join("o" if gates[layer] else "." for gates in chosen)
        assert all(len(run) >= hold for run in flags.split(".")[:-1] if run)
    assert all(gates.count(False) <= closed for gates in chosen)


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
        assert [layer.weight.grad is None for layer in model] == [f"{i}.weight" in gates.closed for i in range(5)]


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
    gc.collect()
    assert alive() is None
    assert len(_global_optimizer_pre_hooks) == before


@pytest.mark.parametrize("policy", POLICIES)
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
