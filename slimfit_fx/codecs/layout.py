"""How the rows of a tensor are cut into groups, and groups of small codes into bytes.

A row is the last dimension; a group never reaches over its end, since rows (tokens) may differ in scale by orders of
magnitude. A row is divided evenly where its length has a divisor of a useful size (688 = 8 x 86). Otherwise its last
group is filled up with zeros. Those groups are decoded through computed places: dividing a loop variable by a number
that does not divide the loop's length is what code generators get wrong.

On a CPU several codes share a byte across the group, not side by side: byte j of a group holds elements j, j + s,
j + 2s, … where s is the number of bytes. Generated code then reads and writes runs of neighbours, which vector units
can, instead of shuffling bits between lanes. A GPU's code generator joins kernels that read elements in the order in
which others make them: there eight neighbours share a word, and packing is part of the kernel that computes the codes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from slimfit_fx.errors import ConfigError

# The group of codecs that need none but to share bytes: long runs for vector units.
RUN = 512
# What eight codes fill, by the bits of a code. A sum of fewer than eight is no reduction to Inductor, nor fused as one.
_TOGETHER = 8
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def check_group(codec: str, group: int) -> None:
    """Raises `ConfigError` if `group` is no size of a group."""
    if not isinstance(group, int) or group < 8:
        raise ConfigError(f"{codec}: group is a number of elements, at least 8, got {group!r}")


@dataclass(frozen=True)
class Layout:
    """A row of `row` elements as groups of equal size; a row whose length is known at run time is one group.

    Attributes:
        count: how many groups.
        multiple: of which their size is one.
        units: the multiples in a group.
        even: whether the groups are the row, without padding.
        per: codes that share a byte; divides `multiple`.
    """

    row: int
    count: int
    multiple: int
    units: int
    even: bool
    per: int = 1

    @classmethod
    def of(cls, row: int, group: int, per: int = 1, multiple: int = 0) -> Layout:
        """Groups of about `group` elements, their size a multiple of `multiple`, by default of `per`."""
        multiple = multiple or per
        if not isinstance(row, int):
            if multiple == 1:
                return cls(row, 1, 1, row, True, per)
            # always some padding, and never one unit alone: both would be guards on the length
            return cls(row, 1, multiple, (row + multiple - 1) // multiple + 1, False, per)
        size = _even_size(row, group, multiple)
        if size is not None:
            return cls(row, row // size, multiple, size // multiple, True, per)
        count = max(1, round(row / group))
        return cls(row, count, multiple, max(1, -(-row // (count * multiple))), False, per)

    @property
    def size(self) -> int:
        """Elements of a group."""
        return self.multiple * self.units

    def part(self, divisor: int) -> int:
        """size / divisor, for a divisor of `multiple`: a product, which is not rounded where the size is a symbol."""
        return self.multiple // divisor * self.units

    def split(self, rows: Tensor) -> Tensor:
        """rows [..., row] as groups [..., count, size], padded with zeros."""
        if not self.even:
            rows = pad(rows, (0, self.count * self.size - self.row))
        return rows.reshape(*rows.shape[:-1], self.count, self.size)

    def elements(self, groups: Tensor) -> Tensor:
        """groups [..., count, size] without the padding: [..., row], or as they are if there is none; see `join`."""
        if self.even:
            return groups
        groups = groups.flatten(-2)
        return groups[..., : self.row] if isinstance(self.row, int) else taken(groups, self.places(groups.device))

    def spread(self, numbers: Tensor) -> Tensor:
        """A number for each group, [..., count, 1], to go with `elements`."""
        if self.even:
            return numbers
        group, _ = quotient(self.places(numbers.device), self.size)
        return taken(numbers.squeeze(-1), group)

    def join(self, elements: Tensor) -> Tensor:
        """What was computed from `elements` as rows [..., row]."""
        return elements.reshape(*elements.shape[:-2], self.row) if self.even else elements

    def pack(self, codes: Tensor) -> Tensor:
        """Whole numbers from 0 that `per` of them fit into a byte, float [..., count, size], as uint8
        [..., count, size / per]; as words of eight codes on a GPU, [..., count, size / 8].

        Sums of float are exact here, and vectorise where shifts of bytes do not.
        """
        if self.per == 1:
            return codes.to(torch.uint8)
        if self._joins_neighbours(codes.device):
            shifted = codes.unflatten(-1, (-1, _TOGETHER)).to(torch.int32) << self._shifts(codes.device)
            return shifted.sum(-1, dtype=torch.int32).to(_WORDS[8 // self.per])
        lanes = codes.unflatten(-1, (self.per, self.part(self.per)))
        # powers of two from their exponent bits: one term of a sum instead of one expression a lane
        powers = self._lanes(127 << 23, 8 // self.per << 23, codes.device).view(torch.float32)
        return (lanes * powers).sum(-2).to(torch.uint8)

    def unpack(self, packed: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The `elements` of what `pack` packed.

        Pointwise in the result's place: generated code inlines it into whatever reads the tensor. (A concatenation of
        lanes would be a kernel a lane, into a buffer of full size.)
        """
        if self.per == 1:
            return self.elements(packed).to(dtype)
        bits, run = 8 // self.per, self.part(self.per)
        if self._joins_neighbours(packed.device):
            shifted = packed.to(torch.int32).unsqueeze(-1) >> self._shifts(packed.device)
            return (shifted & ((1 << bits) - 1)).to(dtype).flatten(-2)
        if self.even:
            # `>>` has no symbolic sizes (torch 2.13)
            shifted = packed.to(torch.int32).unsqueeze(-2).bitwise_right_shift(self._lanes(0, bits, packed.device))
            return (shifted & ((1 << bits) - 1)).to(dtype).flatten(-2)
        group, place = quotient(self.places(packed.device), self.size)
        lane, byte = quotient(place, run)
        codes = taken(packed.flatten(-2), group * run + byte).to(torch.int32)
        shifted = codes.bitwise_right_shift((lane * bits).to(torch.int32))
        return (shifted & ((1 << bits) - 1)).to(dtype)

    def places(self, device: torch.device) -> Tensor:
        """0, 1, … of the elements of a row, int64 [row]."""
        return torch.arange(self.row, device=device)

    def _joins_neighbours(self, device: torch.device) -> bool:
        """Whether eight neighbours share a word. Groups are the same on every device: one that is no multiple of eight
        is packed across its bytes."""
        return joins_neighbours(device) and self.even and isinstance(self.size, int) and self.size % _TOGETHER == 0

    def _shifts(self, device: torch.device) -> Tensor:
        """By how many bits each of a word's codes is shifted, int32 [8]."""
        bits = 8 // self.per
        return torch.arange(0, _TOGETHER * bits, bits, dtype=torch.int32, device=device)

    def _lanes(self, start: int, step: int, device: torch.device) -> Tensor:
        """A number for each code of a byte, from `start` in steps, int32 [per, 1]."""
        return torch.arange(start, start + self.per * step, step, dtype=torch.int32, device=device).unsqueeze(-1)


