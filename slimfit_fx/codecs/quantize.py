"""Integers: groups with a scale of their own, and the fixed-point formats of the SlimFit paper."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slimfit_fx.errors import ConfigError

from .codec import Codec, rounding_bound
from .layout import RUN, Layout, as_rows, check_group, flat, row_of
from .planes import check_bits, layout_of, pack, planes_of, unpack
from .step import STEP_ROUNDING, finite, smallest, step_of, stored, wide


@dataclass(frozen=True)
class Quantize(Codec):
    """Each group of neighbours as whole multiples of a step of its own.

    NaN or infinity in a group makes the whole group NaN when decoded, and no other group.

    Example:
        >>> Quantize(4, group=64).nbytes((2, 64), torch.float32)  # two groups of 32 bytes and a bfloat16 step each
        68

    Attributes:
        bits: of an element: 8, 6, 5, 4 or 2.
        group: about how many elements share a step, a bfloat16; rows of the tensor (its last dimension) are divided
            evenly.
        symmetric: steps count from zero, which then is stored exactly; otherwise from the group's smallest element,
            which takes one more float32 a group and serves one-sided values.
        stochastic: round up with the probability of the remainder, so that the mean error is zero; the error of one
            element may be a whole step instead of half a step.
        seed: of stochastic rounding. The noise is a hash of the value's bits, its place and the seed: the same in
            every mode and on every device, without touching torch's random state.
    """

    bits: int = 8
    group: int = 128
    symmetric: bool = True
    stochastic: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_bits("Quantize", self.bits)
        check_group("Quantize", self.group)

    @property
    def label(self) -> str:
        kind = "" if self.symmetric else ", asymmetric"
        return f"int{self.bits}, group {self.group}{kind}{', stochastic' if self.stochastic else ''}"

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        layout = self._layout(x.shape)
        values = layout.split(as_rows(wide(x)))
        if self.symmetric:
            step = step_of(values.abs().amax(-1, keepdim=True), self._levels, x.dtype)
            return *self._packed(layout, self._round(values / step, values)), stored(step)
        # halves, so that the difference of two huge numbers stays finite
        half = values * 0.5
        low = half.amin(-1, keepdim=True)
        step = step_of(half.amax(-1, keepdim=True) - low, self._levels, x.dtype)
        return *self._packed(layout, self._round((half - low) / step, values)), stored(step), low

    def decode(self, parts: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        planes = planes_of(self.bits)
        codes, (step, *low) = parts[:planes], parts[planes:]
        layout, step = self._layout(shape), wide(step)
        values = self._unpacked(layout, codes, step.dtype) * layout.spread(step)
        values = finite(values + layout.spread(low[0]), dtype, 0.5) * 2.0 if low else finite(values, dtype)
        return layout.join(values).reshape(tuple(shape)).to(dtype).contiguous()

    def error_bound(self, x: Tensor) -> Tensor:
        layout = self._layout(x.shape)
        values = layout.split(as_rows(wide(x))).double()
        extent = values.abs().amax(-1, keepdim=True)
        if not self.symmetric:
            extent = values.amax(-1, keepdim=True) - values.amin(-1, keepdim=True)
        shortest = smallest(x.dtype) * (1 if self.symmetric else 2)  # of halves, if asymmetric
        step = (extent / self._levels).clamp(min=shortest).expand_as(values) * (1 + STEP_ROUNDING)
        steps = step if self.stochastic else step / 2
        # the distance to a far offset is rounded as the offset is
        rounded = rounding_bound(values.abs().amax(-1, keepdim=True).to(x.dtype)).expand_as(values)
        return layout.join(layout.elements(steps * (1 + 1e-4) + 2 * rounded)).reshape(x.shape)

    @property
    def _levels(self) -> int:
        """How many steps there are from zero (from the smallest element, if asymmetric) to the largest element."""
        return 2 ** (self.bits - 1) - 1 if self.symmetric else 2**self.bits - 1

    @property
    def _signed(self) -> bool:
        """Whether steps are stored as int8; otherwise they are counted from 0 and packed."""
        return self.symmetric and self.bits == 8

    def _layout(self, shape: Sequence[int]) -> Layout:
        return layout_of(row_of(shape), self.group, self.bits)

    def _round(self, steps: Tensor, values: Tensor) -> Tensor:
        """Whole steps; the largest element is `_levels` of them away, up to rounding errors."""
        if not self.stochastic:
            return steps.round()
        lowest = -self._levels if self.symmetric else 0
        return (steps + _noise(values, self.seed)).floor().clamp(lowest, self._levels)

    def _packed(self, layout: Layout, steps: Tensor) -> tuple[Tensor, ...]:
        """Whole steps as they are stored: int8, or counted from 0 and packed."""
        if self._signed:
            return (steps.to(torch.int8),)
        return pack(layout, steps + self._levels if self.symmetric else steps, self.bits)

    def _unpacked(self, layout: Layout, codes: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """The inverse of `_packed`."""
        if self._signed:
            return layout.elements(codes[0]).to(dtype)
        steps = unpack(layout, codes, self.bits, dtype)
        return steps - self._levels if self.symmetric else steps


@dataclass(frozen=True)
class FixedPoint(Codec):
    """Whole multiples of one step, from `low` upwards, for all elements (SlimFit, section 4; no scale is stored).

    Values outside of the range become its nearest end, infinities too; NaN becomes the number nearest to zero.

    Attributes:
        bits: of an element: 8, 6, 5, 4 or 2.
        step: between two numbers.
        low: the smallest number.
    """

    bits: int
    step: float
    low: float

    def __post_init__(self) -> None:
        check_bits("FixedPoint", self.bits)
        if not self.step > 0:
            raise ConfigError(f"FixedPoint: step must be positive, got {self.step!r}")

    @property
    def label(self) -> str:
        return f"fixed point, {self.bits} bits, step {self.step:g}"

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        rows = torch.nan_to_num(x.to(torch.float32), nan=0.0).reshape(flat(x.shape))
        layout = self._layout(x.shape)
        codes = ((layout.split(as_rows(rows)) - self.low) * (1.0 / self.step)).round().clamp(0, 2**self.bits - 1)
        return pack(layout, codes, self.bits)

    def decode(self, parts: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        layout = self._layout(shape)
        values = unpack(layout, parts, self.bits) * self.step + self.low
        return layout.join(values).reshape(tuple(shape)).to(dtype).contiguous()

    def error_bound(self, x: Tensor) -> Tensor:
        values = x.double()
        high = self.low + self.step * (2**self.bits - 1)
        outside = (values - high).clamp(min=0) + (self.low - values).clamp(min=0)
        return outside + self.step * (0.5 + 1e-4) + rounding_bound(x)

    def _layout(self, shape: Sequence[int]) -> Layout:
        return layout_of(row_of(flat(shape)), RUN, self.bits)


def _noise(values: Tensor, seed: int) -> Tensor:
    """Numbers in [0, 1) from a hash (C. Wellons' `lowbias32`) of value, place and seed."""
    place = torch.arange(values.numel(), device=values.device, dtype=torch.int32).reshape(values.shape)
    # xor first: code generators would take a product for an index, which must not overflow
    place = (place ^ (seed * 668265263 % 2**31)) * -1640531527
    bits = values.to(torch.float32).view(torch.int32) ^ place
    for shift, factor in ((16, 2146121005), (15, -2073254261)):
        bits = (bits ^ _shifted(bits, shift)) * factor
    bits = bits ^ _shifted(bits, 16)
    return (bits & 0xFFFFFF).to(values.dtype) * 2.0**-24


def _shifted(bits: Tensor, by: int) -> Tensor:
    """A logical right shift of int32."""
    return (bits >> by) & (2 ** (32 - by) - 1)
