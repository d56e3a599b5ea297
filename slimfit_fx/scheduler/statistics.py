"""How far a training step moved the weights of a layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def relative_update(old: Sequence[Tensor], new: Sequence[Tensor]) -> Tensor:
    """mean |new - old| / |old| over all elements of a layer's tensors (paper, section 3), a float32 scalar.

    Elements that were exactly zero have no relative change: they count as unmoved. The result stays on the device.
    """
    total = torch.zeros((), dtype=torch.float32, device=new[0].device)
    for before, after in zip(old, new, strict=True):
        magnitude = before.abs()
        change = torch.sub(after, before).abs_().div_(magnitude)
        change.masked_fill_(magnitude == 0, 0)
        total += change.sum(dtype=torch.float32)
    return total / sum(tensor.numel() for tensor in new)
