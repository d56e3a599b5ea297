"""`optimizer.step(closure)`: the gradients are made while the optimizer steps, once or many times."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from torch.optim import LBFGS, Optimizer

# The arguments of an optimizer's `step`, the optimizer first; step hooks get and return them.
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Evaluations:
    """Closures on their way through an optimizer's step.

    The first call of a closure may begin a step: its forward chooses gates. Those that follow keep them, whatever other
    optimizers, or the same by way of its base class, did in between.

    Attributes:
        repeated: whether a closure is being called that was called before in the same step.
    """

    def __init__(self) -> None:
        self.repeated = False

    def follow(self, arguments: Arguments, after: Callable[[], None]) -> Arguments | None:
        """The arguments with a closure that calls `after` whenever the given one has run; None if there is none."""
        positional, named = arguments
        if callable(named.get("closure")):
            return positional, {**named, "closure": self._followed(named["closure"], after)}
        if len(positional) > 1 and callable(positional[1]):
            return (positional[0], self._followed(positional[1], after), *positional[2:]), named
        return None

    def _followed(self, closure: Callable[..., Any], after: Callable[[], None]) -> Callable[..., Any]:
        called = False

        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal called
            outer, self.repeated, called = self.repeated, self.repeated or called, True
            try:
                result = closure(*args, **kwargs)
            finally:
                self.repeated = outer
            after()
            return result

        return run


class LbfgsMemory:
    """Lets L-BFGS begin anew whenever other layers are open: then a frozen layer does not move.

    Its direction is made of steps and gradients of all parameters together. Those of earlier steps reach into layers
    that are frozen by now, and the change of a gradient that was not computed is no curvature.
    """

    def __init__(self) -> None:
        self._open: WeakKeyDictionary[Optimizer, frozenset[int]] = WeakKeyDictionary()

    def begin(self, optimizer: Optimizer, open_layers: frozenset[int], before: frozenset[int]) -> None:
        """Call when the gradients of a step are known. `before`: open at the step before, if no other is known."""
        if not isinstance(optimizer, LBFGS):
            return
        if open_layers != self._open.get(optimizer, before):
            restart(optimizer)
        self._open[optimizer] = open_layers


def shares_state(optimizer: Optimizer) -> bool:
    """Whether the optimizer keeps one state for all parameters, under one of them."""
    return isinstance(optimizer, LBFGS)


def restart(optimizer: Optimizer) -> None:
    """L-BFGS as before its first iteration: what it remembers of earlier steps does not hold any more.

    In place, because a step that is under way has the dictionary at hand. Other optimizers stay as they are.
    """
    if isinstance(optimizer, LBFGS):
        for state in optimizer.state.values():
            for name in set(state) - {"func_evals", "n_iter"}:
                del state[name]
            state["n_iter"] = 0
