"""The freezing rate at a step: a warm-up without freezing, then a rise to its end value."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from slimfit_fx.config import Config

# From the share of the rise that is done, 0 to 1, to the share of the end value.
_CURVES: Mapping[str, Callable[[float], float]] = {
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
    if not config.rise_steps:  # a constant schedule
        return config.freeze_rate
    return config.freeze_rate * _CURVES[config.rate_schedule](min(1.0, rising / config.rise_steps))
