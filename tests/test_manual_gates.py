"""Gates set by hand: from the next training forward up to the next optimizer step, then the scheduler chooses again."""

from __future__ import annotations

import pytest
import torch
from helpers import transformed
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import slimfit_fx
from slimfit_fx import Gates

NAMES = [f"{i}.weight" for i in range(5)]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)))


def start(**options) -> tuple[nn.Module, torch.optim.Optimizer, Gates]:
    model = transformed(net(), **{"freeze_rate": 0.6, "always_open": (), **options})
    return model, torch.optim.AdamW(model.parameters(), lr=0.01), slimfit_fx.gates(model)


def backward(model: nn.Module) -> list[str]:
    """One micro-batch; the layers that it gave gradients to."""
    kept = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    model(torch.randn(3, 4)).square().sum().backward()
    trained = [name for name, p in model.named_parameters() if name in NAMES and p.grad is not None]
    for name, parameter in model.named_parameters():
        before = kept[name]
        if before is not None:
            parameter.grad = before if parameter.grad is None else parameter.grad + before
    return trained


def test_set_before_every_forward():
    model, optimizer, gates = start()
    for step in range(6):
        wanted = [NAMES[step % 5], NAMES[(step + 2) % 5]]
        gates.set(wanted)
        assert backward(model) == sorted(wanted) == gates.open
        optimizer.step()
        optimizer.zero_grad()
    history = list(slimfit_fx.scheduler(model).history)
    assert [choice.step for choice in history] == [0, 1, 2, 3, 4, 5]
    assert [len(choice.open) for choice in history] == [2] * 6
    assert history[-1].open == (NAMES[0], NAMES[2])


