"""Which layers take most memory while they are open, among the sets that a scheduler may choose."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence

from slimfit_fx.config import Config
from slimfit_fx.graph.plan import Plan
from slimfit_fx.scheduling.budget import choose_open
from slimfit_fx.scheduling.rate import freeze_rate_at

Flags = tuple[bool, ...]
_BETWEEN = 2  # sets that are largest in the midst of a backward


def open_at_once(config: Config, closable: Sequence[bool]) -> int:
    """How many closable layers are open at most, at the first steps of a rising rate; no memory budget."""
    return sum(closable) - int(freeze_rate_at(config, 0) * sum(closable))


def largest_sets(
    plan: Plan, gradients: Sequence[int], trains: Sequence[bool], closable: Sequence[bool], config: Config
) -> list[Flags]:
    """A few sets, one of which takes most; the last has the largest gradients.

    At the end of a forward the saved tensors of a set are alive, at the end of a backward its gradients; in between
    the gradients of the later layers and the saved tensors of the earlier ones. For each layer as the present one the
    set that takes most is found, and of these the largest two.

    Args:
        plan: of everything that a forward saves.
        gradients: bytes of each layer's gradients.
        trains: layers with a parameter that requires a gradient; the others are never open.
        closable: of those, the ones that may be closed.
    """
    count = len(gradients)
    held = [[t for t in plan.saved if layer in t.gates] for layer in range(count)]

    def choose(first: int, last: int) -> tuple[int, Flags]:
        """The set with the most bytes of gradients of the layers from `first` on and saved tensors up to `last`."""

        def saved(flags: Sequence[bool], layer: int) -> int:
            if layer > last:
                return 0
            return sum(t.stored for t in held[layer] if not any(flags[gate] for gate in t.gates))

        def cost(flags: Sequence[bool], layer: int) -> int:
            return (gradients[layer] if layer >= first else 0) + saved(flags, layer)

        flags = [alive and not may_close for alive, may_close in zip(trains, closable, strict=True)]
        if config.budget is not None:
            none = [False] * count
            alone = [float(cost(none, layer)) for layer in range(count)]
            chosen = choose_open(plan, alone, none, closable, config.budget)
            flags = [is_open and alive for is_open, alive in zip(chosen, trains, strict=True)]
        else:
            _open_dearest(flags, closable, open_at_once(config, closable), cost)
        opened = [layer for layer in range(count) if flags[layer]]
        tensors = {id(t): t.stored for layer in opened if layer <= last for t in held[layer]}
        total = sum(gradients[layer] for layer in opened if layer >= first) + sum(tensors.values())
        return total, tuple(flags)

    _, most_saved = choose(count, count)
    _, most_gradients = choose(0, -1)
    between = sorted({choose(layer, layer) for layer in range(count)}, reverse=True)
    sets = [flags for _, flags in between[:_BETWEEN]] + [most_saved]
    return [flags for flags in dict.fromkeys(sets) if flags != most_gradients] + [most_gradients]


def _open_dearest(
    flags: list[bool], closable: Sequence[bool], opened: int, cost: Callable[[Sequence[bool], int], int]
) -> None:
    """Opens `opened` of the closable layers, each time the one that costs most beside those that are open."""
    queue = [(-cost(flags, layer), layer) for layer, may_close in enumerate(closable) if may_close]
    heapq.heapify(queue)
    while opened and queue:
        _, layer = heapq.heappop(queue)
        now = (-cost(flags, layer), layer)  # less than it was, if it shares tensors with one that opened since
        if queue and now > queue[0]:
            heapq.heappush(queue, now)
            continue
        flags[layer] = True
        opened -= 1
