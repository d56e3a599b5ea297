"""Parameters that are shared out over ranks (DTensor): what of them is here, and who has the rest."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether `tensor` is a DTensor. Asking imports nothing: where nobody made one, its module is not there."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """The elements that this rank has, perhaps none, detached and in the same memory; a plain tensor as it is."""
    return tensor.detach().to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def shard_groups(tensor: Tensor) -> tuple[dist.ProcessGroup, ...]:
    """The groups over which sums of the local elements become those of all; none for a plain tensor.

    Over replicas nothing is added up: each has the whole sum.
    """
    if not is_sharded(tensor):
        return ()
    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    return tuple(mesh.get_group(dim) for dim, placement in enumerate(placements) if placement.is_shard())


def all_groups(tensor: Tensor) -> tuple[dist.ProcessGroup, ...]:
    """The groups that together reach all ranks that have a part, or a copy, of `tensor`; none for a plain tensor."""
    if not is_sharded(tensor):
        return ()
    mesh = tensor.device_mesh  # type: ignore[attr-defined]
    return tuple(mesh.get_group(dim) for dim in range(mesh.ndim))


@torch.no_grad()
def sum_over(groups: Sequence[dist.ProcessGroup], values: Tensor) -> Tensor:
    """`values` in their place, added up over the ranks. The host does not wait for a device."""
    for group in groups:
        dist.all_reduce(values, group=group)
    return values
