"""`optimizer.step(closure)`: the same run as the ordinary loop, and a frozen layer does not move."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import transformed
from torch import nn

import slimfit_fx
from slimfit_fx.policies import POLICIES

WIDTH, STEPS = 4, 12


def net(depth: int = 5) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(depth)))


def loss_of(model: nn.Module, seed: int) -> torch.Tensor:
    x = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(seed))
    return (model(x) - x.flip(1)).square().mean()


def evaluation(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int, to_none: bool = True, parts: int = 1):
    """A closure: gradients afresh, summed over `parts` backwards."""

    def closure() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=to_none)
        losses = [loss_of(model, parts * seed + part) for part in range(parts)]
        for loss in losses:
            loss.backward()
        return torch.stack(losses).sum()

    return closure


def by_loop(optimizer: torch.optim.Optimizer, closure: Callable[[], torch.Tensor]) -> None:
    closure()
    optimizer.step()


def by_position(optimizer: torch.optim.Optimizer, closure: Callable[[], torch.Tensor]) -> None:
    optimizer.step(closure)


def by_name(optimizer: torch.optim.Optimizer, closure: Callable[[], torch.Tensor]) -> None:
    optimizer.step(closure=closure)


def adamw(parameters) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.02, weight_decay=0.1)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def trained(step, make=adamw, **options) -> tuple[dict[str, torch.Tensor], dict]:
    model = transformed(net(), **{"freeze_rate": 0.6, "always_open": (), **options})
    optimizer = make(model.parameters())
    opened = set()
    for seed in range(STEPS):
        before = weights(model)
        step(optimizer, evaluation(model, optimizer, seed))
        closed = slimfit_fx.gates(model).closed
        opened.add(tuple(slimfit_fx.gates(model).open))
        assert_equal({name: weights(model)[name] for name in closed}, {name: before[name] for name in closed})
    assert len(opened) > 1 or options.get("policy") == "static"
    return weights(model), slimfit_fx.scheduler(model).state_dict()


MAKEUP: dict[str, Any] = dict(catch_up=1.0, decay_moments=True, closed_state="none", closed_state_after=2)


@pytest.mark.parametrize("options", [{}, MAKEUP, {"min_open_steps": 2}], ids=["plain", "made up for", "held"])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_closure_trains_as_the_loop_does(policy, options):
    """Bit for bit: weights, scores, choices."""
    expected = trained(by_loop, policy=policy, **options)
    for step in (by_position, by_name):
        found = trained(step, policy=policy, **options)
        assert_equal(found[0], expected[0])
        assert found[1] == expected[1]


class Derived(torch.optim.AdamW):
    """Its base's `step` has hooks as well."""

    def step(self, closure=None):
        return super().step(closure)


class Wrapper(torch.optim.Optimizer):
    """Steps by way of another optimizer over the same parameters."""

    def __init__(self, parameters):
        parameters = list(parameters)
        self.inner = adamw(parameters)
        super().__init__(parameters, {})

    def step(self, closure=None):
        return self.inner.step(closure)


class Late(torch.optim.SGD):
    """Calls its closure by itself and evaluates twice, as extragradient methods do."""

    def step(self, closure):
        with torch.enable_grad():
            closure()
        start = [p.detach().clone() for p in self.param_groups[0]["params"]]
        super().step()
        with torch.enable_grad():
            loss = closure()
        with torch.no_grad():
            for parameter, value in zip(self.param_groups[0]["params"], start, strict=True):
                parameter.copy_(value)
        super().step()
        return loss


@pytest.mark.parametrize("policy", ["update", "gain", "gradient"])
@pytest.mark.parametrize("make", [lambda p: Derived(p, lr=0.02, weight_decay=0.1), Wrapper], ids=["derived", "wrapper"])
def test_optimizers_within_optimizers(make, policy):
    adamw([nn.Parameter(torch.ones(1))])  # from now on AdamW.step has hooks
    expected = trained(by_loop, policy=policy, **MAKEUP)
    found = trained(by_position, make, policy=policy, **MAKEUP)
    assert_equal(found[0], expected[0])
    assert found[1] == expected[1]


@pytest.mark.parametrize("hooked", [False, True], ids=["", "base has hooks"])
@pytest.mark.parametrize("policy", ["update", "gain", "gradient", "random"])
def test_a_closure_that_is_called_twice(policy, hooked, monkeypatch):
    plain = getattr(torch.optim.SGD.step, "__wrapped__", torch.optim.SGD.step)
    monkeypatch.setattr(torch.optim.SGD, "step", torch.optim.Optimizer.profile_hook_step(plain) if hooked else plain)
    _, state = trained(by_position, lambda p: Late(p, lr=0.1), policy=policy, catch_up=0.5)
    assert state["step"] == STEPS
    assert policy == "random" or all(0 < score < 1e8 for score in state["score"])


@pytest.mark.parametrize("to_none", [True, False])
def test_gradients_of_frozen_layers_are_none_when_the_closure_returns(to_none):
    """Not zeros, which momentum and decay would act on."""
    model = transformed(net(), freeze_rate=0.6, always_open=())
    optimizer = adamw(model.parameters())
    for seed in range(6):
        before = weights(model)
        optimizer.step(evaluation(model, optimizer, seed, to_none, parts=2))
        for name, parameter in model.named_parameters():
            if name in slimfit_fx.gates(model).closed:
                assert parameter.grad is None
                assert torch.equal(parameter, before[name])


