"""The step of a group of numbers, in 16 bits."""

from __future__ import annotations

import torch
from torch import Tensor

# The largest step: the largest number that bfloat16 has.
_LARGEST = torch.finfo(torch.bfloat16).max
# By how much a step may be longer than asked for: the distance of two neighbours in bfloat16.
STEP_ROUNDING = 2**-7


def wide(x: Tensor) -> Tensor:
    """x in the dtype that codecs compute in: float32, or float64 as it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def step_of(extent: Tensor, levels: float, dtype: torch.dtype) -> Tensor:
    """extent / levels, or a little more: a number that bfloat16 has. NaN where the extent is not finite.

    It is rounded up by its bits, not by a conversion: generated code may go on with more bits than it stores. The last
    of the steps may pass the extent: what is decoded goes through `finite`.

    Args:
        extent: of each group; not negative.
        levels: how many steps it has.
        dtype: of the elements; what has no normal numbers there counts as nothing.
    """
    step = (extent * (1.0 / levels)).clamp(min=smallest(dtype))
    if step.dtype is torch.float32:
        bits = (step.view(torch.int32) + 0xFFFF) & -0x10000
        step = bits.view(torch.float32)
        step = step if levels > 1 else step.clamp(max=_LARGEST)
    return step + extent * 0.0  # zeros of such a group would otherwise survive alone


def stored(step: Tensor) -> Tensor:
    """A step as it is saved: bfloat16, or float64 as it is."""
    return step.to(torch.bfloat16) if step.dtype is torch.float32 else step


def finite(values: Tensor, dtype: torch.dtype, share: float = 1.0) -> Tensor:
    """Numbers that a step too many made larger than `share` of the dtype's largest, as that; NaN stays."""
    largest = torch.finfo(dtype).max * share
    return values.clamp(-largest, largest)


def smallest(dtype: torch.dtype) -> float:
    """A step under which a group is stored as zeros; not a denormal, which some hardware flushes to zero."""
    return max(torch.finfo(dtype).smallest_normal, 1e-36)
