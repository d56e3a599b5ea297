"""Calls a scheduler around the optimizer steps of the process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakSet

from torch.optim import Optimizer

from slimfit_fx.hints import Hints
from slimfit_fx.scheduling import Arguments, Scheduler

from .fused import not_fused
from .listeners import listen


def listen_to_optimizers(scheduler: Scheduler) -> Callable[[], None]:
    """Calls the scheduler around every optimizer step of the process; returns what ends that."""
    hints, seen = Hints(), WeakSet[Optimizer]()

    def before(
        target: Scheduler, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Arguments | None:
        arguments = target.before_optimizer_step(optimizer, args, kwargs)
        if optimizer not in seen:
            seen.add(optimizer)
            if optimizer in target.optimizers:
                hints.give("fused", not_fused, optimizer)
        return arguments

    return listen(scheduler, before=before, after=Scheduler.after_optimizer_step)
