"""Optimizers that the scheduler does not hear of: it warns, and can be told."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import transformed
from torch import nn

import slimfit_fx
from slimfit_fx import SlimFitWarning, StateError
from slimfit_fx.policies import POLICIES

MEASURING = [name for name, policy in POLICIES.items() if policy.measures]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(4, 4) for _ in range(6)))


def backward(model: nn.Module, seed: int = 0) -> None:
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))
    model(x).square().sum().backward()


class Masters:
    """An optimizer over copies of a model's weights."""

    def __init__(self, model: nn.Module, write: Callable[[nn.Parameter, torch.Tensor], None]) -> None:
        self.parameters, self.write = list(model.parameters()), write
        self.masters = [p.detach().clone().requires_grad_() for p in self.parameters]
        self.optimizer = torch.optim.AdamW(self.masters, lr=0.01)

    def step(self, keep: bool = False) -> None:
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.clone()
            if not keep:
                parameter.grad = None
        self.optimizer.step()
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            self.write(parameter, master)


def copied(parameter: nn.Parameter, master: torch.Tensor) -> None:
    with torch.no_grad():
        parameter.copy_(master)


def copied_unseen(parameter: nn.Parameter, master: torch.Tensor) -> None:
    parameter.data.copy_(master)


@pytest.mark.parametrize("write", [copied, copied_unseen])
def test_an_optimizer_over_copies_is_warned_of_once(write):
    model = transformed(net(), freeze_rate=0.5, always_open=())
    optimizer = Masters(model, write)
    with pytest.warns(SlimFitWarning, match=r"slimfit_fx\.scheduler\(model\)\.step\(\)") as found:
        for seed in range(30):
            backward(model, seed)
            optimizer.step()
    assert len([warning for warning in found if warning.category is SlimFitWarning]) == 1


def test_a_hand_written_update_is_warned_of():
    model = transformed(net(), freeze_rate=0.5, always_open=())
    with pytest.warns(SlimFitWarning):
        for seed in range(10):
            backward(model, seed)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        parameter -= 0.01 * parameter.grad
            model.zero_grad()


