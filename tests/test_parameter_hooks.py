"""Hooks on parameters run for gradients: not for a layer that is frozen, nor a second time once they are removed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import transformed
from torch import nn
from torch.autograd.graph import register_multi_grad_hook

import slimfit_fx
from slimfit_fx.policies import POLICIES

NAMES = ["0.weight", "1.weight", "2.weight", "3.weight"]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))


def backward(model: nn.Module, seed: int = 0) -> None:
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))
    model(x).square().sum().backward()


def weights(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if name in NAMES}


@pytest.mark.parametrize("regions", ["model", "blocks"])
@pytest.mark.parametrize("when", ["before transform", "before the forward", "before the backward"])
def test_a_hook_sees_gradients_only(when, regions):
    """And what it returns is the gradient."""
    model, seen, handles = net(), [], []

    def register() -> None:
        for name, parameter in weights(model).items():
            handles.append(parameter.register_hook(lambda g, name=name: (seen.append(name), g.clamp(-0.1, 0.1))[1]))

    if when == "before transform":
        register()
    slimfit_fx.transform(model, mode="eager", preset="exact", freeze_rate=0.5, always_open=(), regions=regions)
    gates = slimfit_fx.gates(model)
    if when == "before the forward":
        register()
    gates.set(NAMES[1:3])
    output = model(torch.randn(3, 4))
    if when == "before the backward":
        register()
    output.square().sum().backward()
    assert sorted(seen) == NAMES[1:3]
    for name, parameter in weights(model).items():
        assert (parameter.grad is None) == (name not in NAMES[1:3])
        assert parameter.grad is None or parameter.grad.abs().max() <= 0.1
    seen.clear()
    gates.set(NAMES)
    backward(model)
    assert sorted(seen) == NAMES, "each once, however often it was closed"
    for handle in handles:
        handle.remove()
    seen.clear()
    backward(model)
    assert not seen
    slimfit_fx.undo(model)


def test_a_hook_after_accumulation_sees_gradients_only():
    model, seen = transformed(net(), freeze_rate=0.5, always_open=()), []
    for name, parameter in weights(model).items():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: seen.append((name, p.grad.norm())))
    backward(model)
    assert [name for name, _ in sorted(seen)] == slimfit_fx.gates(model).open


def test_hooks_over_several_parameters():
    """`all`: called once, None for closed layers, as torch documents it. `any`: with a gradient."""
    model, every, first = transformed(net(), freeze_rate=0.5, always_open=()), [], []
    parameters = list(weights(model).values())
    register_multi_grad_hook(parameters, lambda gradients: every.append([g is not None for g in gradients]))
    register_multi_grad_hook(parameters, lambda gradient: first.append(gradient.shape), mode="any")
    for _ in range(2):
        backward(model)
    assert every == [slimfit_fx.gates(model).table.tolist()] * 2
    assert first == [(4, 4)] * 2


def in_backward(model: nn.Module, make) -> dict[nn.Parameter, torch.optim.Optimizer]:
    """An optimizer for each parameter, which steps as soon as the gradient is there."""
    optimizers = {p: make([p]) for p in model.parameters()}

    def step(parameter: nn.Parameter) -> None:
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    return optimizers


@pytest.mark.parametrize("options", [{}, dict(catch_up=1.0, decay_moments=True)], ids=["plain", "made up for"])
@pytest.mark.parametrize("policy", POLICIES)
def test_optimizers_in_the_backward(policy, options):
    """The run of one optimizer behind it, bit for bit."""
    config: dict[str, Any] = dict(freeze_rate=0.5, policy=policy, always_open=(), **options)
    behind, within = transformed(net(), **config), transformed(net(), **config)
    make = lambda parameters: torch.optim.AdamW(parameters, lr=0.01)  # noqa: E731
    optimizer, optimizers = make(behind.parameters()), in_backward(within, make)
    for seed in range(10):
        backward(behind, seed)
        optimizer.step()
        optimizer.zero_grad()
        backward(within, seed)
    found, expected = (slimfit_fx.scheduler(model).state_dict() for model in (within, behind))
    assert found["step"] == 10
    assert found == expected
    assert all(torch.equal(value, within.state_dict()[name]) for name, value in behind.state_dict().items())
    del optimizers


def test_states_of_closed_layers_go_also_if_their_optimizers_do_not_step():
    model = transformed(
        net(), freeze_rate=0.5, policy="cyclic", always_open=(), closed_state="none", closed_state_after=1
    )
    optimizers = in_backward(model, lambda parameters: torch.optim.AdamW(parameters, lr=0.01))
    for seed in range(6):
        backward(model, seed)
        for name, parameter in weights(model).items():
            assert bool(optimizers[parameter].state) == slimfit_fx.gates(model)[name]


def test_a_budget_opens_layers_though_none_is_open_at_first():
    """Only biases step then."""
    model, opened = transformed(net(), memory_budget=150, always_open=()), set()
    optimizers = in_backward(model, lambda parameters: torch.optim.AdamW(parameters, lr=0.01))
    for seed in range(6):
        backward(model, seed)
        opened |= set(slimfit_fx.gates(model).open)
    assert len(opened) > 1
    del optimizers
