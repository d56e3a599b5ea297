"""Whether all processes of a DistributedDataParallel run chose the same layers: one small all-reduce a forward."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from slimfit_fx.errors import StateError


class Agreement:
    """Compares the gates of all ranks. A result is looked at in the next forward, when it has long arrived."""

    def __init__(self) -> None:
        self._pending: tuple[Any, torch.Tensor] | None = None

    def check(self, step: int, flags: Sequence[bool]) -> None:
        """Call when a forward begins, on all ranks.

        Raises:
            StateError: the ranks had chosen different layers for the forward before.
        """
        if not dist.is_available() or not dist.is_initialized():
            return
        wrapper = DistributedDataParallel._get_active_ddp_module()
        if wrapper is None:
            return
        if self._pending is not None:
            work, extremes = self._pending
            work.wait()
            largest, smallest = extremes.tolist()
            if largest != -smallest:
                raise StateError(
                    f"the ranks opened different layers before step {step}, so their weights drift apart: they did not "
                    "start alike. Give every rank the same seed, weights, optimizer state and scheduler state."
                )
        digest = int.from_bytes(hashlib.sha256(f"{step} {list(flags)}".encode()).digest()[:6], "big")
        extremes = torch.tensor([digest, -digest], device=wrapper.device if wrapper.device_type != "cpu" else "cpu")
        work = dist.all_reduce(extremes, dist.ReduceOp.MAX, group=wrapper.process_group, async_op=True)
        self._pending = work, extremes