@pytest.mark.parametrize("when", ["before the step", "after the step"])
def test_the_step_is_that_of_the_forward(when):
    """What is set after a backward counts from the next forward: the gradients that are there are stepped with."""
    model, optimizer, gates = start()
    gates.set(NAMES[:1])
    backward(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    if when == "before the step":
        gates.set(NAMES[1:2])
    optimizer.step()
    if when == "after the step":
        gates.set(NAMES[1:2])
    assert [name for name in NAMES if not torch.equal(model.state_dict()[name], before[name])] == NAMES[:1]
    optimizer.zero_grad()
    assert backward(model) == NAMES[1:2]


def test_they_hold_for_all_micro_batches_of_a_step_and_no_longer():
    model, optimizer, gates = start(policy="cyclic")
    for by_hand in (NAMES[:1], None, NAMES[3:], None, None):
        if by_hand is not None:
            gates.set(by_hand)
        found = [backward(model) for _ in range(3)]
        assert found[0] == found[1] == found[2]
        assert found[0] == by_hand if by_hand is not None else len(found[0]) == 2
        optimizer.step()
        optimizer.zero_grad()


def test_set_between_micro_batches():
    """What was open in any of them is stepped with."""
    model, optimizer, gates = start()
    gates.set(NAMES[:1])
    backward(model)
    gates.set(NAMES[1:2])
    backward(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer.step()
    assert [name for name in NAMES if not torch.equal(model.state_dict()[name], before[name])] == NAMES[:2]
    scheduler = slimfit_fx.scheduler(model)
    scheduler.step()
    assert scheduler.history[0].open == tuple(NAMES[:2])
    assert scheduler.state.held == (1, 1, 0, 0, 0)


def test_a_single_gate_leaves_the_others_to_the_scheduler():
    alone, with_one = start(policy="cyclic"), start(policy="cyclic")
    for _ in range(5):
        chosen = backward(alone[0])
        with_one[2]["4.weight"] = True
        assert backward(with_one[0]) == sorted({*chosen, "4.weight"})
        for _, optimizer, _ in (alone, with_one):
            optimizer.step()
            optimizer.zero_grad()
        slimfit_fx.scheduler(with_one[0]).load_state_dict(slimfit_fx.scheduler(alone[0]).state_dict())


def test_asking_for_the_state_does_not_undo_them():
    model, optimizer, gates = start()
    backward(model)
    optimizer.step()
    gates.set(NAMES[4:])
    saved = slimfit_fx.scheduler(model).state_dict()
    assert saved["open"] == [False, False, False, False, True]
    assert slimfit_fx.scheduler(model).history[-1].open == ("4.weight",)
    optimizer.zero_grad()
    assert backward(model) == NAMES[4:]


def test_a_loaded_state_replaces_them():
    model, optimizer, gates = start()
    saved = slimfit_fx.scheduler(model).state_dict()
    backward(model)
    optimizer.step()
    gates.set(NAMES)
    slimfit_fx.scheduler(model).load_state_dict(saved)
    optimizer.zero_grad()
    assert backward(model) == [name for name, is_open in zip(NAMES, saved["open"], strict=True) if is_open]
    history = list(slimfit_fx.scheduler(model).history)
    assert [choice.step for choice in history] == [0, 0]
    assert list(history[-1].open) == gates.open


def test_under_a_budget():
    model, optimizer, gates = start(freeze_rate=0.9, memory_budget=200)
    backward(model)
    optimizer.step()
    gates.set(NAMES[:3])
    optimizer.zero_grad()
    assert backward(model) == NAMES[:3]
    optimizer.step()
    optimizer.zero_grad()
    backward(model)
    assert slimfit_fx.report(model).saved_bytes_after <= 200


@settings(max_examples=25)
@given(st.data())
def test_any_order(data):
    """Against a model of what is asked: gates change by hand at once, by the scheduler at forwards after steps."""
    model, optimizer, gates = start(policy="random")
    reference, _, _ = start(policy="random")  # its state says what the policy chooses
    scheduler, chooser = slimfit_fx.scheduler(model), slimfit_fx.scheduler(reference)
    by_hand, stepped, trained = {}, False, set()
    expected = dict(gates)
    for _ in range(data.draw(st.integers(3, 10))):
        action = data.draw(st.sampled_from(["forward", "step", "set", "single", "ask"]))
        if action == "set":
            names = data.draw(st.sets(st.sampled_from(NAMES)))
            gates.set(names)
            by_hand = {name: name in names for name in NAMES}
        elif action == "single":
            name, by_hand_open = data.draw(st.sampled_from(NAMES)), data.draw(st.booleans())
            gates[name] = by_hand_open
            by_hand[name] = by_hand_open
        elif action == "ask":
            scheduler.state_dict()
        elif action == "step" and trained:
            optimizer.step()
            optimizer.zero_grad()
            stepped = True
        elif action == "forward":
            if stepped:
                chooser._flags = [name in trained for name in NAMES]
                chooser._stepped = True
                chooser._count()
                expected, stepped, trained = dict(slimfit_fx.gates(reference)), False, set()
            expected, by_hand = {**expected, **by_hand}, {}
            found = set(backward(model))
            assert found == {name for name, is_open in expected.items() if is_open}
            trained |= found | {""}
            assert set(scheduler.history[-1].open) == trained - {""}


def test_gates_stay_on_the_cpu_whatever_the_default_device():
    torch.set_default_device("meta")
    try:
        gates = Gates(NAMES)
        gates.set(NAMES[:2])
        gates[NAMES[3]] = True
        assert gates.open == [NAMES[0], NAMES[1], NAMES[3]]
        assert gates.read([0, None, 2]).tolist() == [True, True, False]
        assert gates.read([0]).device.type == gates.table.device.type == "cpu"
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize("options", [{}, {"freeze_rate": 0.9, "memory_budget": 200}], ids=["rate", "budget"])
def test_training_under_another_default_device(options):
    """Of a model and batches that are where they are."""
    batch = torch.randn(6, 4)
    with torch.device("meta"):
        model, optimizer, gates = start_from(net_on_cpu(), **options)
        opened = set()
        for _ in range(6):
            optimizer.zero_grad()
            model(batch).square().sum().backward()
            optimizer.step()
            opened |= set(gates.open)
    assert len(opened) > 2


def net_on_cpu() -> nn.Module:
    with torch.device("cpu"):
        return net()


def start_from(model: nn.Module, **options):
    model = transformed(model, **{"freeze_rate": 0.6, "always_open": (), **options})
    return model, torch.optim.SGD(model.parameters(), lr=0.01), slimfit_fx.gates(model)
