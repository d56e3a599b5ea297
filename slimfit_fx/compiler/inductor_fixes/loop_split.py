"""Keeps Inductor's C++ loops whole where splitting them would lose elements.

`CppScheduling.try_loop_split` turns a loop of n steps that divides its variable by d into loops of n // d and d steps.
It does not ask whether d divides n (torch 2.13 to 2.15): the last n % d elements are never computed, and the result
holds there what its memory held before.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import sympy

from slimfit_fx.torch_internals import CppScheduling, FloorDiv

from .replaced import replaced


@contextmanager
def exact_loop_splits() -> Iterator[None]:
    """Inside, Inductor splits a loop only where that loses nothing."""
    split = CppScheduling.try_loop_split

    @functools.wraps(split)
    def exact(scheduling: Any, nodes: list[Any]) -> Any:
        return split(scheduling, nodes) if all(map(_divides, nodes)) else nodes

    with replaced(CppScheduling, "try_loop_split", exact):
        yield


def _divides(node: Any) -> bool:
    """Whether each number by which a scheduler node divides a loop variable divides the length of that loop."""
    _, body, _ = node.node.get_default_sizes_body()
    divisions = {
        division
        for expression in body.indexing_exprs.values()
        if isinstance(expression, sympy.Expr)
        for division in expression.find(FloorDiv)
    }
    return all(
        body.var_ranges[variable] % divisor == 0
        for variable, divisor in (division.args for division in divisions)
        if variable in body.var_ranges
    )
