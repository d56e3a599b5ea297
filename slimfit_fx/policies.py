"""Policies: pure functions over an explicit state, so that a resume is a copy of the state.

    state = policy.init(layers, seed)           before the first step
    priority = policy.priority(state)           one number per layer
    flags = select(priority, closable, closed)  which gates are open: all but `closed` of the closable layers
    state = policy.advance(state, flags)        after the optimizer step
    state = policy.learn(state, measured)       when its measurements are there: one step later

What a policy measures of each open layer is in `measures`: `"update"`, the mean relative change of its weights;
`"gradient"`, the norm of its gradient relative to that of its weights; `"gain"`, by how much its update lowered the
loss, to first order; or nothing.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

# Larger than anything measured, so that every layer gets its first turn before one gets its second.
_UNSEEN = 1e9
# Had its first turn, not measured yet.
_AWAITED = -1.0
# Of the mean score: an overdue layer that scored nothing when it was last open gets its turn as if it had scored this.
_LEAST_SHARE = 0.1


@dataclass(frozen=True)
class State:
    """All that a policy remembers, one number per layer in each tuple.

    Attributes:
        step: optimizer steps so far.
        seed: of random choices.
        score: of each layer, the larger the sooner it is trained.
        missed: for how many steps the layer has been closed; 0 if it was open at the last one.
        held: for how many steps it has been open; 0 if it was closed at the last one.
    """

    step: int
    seed: int
    score: tuple[float, ...]
    missed: tuple[int, ...]
    held: tuple[int, ...]


# A policy's part of `advance`: the scores after a step, from the state before it and the gates.
Rescore = Callable[[State, Sequence[bool]], tuple[float, ...]]


@dataclass(frozen=True)
class Policy:
    """A way to score layers.

    Attributes:
        rescore: the scores after a step, as far as they need no measurement.
        measures: `"update"`, `"gradient"`, `"gain"` or `""`.
        smoothing: the part of a layer's score that stays when it is measured anew.
        overdue: whether a layer's score counts once for each step since it was open.
    """

    rescore: Rescore
    measures: str = ""
    smoothing: float = 0.0
    overdue: bool = False

    def init(self, layers: int, seed: int) -> State:
        """The state before the first step: layers in random order."""
        return State(0, seed, _random_turn(layers, seed), (0,) * layers, (0,) * layers)

    def priority(self, state: State) -> tuple[float, ...]:
        """One number per layer; those with the smallest are frozen."""
        if not self.overdue:
            return state.score
        known = [score for score in state.score if 0 <= score < _UNSEEN]
        least = _LEAST_SHARE * sum(known) / len(known) if known else 0.0
        return tuple(
            (max(score, least) if score >= 0 else score) * (missed + 1)
            for score, missed in zip(state.score, state.missed, strict=True)
        )

    def advance(self, state: State, open_gates: Sequence[bool]) -> State:
        """The state after an optimizer step at which `open_gates` trained."""
        return replace(
            state,
            step=state.step + 1,
            score=self.rescore(state, open_gates),
            missed=tuple(0 if is_open else n + 1 for n, is_open in zip(state.missed, open_gates, strict=True)),
            held=tuple(n + 1 if is_open else 0 for n, is_open in zip(state.held, open_gates, strict=True)),
        )

    def learn(self, state: State, measured: Mapping[int, float]) -> State:
        """The state with what was measured at some step; a layer that diverged stays open until it is measured anew."""
        score = list(state.score)
        for layer, value in measured.items():
            old = score[layer] if 0 <= score[layer] < _UNSEEN else value
            value = self.smoothing * old + (1 - self.smoothing) * value
            score[layer] = value if math.isfinite(value) else _UNSEEN
        return replace(state, score=tuple(score))

    def forget(self, state: State, layers: Iterable[int]) -> State:
        """The state if the step at which `layers` were open did not move them (it was skipped, or the forward did not
        use them): their first turn is still to come."""
        awaited = [layer for layer in layers if self.measures and state.score[layer] == _AWAITED]
        if not awaited:
            return state
        score, turn = list(state.score), _random_turn(len(state.score), state.seed)
        for layer in awaited:
            score[layer] = turn[layer]
        return replace(state, score=tuple(score))


def select(
    priority: Sequence[float], closable: Sequence[bool], closed: int, held: Sequence[bool] | None = None
) -> tuple[bool, ...]:
    """The gates of the next step: the `closed` closable layers of the smallest priority are frozen.

    Layers that are `held` stay open, even if fewer than `closed` are left.
    """
    may_freeze = closable if held is None else [may and not hold for may, hold in zip(closable, held, strict=True)]
    candidates = [layer for layer, may in enumerate(may_freeze) if may]
    frozen = set(sorted(candidates, key=lambda layer: (priority[layer], layer))[:closed])
    return tuple(layer not in frozen for layer in range(len(closable)))


def held_open(state: State, min_open_steps: int) -> tuple[bool, ...]:
    """Which layers are open, and for fewer than `min_open_steps` steps so far."""
    return tuple(0 < steps < min_open_steps for steps in state.held)


def _random_turn(layers: int, seed: int, step: int = 0) -> tuple[float, ...]:
    """Huge scores in random order; the same for the same seed and step on every machine."""
    generator = random.Random(f"{seed}/{step}")
    return tuple(_UNSEEN * (1 + generator.random()) for _ in range(layers))


def _await(state: State, open_gates: Sequence[bool]) -> tuple[float, ...]:
    """Keeps the scores until they are measured; what had its first turn is no longer ahead of the others."""
    return tuple(
        _AWAITED if is_open and score > _UNSEEN else score
        for score, is_open in zip(state.score, open_gates, strict=True)
    )


def _shuffle(state: State, open_gates: Sequence[bool]) -> tuple[float, ...]:
    return _random_turn(len(state.score), state.seed, state.step + 1)


def _queue(state: State, open_gates: Sequence[bool]) -> tuple[float, ...]:
    """Layers that were just trained go to the end of the queue, in their order."""
    last, score = min(state.score), list(state.score)
    trained = [layer for layer, is_open in enumerate(open_gates) if is_open]
    for place, layer in enumerate(trained, start=1):
        score[layer] = last - place
    return tuple(score)


def _stay(state: State, open_gates: Sequence[bool]) -> tuple[float, ...]:
    return state.score


# by name, as `Config.policy` has it; to add a policy, add it here
POLICIES: dict[str, Policy] = {
    "update": Policy(_await, measures="update"),
    "overdue": Policy(_await, measures="update", overdue=True),
    "gain": Policy(_await, measures="gain", smoothing=0.5, overdue=True),
    "gradient": Policy(_await, measures="gradient"),
    "random": Policy(_shuffle),
    "cyclic": Policy(_queue),
    "static": Policy(_stay),
}
