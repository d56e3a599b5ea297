"""Calls of a transformed model: past the model, compiled over, changed since `transform`."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from helpers import gradients, transformed
from small_net import Net, X, weights
from torch import nn

import slimfit_fx
from slimfit_fx import SlimFitWarning, StateError
from slimfit_fx.runtime.registry import session_of


def test_a_report_after_an_evaluation_is_of_the_last_training_forward():
    model = Net()
    compiled: Any = torch.compile(model, backend="slimfit_fx", mode="eager")
    for asked, call in ((model, compiled), (transformed(Net()),) * 2):
        call(X).sum().backward()
        before = slimfit_fx.report(asked).to_json()
        for _ in range(2):
            with torch.no_grad():
                call.eval()(X)
            call(X[:2].clone())  # and with gradients
            with torch.no_grad():
                call.train()(X)
        if call is not compiled:  # torch.compile compiles evaluation with gradients as it does training
            assert slimfit_fx.report(asked).to_json() == before
        assert slimfit_fx.report(asked).saved_bytes_before


BYPASSES = {
    "forward": lambda model, x: model.forward(x),
    "parts": lambda model, x: model.head(model.features(x)),
    "call": lambda model, x: type(model).forward(model, x),
}


@pytest.mark.parametrize("way", BYPASSES)
@pytest.mark.parametrize("freeze_rate", [0.0, 0.9])
def test_training_past_the_model_is_named_once_and_frozen_all_the_same(way, freeze_rate):
    slim = transformed(Net(), freeze_rate=freeze_rate)
    optimizer = torch.optim.SGD(slim.parameters(), lr=0.1)
    with pytest.warns(SlimFitWarning, match=r"4 of 4 layers .*call it as model\(\.\.\.\)") as told:
        for _ in range(3):
            closed = slimfit_fx.gates(slim).closed
            before = {name: slim.get_parameter(name).clone() for name in closed}
            BYPASSES[way](slim, X).sum().backward()
            assert all(slim.get_parameter(name).grad is None for name in closed)
            optimizer.step()
            optimizer.zero_grad()
            assert all(torch.equal(slim.get_parameter(name), value) for name, value in before.items())
    assert len(told) == 1


def test_training_in_eval_mode_is_named_at_the_first_step():
    """Its gradients are those of the untouched model, for whoever wants no more than these."""
    slim = transformed(Net()).eval()
    optimizer = torch.optim.SGD(slim.parameters(), lr=0.1)
    slim(X).sum().backward()
    assert all(gradient is not None for gradient in gradients(slim).values())
    with pytest.warns(SlimFitWarning, match="in training mode"):
        optimizer.step()
    slim(X).sum().backward()
    optimizer.step()


def test_blocks_that_are_called_past_the_model_keep_their_gates():
    plain = Net()
    slim = transformed(plain, regions="blocks")
    slimfit_fx.gates(slim).set(["body.1.0.weight"])
    for _ in range(3):
        slim.zero_grad()
        slim.head(slim.features(X)).sum().backward()
        assert {n for n in weights(slim) if slim.get_parameter(n).grad is not None} == {"body.1.0.weight"}
        assert len(session_of(slim).active) == 4


def test_another_models_steps_are_no_matter():
    slim, other = transformed(Net()), nn.Linear(2, 2)
    other(torch.ones(2, 2)).sum().backward()
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    torch.optim.SGD([*slim.parameters(), *other.parameters()], lr=0.1).step()


def test_a_penalty_on_the_weights_does_not_reach_closed_layers():
    plain = Net()
    slim = transformed(plain)
    slimfit_fx.gates(slim).set(["head.weight"])
    loss = slim(X).sum() + sum(weight.square().sum() for weight in slim.parameters())
    with pytest.warns(SlimFitWarning, match="3 of 4 layers .*reads the weights"):
        loss.backward()
    (plain(X).sum() + sum(weight.square().sum() for weight in plain.parameters())).backward()
    assert {name for name in weights(slim) if slim.get_parameter(name).grad is not None} == {"head.weight"}
    torch.testing.assert_close(slim.head.weight.grad, plain.head.weight.grad)


def test_gradients_of_an_earlier_forward_arrive_whatever_the_gates_are_now():
    plain = Net()
    slim = transformed(plain)
    gates = slimfit_fx.gates(slim)
    gates.set(["body.0.0.weight"])
    first = slim(X)
    gates.set(["body.1.0.weight"])
    second = slim(X)
    gates.set([])
    first.sum().backward()
    second.sum().backward()
    assert {n for n in weights(slim) if slim.get_parameter(n).grad is not None} == {
        "body.0.0.weight",
        "body.1.0.weight",
    }


@pytest.mark.parametrize("regions", ["model", "blocks"])
def test_compiled_after_transform(regions):
    slim = transformed(Net(), regions=regions)
    if regions == "blocks":
        slim.body[1].compile(backend="eager")
    else:
        slim.compile(backend="eager")
    with pytest.raises(StateError, match=r"compiled after slimfit_fx.transform.*Leave model.compile\(\) out"):
        slim(X).sum().backward()
    plain = slimfit_fx.undo(slim)
    plain(X).sum().backward()


class Wrapper(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.out = inner, nn.Linear(3, 3)

    def forward(self, x):
        return self.out(self.inner(x))


@pytest.mark.parametrize("order", ["inner first", "outer first", "side by side", "named backend"])
def test_two_schedulers_for_one_layer(order):
    inner = Net()
    outer = Wrapper(inner)
    first, second = (outer, inner) if order == "outer first" else (inner, outer)
    if order == "side by side":
        first = Wrapper(inner)
    slimfit_fx.transform(first, mode="eager")
    with pytest.raises(StateError, match="transformed already.*two schedulers"):
        if order == "named backend":
            torch.compile(second, backend="slimfit_fx", mode="eager")(X)
        else:
            slimfit_fx.transform(second, mode="eager")
    slimfit_fx.undo(first)
    slimfit_fx.transform(second, mode="eager")
    second(X).sum().backward()


def test_a_copy_of_a_part_is_another_model():
    inner = transformed(Net())
    slimfit_fx.transform(Wrapper(copy.deepcopy(inner)), mode="eager")


@pytest.mark.parametrize("regions", ["model", "blocks"])
@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("change", ["same head", "wider head", "adapter", "block"])
def test_what_was_added_or_replaced_after_transform(regions, called, change):
    slim = transformed(Net(), regions=regions)
    if called:
        slim(X).sum().backward()
    if change == "block":
        slim.body[1] = copy.deepcopy(slim.body[1])
    elif change == "adapter":
        slim.body[1][0] = nn.Sequential(slim.body[1][0], nn.Linear(8, 8))
    else:
        slim.head = nn.Linear(8, 3 if change == "same head" else 5)
    for _ in range(2):
        with pytest.raises(StateError, match="replaced after slimfit_fx.transform.*undo"):
            slim(X).sum().backward()
    slimfit_fx.transform(slimfit_fx.undo(slim), mode="eager")
    slim(X).sum().backward()


def test_a_parameter_of_the_users_own_is_no_part_of_the_model():
    temperature = nn.Parameter(torch.ones(1))
    slim = transformed(Net())
    slim.fault = lambda x: x.mul_(temperature.exp())
    slim(X).sum().backward()
    assert temperature.grad is not None


def test_nothing_is_said_of_a_model_that_is_captured_whole():
    slim = transformed(Net())
    optimizer = torch.optim.AdamW(slim.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error", SlimFitWarning)
        for _ in range(3):
            for _ in range(2):
                slim(X).sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
    assert not slimfit_fx.report(slim).outside


def test_training_past_the_model_first_leaves_no_trace_in_the_report():
    slim = transformed(Net())
    with pytest.warns(SlimFitWarning):
        slim.forward(X).sum().backward()
    slim(X).sum().backward()
    assert not slimfit_fx.report(slim).outside
