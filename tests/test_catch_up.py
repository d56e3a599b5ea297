"""What makes up for closed steps: longer updates and faded momentum, for any optimizer, groups untouched."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import slimfit_fx
from slimfit_fx.scheduling.catch_up import catch_up_factor, fade_momentum, lengthen

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
}


@given(st.integers(0, 1000), st.floats(0, 1))
def test_factor(missed, exponent):
    factor = catch_up_factor(missed, exponent)
    assert 1 <= factor <= min(10, missed + 1)
    assert exponent > 0 or factor == 1


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_an_update_is_as_much_longer_as_the_layer_missed(make, exponent):
    """A layer is closed for three steps; its next update is that of the same step without catching up, lengthened."""

    def moved(catch_up: float) -> torch.Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        slimfit_fx.transform(model, mode="eager", freeze_rate=0.5, always_open=(), catch_up=catch_up)
        optimizer, gates = make(model.parameters()), slimfit_fx.gates(model)
        groups = copy.deepcopy([{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups])
        before = torch.empty(0)
        for step in range(5):
            slimfit_fx.scheduler(model).step()
            gates.set(["0.weight"] if step in (0, 4) else [])
            before = model[0].weight.detach().clone()
            optimizer.zero_grad()
            model(torch.ones(2, 4)).square().sum().backward()
            model[0].bias.grad = model[1].bias.grad = None  # so that both runs see the same gradients
            optimizer.step()
        assert [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups] == groups
        return model[0].weight.detach() - before

    torch.testing.assert_close(moved(exponent), moved(0.0) * 4**exponent, rtol=1e-4, atol=1e-6)


def test_lengthen_keeps_what_did_not_move():
    parameter = nn.Parameter(torch.tensor([1.0, 2.0]))
    lengthen(parameter, torch.tensor([1.0, 1.0]), 3.0)
    assert parameter.tolist() == [1.0, 4.0]


@pytest.mark.parametrize(
    ("make", "name", "decay"),
    [
        (lambda p: torch.optim.AdamW(p, betas=(0.8, 0.99)), "exp_avg", 0.8),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5), "momentum_buffer", 0.5),
        (lambda p: torch.optim.SGD(p, lr=0.1), None, None),
    ],
)
def test_momentum_fades_as_without_gradients(make, name, decay):
    first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = make([first, second])
    (first.sum() + second.sum()).backward()
    optimizer.step()
    states = copy.deepcopy([optimizer.state[p] for p in (first, second)])
    fade_momentum(optimizer, {first: 3})
    if name is None:
        return
    assert torch.equal(optimizer.state[first][name], states[0][name] * decay**3)
    assert torch.equal(optimizer.state[second][name], states[1][name])


def test_a_run_with_everything_on_resumes_bit_for_bit():
    config: dict[str, Any] = dict(
        mode="eager", freeze_rate=0.6, always_open=(), catch_up=0.5, decay_moments=True, min_open_steps=2
    )
    config |= dict(rate_schedule="cosine", rise_steps=4, warmup_steps=1, closed_state="none", closed_state_after=2)

    def train(model, optimizer, steps):
        for step in range(*steps):
            torch.manual_seed(step)
            model(torch.randn(3, 4)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    def fresh():
        torch.manual_seed(0)
        model = slimfit_fx.transform(nn.Sequential(*(nn.Linear(4, 4) for _ in range(5))), **config)
        return model, torch.optim.AdamW(model.parameters(), lr=0.01)

    whole, optimizer = fresh()
    train(whole, optimizer, (0, 5))
    saved = copy.deepcopy((whole.state_dict(), optimizer.state_dict(), slimfit_fx.scheduler(whole).state_dict()))
    train(whole, optimizer, (5, 12))
    resumed, optimizer = fresh()
    resumed.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    slimfit_fx.scheduler(resumed).load_state_dict(saved[2])
    train(resumed, optimizer, (5, 12))
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())
