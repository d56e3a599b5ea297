"""Memory budgets: what is chosen fits, nothing better does, and bytes are what the forward hands over."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import handed_over, no_recompile
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import slimfit_fx
from slimfit_fx import ConfigError
from slimfit_fx.graph.plan import Plan, SavedTensor
from slimfit_fx.scheduling.budget import choose_open, find_items, knapsack


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(1, 100)), max_size=9), st.integers(0, 60), st.integers(1, 99))
def test_the_knapsack_is_exact(items, room, unit):
    sizes, values = [size * unit for size, _ in items], [float(value) for _, value in items]
    chosen = knapsack(sizes, values, room * unit)
    assert sum(sizes[place] for place in chosen) <= room * unit
    subsets = itertools.chain.from_iterable(itertools.combinations(range(len(items)), n) for n in range(len(items) + 1))
    best = max(sum(values[p] for p in s) for s in subsets if sum(sizes[p] for p in s) <= room * unit)
    assert sum(values[place] for place in chosen) == best


def test_large_sizes_without_a_common_divisor_fit():
    sizes = [10**9 + 7 * place**2 for place in range(20)]
    chosen = knapsack(sizes, [1.0] * 20, 10**10)
    assert len(chosen) == 9
    assert sum(sizes[place] for place in chosen) <= 10**10


def plan_of(*tensors: tuple[int, tuple[int, ...]]) -> Plan:
    """Saved tensors as (bytes, layers)."""
    return Plan([SavedTensor(f"t{n}", "", "", (), "float32", layers, size) for n, (size, layers) in enumerate(tensors)])


def test_layers_that_share_a_tensor_are_one_item():
    plan = plan_of((100, ()), (8, (0, 1)), (4, (2,)), (2, (1,)))
    items = find_items(plan, [False] * 4)
    assert {(item.layers, item.nbytes) for item in items} == {((0, 1), 10), ((2,), 4), ((3,), 0)}
    assert {item.layers: item.nbytes for item in find_items(plan, [True, False, False, False])}[(1,)] == 2


@given(st.data())
def test_what_is_chosen_fits(data):
    layers = data.draw(st.integers(1, 8))
    some = st.lists(st.integers(0, layers - 1), max_size=3, unique=True).map(tuple)
    plan = plan_of(*data.draw(st.lists(st.tuples(st.integers(0, 50), some), max_size=10)))
    closable = data.draw(st.lists(st.booleans(), min_size=layers, max_size=layers))
    forced = data.draw(st.lists(st.booleans(), min_size=layers, max_size=layers))
    scores = data.draw(st.lists(st.floats(-1, 1e9), min_size=layers, max_size=layers))
    budget = data.draw(st.integers(0, 300))
    smallest = plan.bytes_at([not c for c in closable])
    if smallest > budget:
        with pytest.raises(ConfigError, match=rf"smallest budget for this model and batch is {smallest:,} bytes"):
            choose_open(plan, scores, forced, closable, budget)
        return
    flags = choose_open(plan, scores, forced, closable, budget)
    assert plan.bytes_at(flags) <= budget
    assert all(is_open or may_close for is_open, may_close in zip(flags, closable, strict=True))
    if plan.bytes_at([True] * layers) <= budget:
        assert all(flags)


def test_a_model_under_a_budget():
    """Between no layer and all: the forward hands over no more than asked, and what it could use it uses."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(6)))
    x = torch.randn(16, 32)
    budget = 6 * 16 * 32 * 4 + 3 * 16 * 32 * 4 + 500
    dropout = nn.Sequential(*(nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Dropout(0.5)) for _ in range(6)))
    for net in (model, dropout):
        slimfit_fx.transform(net, mode="eager", preset="exact", memory_budget=budget, always_open=())
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        opened = set()
        for step in range(8):
            outputs = net(x)
            nbytes = handed_over(outputs, net, {"input": x})
            assert nbytes <= budget
            assert nbytes == slimfit_fx.report(net).saved_bytes_after
            assert slimfit_fx.gates(net).open or step == 0
            opened |= set(slimfit_fx.gates(net).open)
            with no_recompile():
                outputs.sum().backward()
                optimizer.step()
                optimizer.zero_grad()
        assert len(opened) == 6


def test_an_impossible_budget_is_an_error_at_the_first_forward():
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
    slimfit_fx.transform(model, mode="eager", preset="exact", memory_budget=100, always_open=())
    with pytest.raises(ConfigError, match="The smallest budget for this model and batch is"):
        model(torch.randn(4, 8))
