"""Hooks that the user registers on parameters: they run for gradients, and a frozen layer has none."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

# `register_multi_grad_hook(mode="all")` counts the calls of this hook and expects None for a missing gradient.
_COUNTING = ("torch.autograd.graph", "register_multi_grad_hook.<locals>.get_inner_hook.<locals>.inner_hook")


def spare_hooks(parameters: Iterable[Tensor]) -> None:
    """Makes hooks of `register_hook` and `register_post_accumulate_grad_hook` skip backwards without a gradient.

    Autograd would call them: a gradient that a node does not return is None to them. Each hook is replaced where it is
    kept, so that its handle still removes it. Cheap for parameters without hooks.
    """
    for parameter in parameters:
        if hooks := parameter._backward_hooks:
            _replace(hooks, _if_given)
        if hooks := parameter._post_accumulate_grad_hooks:
            _replace(hooks, _if_accumulated)


def _replace(hooks: dict[int, Callable[..., Any]], spared: Callable[..., Any]) -> None:
    for key, hook in hooks.items():
        if not hasattr(hook, "_spared") and (hook.__module__, getattr(hook, "__qualname__", "")) != _COUNTING:
            hooks[key] = spared(hook)


def _if_given(hook: Callable[[Tensor], Any]) -> Callable[[Tensor | None], Any]:
    @functools.wraps(hook)
    def run(gradient: Tensor | None) -> Any:
        return None if gradient is None else hook(gradient)

    run._spared = True  # type: ignore[attr-defined]
    return run


def _if_accumulated(hook: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    @functools.wraps(hook)
    def run(parameter: Tensor) -> Any:
        return None if parameter.grad is None else hook(parameter)

    run._spared = True  # type: ignore[attr-defined]
    return run