def ordinary(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for seed in range(15):
        backward(model, seed)
        optimizer.step()
        optimizer.zero_grad()


def long_accumulation(model: nn.Module) -> None:
    for seed in range(40):
        backward(model, seed)


def forwards_alone(model: nn.Module) -> None:
    for _ in range(40):
        model(torch.randn(3, 4))


def skipped_at_first(model: nn.Module) -> None:
    """As under a gradient scaler."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for seed in range(30):
        backward(model, seed)
        if seed > 7:
            optimizer.step()
        optimizer.zero_grad()


def with_weights_loaded(model: nn.Module) -> None:
    saved = copy.deepcopy(model.state_dict())
    for seed in range(2):
        backward(model, seed)
        model.load_state_dict(saved)
    ordinary(model)


def told(model: nn.Module) -> None:
    optimizer = Masters(model, copied)
    for seed in range(20):
        backward(model, seed)
        optimizer.step()
        slimfit_fx.scheduler(model).step()


LOOPS = [ordinary, long_accumulation, forwards_alone, skipped_at_first, with_weights_loaded, told]


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_other_loops_are_not_warned_of(loop):
    model = transformed(net(), freeze_rate=0.5, always_open=())
    with warnings.catch_warnings():
        warnings.simplefilter("error", SlimFitWarning)
        loop(model)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_step_by_hand_is_worth_one_of_an_optimizer(policy):
    """The same gates, scores and weights as with an optimizer over the parameters themselves."""
    options: dict[str, Any] = dict(freeze_rate=0.5, policy=policy, always_open=())
    heard, unheard = transformed(net(), **options), transformed(net(), **options)
    optimizer, masters = torch.optim.AdamW(heard.parameters(), lr=0.01), Masters(unheard, copied)
    for seed in range(12):
        backward(heard, seed)
        optimizer.step()
        optimizer.zero_grad()
        backward(unheard, seed)
        masters.step(keep=True)
        slimfit_fx.scheduler(unheard).step()
        unheard.zero_grad()
        found, expected = (slimfit_fx.scheduler(model).state_dict() for model in (unheard, heard))
        if policy == "gradient":  # relative to the weights, which have moved when the step is told of
            found, expected = ({**state, "measured": None, "score": state["score"]} for state in (found, expected))
            assert found.pop("score") == pytest.approx(expected.pop("score"), rel=0.1)
        assert found == expected
    assert all(torch.equal(value, unheard.state_dict()[name]) for name, value in heard.state_dict().items())


def test_a_step_by_hand_counts_once_and_at_once():
    model = transformed(net(), freeze_rate=0.5, policy="cyclic", always_open=())
    scheduler, gates = slimfit_fx.scheduler(model), slimfit_fx.gates(model)
    scheduler.step()
    assert scheduler.state.step == 0, "there was no forward yet"
    for step in range(1, 4):
        before = gates.open
        backward(model)
        scheduler.step()
        assert gates.open != before
        scheduler.step()
        assert scheduler.state.step == step == scheduler.history[-1].step


@pytest.mark.parametrize("when", ["before", "after", "both"])
def test_nothing_is_counted_twice(when):
    """`scheduler.step()` beside an optimizer that the scheduler hears of, at whatever place."""
    alone, model = (transformed(net(), freeze_rate=0.5, always_open=()) for _ in range(2))
    optimizers = [torch.optim.AdamW(each.parameters(), lr=0.01) for each in (alone, model)]
    for seed in range(8):
        for each, optimizer in zip((alone, model), optimizers, strict=True):
            backward(each, seed)
            if each is model and when in ("before", "both"):
                slimfit_fx.scheduler(model).step()
            optimizer.step()
            if each is model and when in ("after", "both"):
                slimfit_fx.scheduler(model).step()
            optimizer.zero_grad()
    assert slimfit_fx.scheduler(model).state_dict() == slimfit_fx.scheduler(alone).state_dict()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in alone.state_dict().items())


def test_the_state_may_be_asked_for_between_two_optimizers():
    alone, model = (transformed(net(), freeze_rate=0.5, always_open=()) for _ in range(2))
    for each in (alone, model):
        optimizers = [torch.optim.AdamW(part.parameters(), lr=0.01) for part in (each[:3], each[3:])]
        for seed in range(8):
            backward(each, seed)
            for optimizer in optimizers:
                optimizer.step()
                if each is model:
                    slimfit_fx.scheduler(model).state_dict()
                optimizer.zero_grad()
    assert slimfit_fx.scheduler(model).state_dict() == slimfit_fx.scheduler(alone).state_dict()


def test_from_an_optimizer_to_another_that_is_not_heard_of():
    """The first stays alive."""
    model = transformed(net(), freeze_rate=0.5, policy="cyclic", always_open=())
    first = torch.optim.SGD(model.parameters(), lr=0.01)
    backward(model)
    first.step()
    for _ in range(4):
        backward(model)
        slimfit_fx.scheduler(model).step()
    backward(model)
    assert slimfit_fx.scheduler(model).state.step == 5


@pytest.mark.parametrize("policy", ["gradient", "gain"])
def test_gradients_must_be_there_to_be_measured(policy):
    model = transformed(net(), freeze_rate=0.5, policy=policy, always_open=())
    optimizer, scheduler = Masters(model, copied), slimfit_fx.scheduler(model)
    for _ in range(2):
        backward(model)
        optimizer.step()
        before = scheduler.state_dict()
        with pytest.raises(StateError, match="before they are taken away"):
            scheduler.step()
        assert scheduler.state_dict() == before
    backward(model)
    optimizer.step(keep=True)
    scheduler.step()
    assert scheduler.state.step == 1


@pytest.mark.parametrize("options", [dict(catch_up=0.5), dict(decay_moments=True), dict(closed_state="none")])
def test_what_needs_an_optimizer_is_refused_without(options):
    model = transformed(net(), freeze_rate=0.5, always_open=(), **options)
    backward(model)
    with pytest.raises(StateError, match="leave these options out"):
        slimfit_fx.scheduler(model).step()
