"""Which layers to open under a budget of bytes: the largest sum of scores that fits.

Opening a layer keeps the activations that it needs, and an activation that several layers share is kept once. Layers
that share nothing with others are the items of a knapsack; those linked by shared activations (query, key and value)
are one item, opened together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

import torch

from slimfit_fx.errors import ConfigError
from slimfit_fx.graph.plan import Plan

# Bytes are counted in whole units; a budget has at most so many. Where sizes have no large common divisor they are
# rounded up: what is chosen fits, and a better choice may be missed by 1/4096 of the budget an item.
_UNITS = 4096


@dataclass(frozen=True)
class Item:
    """Layers that open together at the price of `nbytes`."""

    layers: tuple[int, ...]
    nbytes: int


def choose_open(
    plan: Plan, scores: Sequence[float], forced: Sequence[bool], closable: Sequence[bool], budget: int
) -> tuple[bool, ...]:
    """The gates with the largest sum of scores whose saved tensors fit into `budget` bytes.

    Args:
        plan: of everything that a forward saves.
        scores: one per layer.
        forced: layers that have to be open if they fit (hysteresis); they come first.
        closable: the others are open at any price.
        budget: bytes of saved tensors.

    Raises:
        ConfigError: as `check_budget`.
    """
    flags = [not may_close for may_close in closable]
    check_budget(plan, flags, budget)
    items = find_items(plan, flags)
    for item in items:
        if any(forced[layer] for layer in item.layers):
            opened = [is_open or layer in item.layers for layer, is_open in enumerate(flags)]
            if plan.bytes_at(opened) <= budget:
                flags = opened
    room = budget - plan.bytes_at(flags)
    rest = [item for item in items if not all(flags[layer] for layer in item.layers)]
    lowest, highest = min(scores, default=0.0), max(scores, default=0.0)
    least = (highest - lowest) * 1e-9 or 1.0  # what fits is opened, whatever its score
    values = [sum(scores[layer] - lowest + least for layer in item.layers if not flags[layer]) for item in rest]
    for place in knapsack([item.nbytes for item in rest], values, room):
        for layer in rest[place].layers:
            flags[layer] = True
    return tuple(flags)


def check_budget(plan: Plan, always_open: Sequence[bool], budget: int) -> None:
    """Raises `ConfigError` if not even the layers that are always open fit; it names the smallest budget."""
    smallest = plan.bytes_at(always_open)
    if smallest > budget:
        raise ConfigError(
            f"memory_budget: {budget:,} bytes do not hold even what is saved with all gates closed. The smallest "
            f"budget for this model and batch is {smallest:,} bytes; or take a preset that stores less, or a smaller "
            "batch."
        )


def find_items(plan: Plan, open_gates: Sequence[bool]) -> list[Item]:
    """The closed layers as items, the price of each that of its tensors that no open layer keeps anyway."""
    group = list(range(len(open_gates)))

    def root(layer: int) -> int:
        while group[layer] != layer:
            layer = group[layer]
        return layer

    needed = [t for t in plan.saved if t.dynamic and not any(open_gates[layer] for layer in t.gates)]
    for tensor in needed:
        for layer in tensor.gates:
            group[root(layer)] = root(tensor.gates[0])
    nbytes: dict[int, int] = {}
    for tensor in needed:
        first = root(tensor.gates[0])
        nbytes[first] = nbytes.get(first, 0) + tensor.stored
    members: dict[int, list[int]] = {}
    for layer, is_open in enumerate(open_gates):
        if not is_open:
            members.setdefault(root(layer), []).append(layer)
    return [Item(tuple(layers), nbytes.get(first, 0)) for first, layers in members.items()]


def knapsack(sizes: Sequence[int], values: Sequence[float], room: int) -> list[int]:
    """The places of the items with the largest sum of values whose sizes fit into `room`.

    Exact if the sizes' greatest common divisor is at least 1/4096 of `room`; see above.
    """
    chosen = [place for place, size in enumerate(sizes) if size == 0]
    large = [place for place, size in enumerate(sizes) if 0 < size <= room]
    if not large:
        return chosen
    unit = max(gcd(*(sizes[place] for place in large)), -(-room // _UNITS))
    width = room // unit
    best = torch.zeros(width + 1, dtype=torch.float64, device="cpu")  # whatever the default device is
    taken = []
    for place in large:
        units = -(-sizes[place] // unit)
        with_it = torch.full_like(best, -torch.inf)
        if units <= width:
            with_it[units:] = best[: width + 1 - units] + values[place]
        taken.append(with_it > best)
        best = torch.maximum(best, with_it)
    left = width
    for place, better in zip(reversed(large), reversed(taken), strict=True):
        if better[left]:
            chosen.append(place)
            left -= -(-sizes[place] // unit)
    return sorted(chosen)
