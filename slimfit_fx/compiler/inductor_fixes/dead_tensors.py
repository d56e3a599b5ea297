"""Frees tensors of which only the number of rows is used later.

`save_if_open` returns as many rows as are kept, which is known at run time. Inductor takes such a number for a use of
the tensor that it is read from, and a result of the graph with that number of rows for the last: the tensor stays
alive until the graph ends (torch 2.13). So a kept tensor of which codes are handed over lived as long as the forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from slimfit_fx.torch_internals import OutputNode, SchedulerBuffer, V

from .replaced import replaced


@contextmanager
def sizes_hold_nothing() -> Iterator[None]:
    """Inside, Inductor frees a tensor behind its last reader, whoever knows its size."""
    can_free = SchedulerBuffer.can_free

    def of_readers(buffer: Any) -> bool:
        users = buffer.users
        if buffer.node.get_unbacked_symbol_defs() and buffer.get_name() not in V.graph.get_output_names():
            buffer.users = [use for use in users if not isinstance(use.node, OutputNode)]
        try:
            return can_free(buffer)
        finally:
            buffer.users = users

    with replaced(SchedulerBuffer, "can_free", of_readers):
        yield
