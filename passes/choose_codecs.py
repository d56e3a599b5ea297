"""Chooses the codec of every saved tensor, by the rules of the configuration."""

from __future__ import annotations

import torch

from slimfit_fx.graph.plan import Plan
from slimfit_fx.graph.split import SplitGraph
from slimfit_fx.roles import GATES

# Tensors this much smaller than the largest one are not worth an error.
_SMALL = 64


def choose_codecs(_: SplitGraph, plan: Plan) -> None:
    """Notes the codec of each tensor, or the choice. What is much smaller than the others keeps its precision unless
    asked for.
    """
    choices = [
        (row, *plan.rules.chosen(row.role, row.module, getattr(torch, row.dtype)))
        for row in plan.saved
        if not row.borrowed and row.role != GATES
    ]
    largest = max((row.nbytes for row, _, choice in choices if choice is not None), default=0)
    for row, asked, choice in choices:
        if asked or row.nbytes * _SMALL >= largest:
            row.want(choice)
