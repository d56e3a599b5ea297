"""Scheduler states that are damaged: refused by name, and nothing is changed; or they train on."""

from __future__ import annotations

import copy
import functools
import json
import math
from typing import Any

import pytest
import torch
from helpers import transformed
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

import slimfit_fx
from slimfit_fx import StateError
from slimfit_fx.policies import POLICIES

LAYERS = 5


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(4, 4) for _ in range(LAYERS)))


@functools.cache
def trained(policy: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """One model for all examples of a policy."""
    options: dict[str, Any] = dict(freeze_rate=0.6, always_open=(), catch_up=0.5, decay_moments=True, min_open_steps=2)
    model = transformed(net(), policy=policy, rate_schedule="cosine", rise_steps=3, **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    steps(model, optimizer)
    return model, optimizer


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int = 3) -> None:
    for _ in range(count):
        optimizer.zero_grad()
        model(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()


def same(first: object, second: object) -> bool:
    """Equal, NaN with NaN."""
    return repr(first) == repr(second)


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-2, 10)
    | st.sampled_from([10**400, -(10**400), 2**63, 2**62, 2**62 - 1, 1e308, -1e308, 1e100, math.nan, math.inf])
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=3)
    | st.just(object()),
    lambda inner: st.lists(inner, max_size=LAYERS + 1) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=6,
)


@st.composite
def damaged(draw, state: dict):
    """A state with a few places changed: an entry missing, a value, an element, an element's part."""
    state = copy.deepcopy(state)
    for _ in range(draw(st.integers(1, 3))):
        if not state:
            break
        name = draw(st.sampled_from(sorted(state)))
        how = draw(st.sampled_from(["drop", "replace", "element", "fill", "part"]))
        if how == "drop":
            del state[name]
        elif how == "replace" or not isinstance(state[name], list) or not state[name]:
            state[name] = draw(ANYTHING)
        elif how == "fill":
            state[name] = [draw(ANYTHING)] * len(state[name])
        else:
            place = draw(st.integers(0, len(state[name]) - 1))
            if how == "part" and isinstance(state[name][place], list) and state[name][place]:
                state[name][place][draw(st.integers(0, len(state[name][place]) - 1))] = draw(ANYTHING)
            else:
                state[name][place] = draw(ANYTHING)
    return state


@settings(max_examples=60)
@given(st.sampled_from(list(POLICIES)), st.data())
def test_a_damaged_state_is_refused_or_trains_on(policy, data):
    model, optimizer = trained(policy)
    scheduler = slimfit_fx.scheduler(model)
    good = scheduler.state_dict()
    bad = data.draw(damaged(good))
    try:
        scheduler.load_state_dict(bad)
    except StateError:
        assert same(scheduler.state_dict(), good)
    else:
        steps(model, optimizer)
        step = scheduler.state.step
        assert step == bad["step"] + 3
        scheduler.load_state_dict(json.loads(json.dumps(scheduler.state_dict())))
        steps(model, optimizer)
    finally:
        scheduler.load_state_dict(good)


@given(ANYTHING)
@example({"version": 2})
def test_anything_else_is_refused(value):
    model, _ = trained("update")
    with pytest.raises(StateError):
        slimfit_fx.scheduler(model).load_state_dict(value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"measured": [[999, 1.0]]}, "'measured' has 999"),
        ({"measured": [[0, -1.0]]}, "'measured' has -1.0"),
        ({"measured": [[0, True]]}, "'measured' has True"),
        ({"measured": [[0, 1.0, 2.0]]}, "'measured' has a list"),
        ({"trained": [LAYERS]}, "'trained' has 5"),
        ({"trained": [-1]}, "'trained' has -1"),
        ({"trained": [0.0]}, "'trained' has 0.0"),
        ({"missed": [10**400] * LAYERS}, "'missed' has a int"),
        ({"missed": [-5] * LAYERS}, "'missed' has -5"),
        ({"held": [0.5] * LAYERS}, "'held' has 0.5"),
        ({"held": [True] * LAYERS}, "'held' has True"),
        ({"step": math.inf}, "'step' has inf"),
        ({"step": -1}, "'step' has -1"),
        ({"step": "3"}, "'step' has '3'"),
        ({"seed": None}, "'seed' has a NoneType"),
        ({"score": [math.nan] * LAYERS}, "'score' has nan"),
        ({"score": [math.inf] * LAYERS}, "'score' has inf"),
        ({"score": "01234"}, "'score' has '01234'"),
        ({"open": ["False"] * LAYERS}, "'open' has 'False'"),
        ({"open": [1] * LAYERS}, "'open' has 1"),
        ({"layers": [["0.weight"]] * LAYERS}, "'layers' has a list"),
        ({"policy": 3}, "'policy' has 3"),
        ({"version": "2"}, "version '2'"),
    ],
)
def test_the_message_says_what_is_wrong(change, message):
    model, _ = trained("update")
    scheduler = slimfit_fx.scheduler(model)
    good = scheduler.state_dict()
    with pytest.raises(StateError, match=message):
        scheduler.load_state_dict({**good, **change})
    assert same(scheduler.state_dict(), good)


@pytest.mark.parametrize("name", ["version", "step", "seed", "policy", "missed", "score", "trained"])
def test_numbers_that_python_does_not_print(name):
    model, _ = trained("update")
    good, huge = slimfit_fx.scheduler(model).state_dict(), 10**5000
    bad = [huge] * len(good[name]) if isinstance(good[name], list) else huge
    with pytest.raises(StateError):
        slimfit_fx.scheduler(model).load_state_dict({**good, name: bad})


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_measured_divergence_is_no_damage(value):
    model, optimizer = trained("update")
    scheduler = slimfit_fx.scheduler(model)
    good = scheduler.state_dict()
    scheduler.load_state_dict({**good, "measured": [[1, value]], "trained": [1]})
    steps(model, optimizer, 1)
    assert scheduler.state.score[1] == 1e9, "it stays open until it is measured anew"
    scheduler.load_state_dict(good)


def test_a_state_travels_by_json_and_by_torch(tmp_path):
    model, optimizer = trained("overdue")
    scheduler = slimfit_fx.scheduler(model)
    good = scheduler.state_dict()
    torch.save(good, tmp_path / "state.pt")
    for state in (json.loads(json.dumps(good)), torch.load(tmp_path / "state.pt", weights_only=True)):
        steps(model, optimizer, 1)
        scheduler.load_state_dict(state)
        assert scheduler.state_dict() == good
