"""Parameters that are replaced after transform, and calls with other parameters than the model's."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from helpers import gradients, transformed
from torch import nn
from torch.nn.utils import parametrize, prune

import slimfit_fx
from slimfit_fx import BackwardError, StateError


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x))) @ self.scale


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block(), nn.Linear(4, 4))


def backward(model: nn.Module) -> None:
    model(torch.ones(3, 4)).square().sum().backward()


def load_assigning(model: nn.Module) -> None:
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)


def one_parameter(model: nn.Module) -> None:
    model[0].second.weight = nn.Parameter(torch.randn(4, 4))


def one_at_the_top(model: nn.Module) -> None:
    model[1].scale = nn.Parameter(torch.randn(4, 4))


def a_module(model: nn.Module) -> None:
    model[1].first = nn.Linear(4, 4)


def a_block(model: nn.Module) -> None:
    model[0] = Block()


def a_block_kept_elsewhere(model: nn.Module) -> None:
    model.__dict__["old"] = model[0]
    model[0] = Block()


def an_adapter(model: nn.Module) -> None:
    """That holds a copy of the weight."""
    model[2] = nn.Sequential(copy.deepcopy(model[2]), nn.Linear(4, 4))


def tied(model: nn.Module) -> None:
    model[0].first.weight = model[1].first.weight


def a_conversion(model: nn.Module) -> None:
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model.double().float()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


def without_gradient(model: nn.Module) -> None:
    model[2].weight = nn.Parameter(torch.randn(4, 4), requires_grad=False)


REPLACEMENTS = [load_assigning, one_parameter, one_at_the_top, a_module, a_block, a_block_kept_elsewhere]
REPLACEMENTS += [an_adapter, tied, a_conversion, without_gradient]


@pytest.mark.parametrize("regions", ["model", "blocks"])
@pytest.mark.parametrize("calls", [0, 1, 2])
@pytest.mark.parametrize("replace", REPLACEMENTS, ids=lambda replace: replace.__name__)
def test_a_replaced_parameter_is_an_error_in_the_next_call(replace, calls, regions):
    model = transformed(net(), freeze_rate=0.5, always_open=(), regions=regions)
    for _ in range(calls):
        backward(model)
    model.zero_grad()
    replace(model)
    before = copy.deepcopy(slimfit_fx.scheduler(model).state_dict())
    for _ in range(2):
        with pytest.raises(StateError, match=r"replaced after .*undo"):
            backward(model)
    assert slimfit_fx.scheduler(model).state_dict() == before
    assert all(gradient is None for gradient in gradients(model).values())
    model = slimfit_fx.transform(slimfit_fx.undo(model), mode="eager", freeze_rate=0.5, always_open=())
    backward(model)


def test_after_a_compiled_call_by_the_name_of_the_backend():
    model = net()
    compiled = torch.compile(model, backend="slimfit_fx", options={"mode": "eager", "always_open": ()})
    backward(compiled)
    load_assigning(model)
    with pytest.raises(StateError, match="replaced after"):
        backward(compiled)


def a_bias(model: nn.Module) -> None:
    model[0].first.bias = nn.Parameter(torch.randn(4))


def a_module_without_parameters(model: nn.Module) -> None:
    model[1].extra = nn.Identity()


def loaded(model: nn.Module) -> None:
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()})


def converted(model: nn.Module) -> None:
    model.double().float()


def swapped(model: nn.Module) -> None:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.double().float()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def wrapped(model: nn.Module) -> None:
    """The block moves, its parameters stay the model's."""
    model[0] = nn.Sequential(model[0], nn.Identity())


def pruned(model: nn.Module) -> None:
    prune.l1_unstructured(model[0].first, "weight", 0.5)


class Symmetric(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + weight.mT


def parametrized(model: nn.Module) -> None:
    parametrize.register_parametrization(model[0].first, "weight", Symmetric())


HARMLESS = [a_bias, a_module_without_parameters, loaded, converted, swapped, wrapped, pruned, parametrized]


@pytest.mark.parametrize("calls", [0, 1])
@pytest.mark.parametrize("change", HARMLESS, ids=lambda change: change.__name__)
def test_other_changes_are_none(change, calls):
    """Closed layers stay where they are, open ones train."""
    model = transformed(net(), freeze_rate=0.5, always_open=())
    if calls and change is swapped:
        pytest.skip("torch does not swap parameters that a compiled graph knows")
    for _ in range(calls):
        backward(model)
        model.zero_grad()
    known = {name: model.get_parameter(name) for name in slimfit_fx.gates(model)}
    change(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    moved = set()
    for _ in range(4):
        before = {name: parameter.detach().clone() for name, parameter in known.items()}
        backward(model)
        optimizer.step()
        optimizer.zero_grad()
        now = {name for name, parameter in known.items() if not torch.equal(parameter, before[name])}
        assert now == set(slimfit_fx.gates(model).open)
        moved |= now
    assert len(moved) > 4


def test_the_model_is_not_held():
    model = transformed(net(), freeze_rate=0.5, always_open=())
    backward(model)
    alive = weakref.ref(model[0])
    del model
    gc.collect()
    torch._dynamo.reset()
    gc.collect()
    assert alive() is None


def func_grad(model: nn.Module) -> None:
    values = {name: value.detach() for name, value in model.named_parameters()}
    torch.func.grad(lambda v: torch.func.functional_call(model, v, (torch.ones(3, 4),)).sum())(values)


def func_vmap(model: nn.Module) -> None:
    torch.func.vmap(model)(torch.ones(2, 3, 4))


@pytest.mark.parametrize("transform", [func_grad, func_vmap])
def test_transforms_of_torch_func_are_refused_by_name(transform):
    model = transformed(net(), freeze_rate=0.5, always_open=())
    with pytest.raises(BackwardError, match=r"torch\.func .*undo"):
        transform(model)
    backward(model)
    transform(slimfit_fx.undo(model))


def test_a_functional_call():
    """With the model's own parameters it is a call like any; with others the scheduler does not know them."""
    model = transformed(net(), freeze_rate=0.5, always_open=())
    own = dict(model.named_parameters())
    torch.func.functional_call(model, own, (torch.ones(3, 4),)).sum().backward()
    assert {name for name in slimfit_fx.gates(model) if own[name].grad is None} == set(slimfit_fx.gates(model).closed)
    other = {name: value.detach().clone().requires_grad_() for name, value in own.items()}
    with pytest.raises(StateError, match="functional_call"):
        torch.func.functional_call(model, other, (torch.ones(3, 4),))
    backward(model)


def test_gradients_asked_for_by_name():
    """`torch.autograd.grad`: None for closed layers if they may be unused; else torch's own error."""
    model = transformed(net(), freeze_rate=0.5, always_open=())
    gates, own = slimfit_fx.gates(model), dict(model.named_parameters())
    backward(model)
    expected = gradients(model)
    loss = model(torch.ones(3, 4)).square().sum()
    found = torch.autograd.grad(loss, list(own.values()), allow_unused=True)
    for name, gradient in zip(own, found, strict=True):
        assert gradient is None if name in gates.closed else torch.equal(gradient, expected[name])
    loss = model(torch.ones(3, 4)).square().sum()
    with pytest.raises(RuntimeError, match="allow_unused=True"):
        torch.autograd.grad(loss, [own[name] for name in gates.closed])
