"""Whether all processes of a run under DistributedDataParallel or FSDP2 chose the same layers: one small all-reduce a
forward."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from slimfit_fx.errors import StateError
from slimfit_fx.model.shards import all_groups, is_sharded


class Agreement:
    """Compares the gates of all ranks. A result is looked at in the next forward, when it has long arrived."""

    def __init__(self) -> None:
        self._pending: tuple[Any, Tensor] | None = None

    def check(self, step: int, flags: Sequence[bool], parameters: Iterable[Tensor]) -> None:
        """Call when a forward begins, on all ranks.

        Args:
            parameters: of the model; the first one that is sharded says over which ranks.

        Raises:
            StateError: the ranks had chosen different layers for the forward before.
        """
        if not dist.is_available() or not dist.is_initialized():
            return
        device, groups = _ranks(parameters)
        if not groups:
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
        extremes = torch.tensor([digest, -digest], device=device)
        for group in groups[:-1]:
            dist.all_reduce(extremes, dist.ReduceOp.MAX, group=group)
        work = dist.all_reduce(extremes, dist.ReduceOp.MAX, group=groups[-1], async_op=True)
        self._pending = work, extremes


def _ranks(parameters: Iterable[Tensor]) -> tuple[torch.device, tuple[dist.ProcessGroup, ...]]:
    """The device for collectives, and the groups that together reach all ranks; none where the model is on one."""
    wrapper = DistributedDataParallel._get_active_ddp_module()
    if wrapper is not None:
        device = wrapper.device if wrapper.device_type != "cpu" else torch.device("cpu")
        assert wrapper.process_group is not None
        return device, (wrapper.process_group,)
    sharded = next(filter(is_sharded, parameters), None)
    return (torch.device("cpu"), ()) if sharded is None else (sharded.device, all_groups(sharded))
