"""How a tensor is cut into groups, and groups of small codes into bytes.

A group is a run of neighbours in memory order. The first dimension is never merged with others: it may be known at run
time only (a batch, or the rows of a kept tensor). Several codes share a byte across the group, not side by side:
byte j of a group holds elements j, j + s, j + 2s, … where s is the number of bytes. Generated code then reads and
writes runs of neighbours, which vector units can, instead of shuffling bits between lanes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from slimfit_fx.errors import ConfigError

# The group of codecs that need none but to share bytes: long runs for vector units.
RUN = 512


def check_group(codec: str, group: int) -> None:
    """Raises `ConfigError` if `group` is no size of a group."""
    if not isinstance(group, int) or group < 8:
        raise ConfigError(f"{codec}: group is a number of elements, at least 8, got {group!r}")


def grouped(x: Tensor, group: int, multiple: int = 1) -> Tensor:
    """x as [..., groups, size]: groups of about `group` elements of a row, their size a multiple of `multiple`.

    A row is divided evenly, so that a row length without small divisors costs little padding (zeros).
    """
    lead, row = _rows(x.shape)
    count, size = _sizes(row, group, multiple)
    x = x.reshape(*lead, row)
    if not _fits(row, count, size, multiple):
        x = pad(x, (0, count * size - row))
    return x.reshape(*lead, count, size)


def ungrouped(groups: Tensor, shape: Sequence[int], group: int, multiple: int = 1) -> Tensor:
    """The inverse of `grouped`: [..., groups, size] as `shape`."""
    lead, row = _rows(shape)
    count, size = _sizes(row, group, multiple)
    rows = groups.reshape(*lead, count * size)
    if not _fits(row, count, size, multiple):
        rows = rows[..., :row]
    return rows.reshape(tuple(shape)).contiguous()


def pack(codes: Tensor, bits: int) -> Tensor:
    """Whole numbers below 2**bits, float [..., size], as uint8 [..., size * bits / 8].

    Sums of float are exact here, and vectorise where shifts of bytes do not.
    """
    per = 8 // bits
    if per == 1:
        return codes.to(torch.uint8)
    lanes = codes.unflatten(-1, (per, codes.shape[-1] // per))
    # powers of two from their exponent bits: one term of a sum instead of one expression a lane
    powers = _lanes(127 << 23, bits << 23, per, codes.device).view(torch.float32)
    return (lanes * powers).sum(-2).to(torch.uint8)


def unpack(packed: Tensor, bits: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The inverse of `pack`.

    Pointwise in the result's place: generated code inlines it into whatever reads the tensor. (A concatenation of
    lanes would be a kernel a lane, into a buffer of full size.)
    """
    per = 8 // bits
    if per == 1:
        return packed.to(dtype)
    values = packed.to(torch.int32).unsqueeze(-2)
    # `>>` has no symbolic sizes (torch 2.13)
    values = values.bitwise_right_shift(_lanes(0, bits, per, packed.device))
    return (values & ((1 << bits) - 1)).to(dtype).flatten(-2)


def _lanes(start: int, step: int, per: int, device: torch.device) -> Tensor:
    """A number for each code of a byte, from `start` in steps, int32 [per, 1]."""
    return torch.arange(start, start + per * step, step, dtype=torch.int32, device=device).unsqueeze(-1)


def _rows(shape: Sequence[int]) -> tuple[list[int], int]:
    """The leading dimensions, and the length of what is cut into groups."""
    if len(shape) < 2:
        return [], shape[0] if shape else 1
    if all(isinstance(size, int) for size in shape[1:]):
        return [shape[0]], math.prod(shape[1:])
    return list(shape[:-1]), shape[-1]


def _sizes(row: int, group: int, multiple: int) -> tuple[int, int]:
    """How many groups a row has, and how many elements a group. A row of unknown length is one group."""
    count = max(1, round(row / group)) if isinstance(row, int) else 1
    size = -(-row // count)
    size = -(-size // multiple) * multiple if multiple > 1 else size
    return count, size if not isinstance(size, int) else max(size, multiple)


def _fits(row: int, count: int, size: int, multiple: int) -> bool:
    """Whether a row needs no padding; asked without a guard on an unknown length."""
    if isinstance(row, int):
        return row == count * size
    return multiple == 1
