"""Which layers the policies choose, on made-up measurements."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimfit_fx.policies import POLICIES, held_open, select


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


@given(st.sampled_from(["update", "random", "cyclic"]), st.integers(2, 8), st.integers(1, 5), st.data())
def test_layers_stay_open_for_the_least_number_of_steps(policy, layers, hold, data):
    closed = data.draw(st.integers(0, layers))
    chosen = simulate(policy, layers, closed, 12, lambda layer, step: 1 / (1 + layer * step), hold)
    for layer in range(layers):
        flags = "".join("o" if gates[layer] else "." for gates in chosen)
        assert all(len(run) >= hold for run in flags.split(".")[:-1] if run)
    assert all(gates.count(False) <= closed for gates in chosen)
