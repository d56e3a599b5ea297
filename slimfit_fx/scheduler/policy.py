"""Policies: pure functions (init, update, select) over an explicit state, so that a resume is a copy of the state.

    state = policy.init(layers, seed)              before the first step
    flags = policy.select(state, closable, n)      which gates are open: all but n of the closable layers
    state = policy.update(state, flags, measured)  after the optimizer step

`measured` holds the relative update of each open layer's weights: mean |w_new - w_old| / |w_old|.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

# Larger than any relative update, so that every layer gets its first turn before one gets its second.
_UNSEEN = 1e9


@dataclass(frozen=True)
class State:
    """All that a policy remembers.

    Attributes:
        step: optimizer steps so far.
        seed: of random choices.
        score: one number per layer; the layers with the smallest are frozen.
    """

    step: int
    seed: int
    score: tuple[float, ...]


@dataclass(frozen=True)
class Policy:
    """A way to score layers. `measures` says whether `update` wants the relative updates of the open layers."""

    init: Callable[[int, int], State]
    update: Callable[[State, Sequence[bool], Mapping[int, float]], State]
    measures: bool = False

    @staticmethod
    def select(state: State, closable: Sequence[bool], closed: int) -> tuple[bool, ...]:
        """The gates of the next step: the `closed` closable layers of the smallest score are frozen."""
        candidates = [layer for layer, may_close in enumerate(closable) if may_close]
        frozen = set(sorted(candidates, key=lambda layer: (state.score[layer], layer))[:closed])
        return tuple(layer not in frozen for layer in range(len(closable)))


def _random_turn(layers: int, seed: int, step: int = 0) -> tuple[float, ...]:
    """Huge scores in random order; the same for the same seed and step on every machine."""
    generator = random.Random(f"{seed}/{step}")
    return tuple(_UNSEEN * (1 + generator.random()) for _ in range(layers))


def _init(layers: int, seed: int) -> State:
    return State(0, seed, _random_turn(layers, seed))


def _update_relative(state: State, open_gates: Sequence[bool], measured: Mapping[int, float]) -> State:
    """The paper's inter-layer scheduling: trained layers get their new distance, frozen ones keep their old one."""
    score = list(state.score)
    for layer, distance in measured.items():
        score[layer] = distance if math.isfinite(distance) else _UNSEEN
    return replace(state, step=state.step + 1, score=tuple(score))


def _update_random(state: State, open_gates: Sequence[bool], measured: Mapping[int, float]) -> State:
    step = state.step + 1
    return replace(state, step=step, score=_random_turn(len(state.score), state.seed, step))


def _update_cyclic(state: State, open_gates: Sequence[bool], measured: Mapping[int, float]) -> State:
    """Layers that were just trained go to the end of the queue, in their order."""
    last = min(state.score)
    trained = [layer for layer, is_open in enumerate(open_gates) if is_open]
    score = list(state.score)
    for place, layer in enumerate(trained, start=1):
        score[layer] = last - place
    return replace(state, step=state.step + 1, score=tuple(score))


def _update_static(state: State, open_gates: Sequence[bool], measured: Mapping[int, float]) -> State:
    return replace(state, step=state.step + 1)


POLICIES: Mapping[str, Policy] = {
    "update": Policy(_init, _update_relative, measures=True),
    "random": Policy(_init, _update_random),
    "cyclic": Policy(_init, _update_cyclic),
    "static": Policy(_init, _update_static),
}
