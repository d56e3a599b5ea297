"""Calls a scheduler around the optimizer steps of the process."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from slimfit_fx.compiler.dynamo import not_traced
from slimfit_fx.hints import Hints
from slimfit_fx.scheduling import Arguments, Scheduler

from .fused import not_fused


def listen_to_optimizers(scheduler: Scheduler) -> Callable[[], None]:
    """Calls the scheduler around every optimizer step of the process; returns what ends that."""
    alive, hints, seen = weakref.ref(scheduler), Hints(), WeakSet[Optimizer]()

    @not_traced
    def before(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        if (target := alive()) is None:
            return None
        arguments = target.before_optimizer_step(optimizer, args, kwargs)
        if optimizer not in seen:
            seen.add(optimizer)
            if optimizer in target.optimizers:
                hints.give("fused", not_fused, optimizer)
        return arguments

    @not_traced
    def after(optimizer: Optimizer, *_: Any) -> None:
        if (target := alive()) is not None:
            target.after_optimizer_step(optimizer)

    handles = (register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after))

    def remove() -> None:
        for handle in handles:
            handle.remove()

    weakref.finalize(scheduler, remove)
    return remove