def test_a_closure_without_a_forward():
    """Manual optimisation: the backward is done, the closure only tells the loss."""
    model = transformed(net(), freeze_rate=0.6, always_open=())
    optimizer, sets = adamw(model.parameters()), set()
    for seed in range(8):
        optimizer.zero_grad()
        loss = loss_of(model, seed)
        loss.backward()
        optimizer.step(lambda loss=loss: loss)
        sets.add(tuple(slimfit_fx.gates(model).open))
    assert len(sets) > 1
    assert all(score < 1e8 for score in slimfit_fx.scheduler(model).state.score)


def test_a_closure_that_fails_costs_nothing():
    model = transformed(net(), freeze_rate=0.6, always_open=(), catch_up=1.0)
    optimizer = adamw(model.parameters())
    by_position(optimizer, evaluation(model, optimizer, 0))
    before = weights(model)
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    assert_equal(weights(model), before)
    for seed in range(1, 5):
        by_position(optimizer, evaluation(model, optimizer, seed))
    assert slimfit_fx.scheduler(model).state.step == 5


def test_two_optimizers_with_closures():
    """Each with a forward of its own: two steps of the scheduler a round."""
    model = transformed(net(), freeze_rate=0.6, always_open=())
    optimizers = [adamw(model[:2].parameters()), torch.optim.SGD(model[2:].parameters(), lr=0.1, momentum=0.9)]
    for seed in range(6):
        for optimizer in optimizers:
            before = weights(model)
            model.zero_grad()
            by_position(optimizer, evaluation(model, optimizer, seed))
            closed = slimfit_fx.gates(model).closed
            assert_equal({name: weights(model)[name] for name in closed}, {name: before[name] for name in closed})
    assert slimfit_fx.scheduler(model).state.step == 12


def lbfgs(parameters, line_search: str | None = None) -> torch.optim.LBFGS:
    return torch.optim.LBFGS(parameters, lr=0.5, max_iter=4, line_search_fn=line_search)


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_lbfgs_is_the_same_with_every_gate_open(line_search):
    model = net()
    slim = transformed(model, freeze_rate=0.0, always_open=())
    for each in (model, slim):
        optimizer = lbfgs(each.parameters(), line_search)
        for _ in range(4):
            optimizer.step(evaluation(each, optimizer, 0))
    for name, value in weights(model).items():
        assert (weights(slim)[name] - value).norm() <= 1e-3 * value.norm()


@pytest.mark.parametrize("options", [{}, MAKEUP], ids=["plain", "made up for"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_lbfgs_does_not_move_a_frozen_layer(policy, line_search, options):
    model = transformed(net(), freeze_rate=0.6, always_open=(), policy=policy, **options)
    optimizer = lbfgs(model.parameters(), line_search)
    losses = []
    for _ in range(10):
        before = weights(model)
        losses.append(optimizer.step(evaluation(model, optimizer, 0)).item())
        for name, is_open in slimfit_fx.gates(model).items():
            assert torch.equal(weights(model)[name], before[name]) != is_open
    assert slimfit_fx.scheduler(model).state.step == 10
    assert losses[-1] < 0.9 * losses[0] or options, "lengthened, an update may overshoot"


def test_lbfgs_steps_as_over_the_open_layers_alone():
    """Whenever the gates change, it begins anew; else it goes on with what it knows."""
    model = transformed(net(3), freeze_rate=0.6, policy="cyclic", always_open=())
    alone = net(3)
    optimizer, only, opened = lbfgs(model.parameters()), None, None
    for step in range(6):
        slimfit_fx.gates(model).set(["0.0.weight"] if step in (0, 1, 5) else ["1.0.weight"])
        optimizer.step(evaluation(model, optimizer, 0))
        if slimfit_fx.gates(model).open != opened:
            opened = slimfit_fx.gates(model).open
            only = lbfgs([p for name, p in alone.named_parameters() if name.endswith("bias") or name in opened])
        alone.zero_grad()
        only.step(evaluation(alone, only, 0))
        for name, value in weights(alone).items():
            assert (weights(model)[name] - value).norm() <= 1e-4 * value.norm()


def test_lbfgs_keeps_its_memory_while_its_first_layer_is_closed():
    model = transformed(net(3), policy="static", always_open=["2.0"], closed_state="none", closed_state_after=1)
    optimizer = lbfgs(model.parameters())
    for _ in range(3):
        optimizer.step(evaluation(model, optimizer, 0))
    assert optimizer.state[next(model.parameters())]["n_iter"] == 12


def test_lbfgs_resumes_bit_for_bit():
    config: dict[str, Any] = dict(freeze_rate=0.6, policy="static", always_open=["1.0"])
    whole = transformed(net(3), **config)
    optimizer = lbfgs(whole.parameters())
    for _ in range(2):
        optimizer.step(evaluation(whole, optimizer, 0))
    saved = copy.deepcopy((whole.state_dict(), optimizer.state_dict(), slimfit_fx.scheduler(whole).state_dict()))
    resumed = transformed(net(3), **config)
    resumed.load_state_dict(saved[0])
    other = lbfgs(resumed.parameters())
    other.load_state_dict(saved[1])
    slimfit_fx.scheduler(resumed).load_state_dict(saved[2])
    for each, with_ in ((whole, optimizer), (resumed, other)):
        for _ in range(2):
            with_.step(evaluation(each, with_, 0))
    assert_equal(weights(resumed), weights(whole))


def test_a_budget_with_closures():
    model = transformed(nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(5))), memory_budget=200, always_open=())
    optimizer = adamw(model.parameters())
    for seed in range(6):
        by_position(optimizer, evaluation(model, optimizer, seed))
        assert slimfit_fx.report(model).saved_bytes_after <= 200
    assert 0 < len(slimfit_fx.gates(model).open) < 5
