"""Makes a comparison of saved numbers in the forward, where they are not rounded, and hands over its result."""

from __future__ import annotations

from torch import fx

from slimfit_fx.codecs import BitMask

from .move_to_forward import erase_unread, move_to_forward
from .nodes import bytes_of
from .plan import Plan, SavedTensor
from .split import SplitGraph


def decide_in_forward(split: SplitGraph, plan: Plan, taken: fx.Node, decision: fx.Node) -> bool:
    """Whether that could be done.

    Args:
        taken: one of the saved tensors that are compared, a placeholder of the backward.
        decision: a bool tensor of the backward that depends on no gradient.
    """
    row = plan.find(taken.name)
    mask = move_to_forward({placeholder: produced for produced, placeholder in split.saved()}, decision)
    if mask is None or row is None:
        return False
    placeholder = split.save(mask)
    decision.replace_all_uses_with(placeholder)
    erase_unread(decision)
    shape = tuple(int(size) if str(size).isdigit() else str(size) for size in mask.meta["val"].shape)
    new = SavedTensor(placeholder.name, row.module, "dropout mask", shape, "bool", (), nbytes=0)
    new.rebuildable = row.rebuildable
    new.want(BitMask())
    new.store(bytes_of(mask))
    plan.saved.insert(plan.saved.index(row) + 1, new)
    return True
