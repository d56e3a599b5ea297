"""Who listens to the optimizer steps of the process.

torch walks through its hooks while they run, and fails if one goes meanwhile; a model may be collected at any moment.
So torch has two hooks of ours, which stay, and those who are gone are left out here.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from slimfit_fx.compiler.dynamo import not_traced

from .closures import Arguments

Owner = TypeVar("Owner")


@dataclass(eq=False)
class _Listener:
    """Functions that get their owner, which they do not hold, before all else."""

    owner: weakref.ref[Any]
    before: Callable[..., Arguments | None] | None
    after: Callable[..., None]


_listeners: list[_Listener] = []
_hooked: list[Any] = []  # torch's handles, once there are listeners


def listen(
    owner: Owner,
    *,
    after: Callable[[Owner, Optimizer], None],
    before: Callable[[Owner, Optimizer, tuple[Any, ...], dict[str, Any]], Arguments | None] | None = None,
) -> Callable[[], None]:
    """Calls the functions around every optimizer step of the process while `owner` lives; returns what ends that.

    Args:
        owner: not held.
        before: gets the arguments of `step` as well; may return others.
    """
    if not _hooked:
        _hooked.extend((register_optimizer_step_pre_hook(_before), register_optimizer_step_post_hook(_after)))
    listener = _Listener(weakref.ref(owner), before, after)
    _forget_dead()
    _listeners.append(listener)

    def end() -> None:
        if listener in _listeners:
            _listeners.remove(listener)

    return end


@not_traced
def _before(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
    changed = None
    for listener in _listeners[:]:
        owner = listener.owner()
        if owner is not None and listener.before is not None:
            given = listener.before(owner, optimizer, args, kwargs)
            if given is not None:
                changed = args, kwargs = given
    return changed


@not_traced
def _after(optimizer: Optimizer, *_: Any) -> None:
    for listener in _listeners[:]:
        if (owner := listener.owner()) is not None:
            listener.after(owner, optimizer)
    _forget_dead()


def _forget_dead() -> None:
    _listeners[:] = [listener for listener in _listeners if listener.owner() is not None]