def joins_neighbours(device: torch.device) -> bool:
    """Whether codes are packed as a GPU's generated code needs them."""
    return device.type != "cpu"


def taken(x: Tensor, places: Tensor) -> Tensor:
    """x [..., n] at `places` [m] of its last dimension, [..., m]; they are in range by construction."""
    return torch.ops.aten._unsafe_index.Tensor(x, [*[None] * (x.dim() - 1), places])


def quotient(places: Tensor, divisor: int) -> tuple[Tensor, Tensor]:
    """(places // divisor, places % divisor) of int64 places from 0 to places.numel() - 1.

    By a product and a shift: code generators would read a division as one of the loop's variable. The factor stays
    small where the number of places is known, as generated code adds up 16 of them in int32.
    """
    count = places.shape[0]
    shift = (count * divisor).bit_length() if isinstance(count, int) and isinstance(divisor, int) else 40
    quotients = (places * (2**shift // divisor + 1)) >> shift
    return quotients, places - quotients * divisor


def row_of(shape: Sequence[int]) -> int:
    """The length of the rows that are cut into groups: the last dimension's; a scalar is a row of one."""
    return shape[-1] if len(shape) else 1


def as_rows(x: Tensor) -> Tensor:
    """x as [..., row]."""
    return x if x.dim() else x.reshape(1)


def flat(shape: Sequence[int]) -> list[int]:
    """`shape` with its last dimensions of known size in one: for codes without a scale, which may mix tokens."""
    known = 0
    while known < len(shape) and isinstance(shape[-1 - known], int):
        known += 1
    end = len(shape) - known
    return [*shape[:end], math.prod(shape[end:])] if known else list(shape)


def _even_size(row: int, group: int, multiple: int) -> int | None:
    """The divisor of `row` nearest to `group` of those from a quarter to twice of it; rather a smaller one."""
    if 0 < row <= group and row % multiple == 0:
        return row
    sizes = [size for size in range(multiple, 2 * group + 1, multiple) if row and row % size == 0]
    smaller = [size for size in sizes if size <= group <= 4 * size]
    larger = [size for size in sizes if size > group]
    return smaller[-1] if smaller else larger[0] if larger else None
