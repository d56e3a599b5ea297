"""The freezing rate at a step: a warm-up without freezing, then a rise to its end value."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from ..config import Config

# From the share of the rise that is done, 0 to 1, to the share of the end value.
_CURVES: Mapping[str, Callable[[float], float]] = {
    "constant": lambda _: 1.0,
    "linear": lambda done: done,
    "cosine": lambda done: (1 - math.cos(math.pi * done)) / 2,
}


def freeze_rate_at(config: Config, step: int) -> float:
    """The part of the layers that is closed at optimizer step `step`, counted from 0."""
    if config.policy == "static":
        return 1.0
    rising = step - config.warmup_steps
    if rising < 0:
        return 0.0
    done = min(1.0, rising / config.rise_steps) if config.rise_steps else 1.0
    return config.freeze_rate * (1.0 if done == 1.0 else _CURVES[config.rate_schedule](done))
