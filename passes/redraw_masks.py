"""Draws dropout masks again in the backward, from the seeds that the forward drew them from, instead of saving them.

A mask is a comparison of random numbers with a rate, and Inductor's random numbers are a function of seed and place:
the backward makes the same ones. All masks of a graph share one small tensor of seeds, which is saved for them. (The
interpreter draws from torch's generator. It has no seeds, and saves masks as bits.)

On a GPU that takes no bytes and no kernel; bits take a kernel that packs random numbers written as float32. On a CPU it
costs more than it saves: 7 ns a number on two cores, 7% of the step of a 4-layer BERT, for 5% of its saved bytes.

It runs behind `rebuild`, which may make other tensors from the masks.
"""

from __future__ import annotations

import torch
from torch import fx

from slimfit_fx.graph.move_to_forward import between
from slimfit_fx.graph.nodes import CREATIONS, VIEWS, bytes_of, is_pointwise
from slimfit_fx.graph.plan import Plan, SavedTensor
from slimfit_fx.graph.split import SplitGraph

_prims = torch.ops.prims
# Where drawing a number costs less than loading a bit.
_FAST = frozenset({"cuda", "xpu"})
_RANDOM = frozenset({_prims.inductor_random.default, _prims.inductor_lookup_seed.default})


def redraw_masks(split: SplitGraph, plan: Plan) -> None:
    """Draws dropout masks again from their seeds instead of saving them."""
    there: dict[fx.Node, fx.Node] = {}
    for node, placeholder in list(split.saved()):
        row = plan.find(placeholder.name)
        if row is None or row.role != "dropout mask" or row.dynamic or not row.rebuildable:
            continue
        seeds = _seeds_of(node)
        if seeds is None or seeds.meta["val"].device.type not in _FAST:
            continue
        if seeds not in there:
            there[seeds] = _save(split, plan, seeds, row)
        split.replace_saved(placeholder, [], lambda _, node=node, seeds=seeds: _draw(split, node, seeds, there[seeds]))
        row.decide(None)
        row.store(0, "drawn again")


def _seeds_of(mask: fx.Node) -> fx.Node | None:
    """The tensor of seeds that `mask` is a pointwise function of, and of nothing else that takes computing."""
    seeds, pending, seen = set(), [mask], set()
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.target is _prims.inductor_seeds.default:
            seeds.add(node)
        elif node.target in _RANDOM or is_pointwise(node) or node.target in VIEWS or node.target in CREATIONS:
            pending.extend(node.all_input_nodes)
        else:
            return None
    return seeds.pop() if len(seeds) == 1 else None


def _save(split: SplitGraph, plan: Plan, seeds: fx.Node, first: SavedTensor) -> fx.Node:
    """Hands the seeds over, with a row of their own before that of the first mask."""
    placeholder = split.save(seeds)
    shape = tuple(int(size) for size in seeds.meta["val"].shape)
    row = SavedTensor(placeholder.name, first.module, "indices", shape, "int64", (), nbytes=0, rebuildable=False)
    row.store(bytes_of(seeds))
    plan.saved.insert(0, row)
    return placeholder


def _draw(split: SplitGraph, mask: fx.Node, seeds: fx.Node, there: fx.Node) -> fx.Node:
    """Adds to the backward what makes `mask` in the forward; returns the mask there."""
    needed, copies = between({seeds}, mask), {seeds: there}
    with split.insertion():
        for node in (node for node in split.forward.graph.nodes if node in needed):
            copies[node] = copy = split.backward.graph.node_copy(node, copies.__getitem__)
            split.deferred.add(copy)
    return copies[mask]
