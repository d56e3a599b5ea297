"""Pruning: the largest magnitudes survive exactly, the rest becomes zero."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from slimfit_fx.errors import ConfigError

from .codec import Codec
from .layout import Layout, as_rows, quotient, row_of, taken


@dataclass(frozen=True)
class TopK(Codec):
    """The largest magnitudes of the whole tensor with int32 indices (SlimFit, section 4: 10% of a frozen LayerNorm).

    Needs a selection over all elements, a kernel of its own. NaN and infinities count as the largest.

    Attributes:
        ratio: the part of the elements that is kept, 0 < ratio <= 1; at least one element.
    """

    ratio: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise ConfigError(f"TopK: ratio is the part that is kept, 0 < ratio <= 1, got {self.ratio!r}")

    @property
    def label(self) -> str:
        return f"largest {self.ratio:.0%}"

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        flat = x.reshape(-1)
        indices = flat.abs().topk(self._kept(flat.shape[0]), sorted=False).indices
        # the number of rows may be known at run time only: a part without elements carries it
        rows = x.new_empty((x.shape[0] if x.dim() else 1, 0))
        return flat.gather(0, indices), indices.to(torch.int32), rows

    def decode(self, parts: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        values, indices, _ = parts
        zeros = values.new_zeros(tuple(shape)).reshape(-1)
        return zeros.scatter(0, indices.to(torch.int64), values).reshape(tuple(shape)).to(dtype).contiguous()

    def error_bound(self, x: Tensor) -> Tensor:
        if not x.numel():
            return x.double()
        flat = x.double().reshape(-1).abs()
        threshold = flat.topk(self._kept(flat.numel())).values[-1]
        return torch.where(flat > threshold, 0.0, flat).reshape(x.shape)

    def _kept(self, count: int) -> int:
        share = Fraction(self.ratio).limit_denominator(10_000)
        return (count * share.numerator + share.denominator - 1) // share.denominator


@dataclass(frozen=True)
class TopOfBlock(Codec):
    """The largest magnitude of every small block and its place, two places a byte: 1:M sparsity without a sort.

    A block's elements lie apart in its group, so that the search runs over whole vectors. NaN and infinities count
    as the largest of their block.

    Attributes:
        block: elements of a block, 2 to 16.
    """

    block: int = 8

    def __post_init__(self) -> None:
        if not isinstance(self.block, int) or not 2 <= self.block <= 16:
            raise ConfigError(f"TopOfBlock: block is 2 to 16 elements, got {self.block!r}")

    @property
    def label(self) -> str:
        return f"largest of {self.block}"

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        members = self._blocks(x)
        value = members.select(-2, 0)
        place = torch.zeros_like(value, dtype=torch.float32)
        for index in range(1, self.block):
            other = members.select(-2, index)
            larger = ~(other.abs() <= value.abs()) & ~value.isnan()
            value = torch.where(larger, other, value)
            place = torch.where(larger, float(index), place)
        return value, self._places(x.shape).pack(place)

    def decode(self, parts: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        value, packed = parts
        layout, kept = self._layout(shape), self._places(shape).unpack(packed)
        if layout.even:
            members = [torch.where(kept == float(index), value, 0.0) for index in range(self.block)]
            rows = layout.join(torch.stack(members, dim=-2).flatten(-2))
        else:
            blocks = layout.part(self.block)
            group, place = quotient(layout.places(value.device), layout.size)
            member, block = quotient(place, blocks)
            block = group * blocks + block
            rows = torch.where(taken(kept.flatten(-2), block) == member, taken(value.flatten(-2), block), 0.0)
        return rows.reshape(tuple(shape)).to(dtype).contiguous()

    def error_bound(self, x: Tensor) -> Tensor:
        magnitudes, layout = self._blocks(x).double().abs(), self._layout(x.shape)
        kept = magnitudes.argmax(-2, keepdim=True)  # the first of equal ones, as in `encode`
        return layout.join(layout.elements(magnitudes.scatter(-2, kept, 0.0).flatten(-2))).reshape(x.shape)

    def _layout(self, shape: Sequence[int]) -> Layout:
        return Layout.of(row_of(shape), 64 * self.block, multiple=2 * self.block)

    def _places(self, shape: Sequence[int]) -> Layout:
        """Of the places in the blocks, two a byte."""
        layout = self._layout(shape)
        return Layout(layout.count * layout.part(self.block), layout.count, 2, layout.units, True, per=2)

    def _blocks(self, x: Tensor) -> Tensor:
        """x as [..., groups, block, blocks of the group]."""
        layout = self._layout(x.shape)
        return layout.split(as_rows(x)).unflatten(-1, (self.block, layout.part(self.block)))
