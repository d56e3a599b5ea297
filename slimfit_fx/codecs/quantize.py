"""Integers: groups with a scale of their own, and the fixed-point formats of the SlimFit paper."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slimfit_fx.errors import ConfigError

from .codec import Codec, rounding_bound, smallest
from .layout import RUN, check_group, grouped, pack, ungrouped, unpack


@dataclass(frozen=True)
class Quantize(Codec):
    """Each group of neighbours as whole multiples of a step of its own.

    NaN or infinity in a group makes the whole group NaN when decoded, and no other group.

    Example:
        >>> Quantize(4, group=64).nbytes((2, 64), torch.float32)  # two groups of 32 bytes and a float32 step each
        72

    Attributes:
        bits: of an element: 8, 4 or 2.
        group: about how many elements share a step; rows of the tensor are divided evenly.
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
        if self.bits not in (8, 4, 2):
            raise ConfigError(f"Quantize: bits is 8, 4 or 2, got {self.bits!r}")
        check_group("Quantize", self.group)

    @property
    def label(self) -> str:
        kind = "" if self.symmetric else ", asymmetric"
        return f"int{self.bits}, group {self.group}{kind}{', stochastic' if self.stochastic else ''}"

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        values = self._grouped(x)
        if self.symmetric:
            step = self._step(values.abs().amax(-1, keepdim=True), x.dtype)
            return self._round(values / step, values), step
        # halves, so that the difference of two huge numbers stays finite
        half = values * 0.5
        low = half.amin(-1, keepdim=True)
        step = self._step(half.amax(-1, keepdim=True) - low, x.dtype)
        return self._round((half - low) / step, values), step, low

    def decode(self, parts: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        codes, step, *low = parts
        values = self._unpacked(codes, step.dtype) * step
        if low:
            values = (values + low[0]) * 2.0
        return ungrouped(values, shape, self.group, self._multiple).to(dtype)

    def error_bound(self, x: Tensor) -> Tensor:
        values = self._grouped(x).double()
        extent = values.abs().amax(-1, keepdim=True)
        if not self.symmetric:
            extent = values.amax(-1, keepdim=True) - values.amin(-1, keepdim=True)
        steps = (extent / self._levels).expand_as(values) * (1.0 if self.stochastic else 0.5)
        # the distance to a far offset is rounded as the offset is
        rounded = rounding_bound(values.abs().amax(-1, keepdim=True).to(x.dtype)).expand_as(values)
        return ungrouped(steps * (1 + 1e-4) + 2 * rounded, x.shape, self.group, self._multiple)

    @property
    def _levels(self) -> int:
        """How many steps there are from zero (from the smallest element, if asymmetric) to the largest element."""
        return 2 ** (self.bits - 1) - 1 if self.symmetric else 2**self.bits - 1

    @property
    def _signed(self) -> bool:
        """Whether steps are stored as int8; otherwise they are counted from 0 and packed."""
        return self.symmetric and self.bits == 8

    @property
    def _multiple(self) -> int:
        return 8 // self.bits

    def _grouped(self, x: Tensor) -> Tensor:
        return grouped(x.to(torch.promote_types(x.dtype, torch.float32)), self.group, self._multiple)

    def _step(self, extent: Tensor, dtype: torch.dtype) -> Tensor:
        step = (extent * (1.0 / self._levels)).clamp(min=smallest(dtype))
        return step + step * 0.0  # NaN if it is infinite: zeros of the group would otherwise survive alone

    def _round(self, steps: Tensor, values: Tensor) -> Tensor:
        if self.stochastic:
            lowest = -self._levels if self.symmetric else 0
            steps = (steps + _noise(values, self.seed)).floor().clamp(lowest, self._levels)
        else:
            steps = steps.round()  # the largest element is `_levels` steps away, up to rounding errors
        return self._packed(steps)

    def _packed(self, steps: Tensor) -> Tensor:
        """Whole steps as they are stored: int8, or counted from 0 and packed."""
        if self._signed:
            return steps.to(torch.int8)
        return pack(steps + self._levels if self.symmetric else steps, self.bits)

    def _unpacked(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """The inverse of `_packed`."""
        if self._signed:
            return codes.to(dtype)
        steps = unpack(codes, self.bits, dtype)
        return steps - self._levels if self.symmetric else steps


@dataclass(frozen=True)
class FixedPoint(Codec):
    """Whole multiples of one step, from `low` upwards, for all elements (SlimFit, section 4; no scale is stored).

    Values outside of the range become its nearest end, infinities too; NaN becomes the number nearest to zero.

    Attributes:
        bits: of an element: 8, 4 or 2.
        step: between two numbers.
        low: the smallest number.
    """

    bits: int
    step: float
    low: float

    def __post_init__(self) -> None:
        if self.bits not in (8, 4, 2):
            raise ConfigError(f"FixedPoint: bits is 8, 4 or 2, got {self.bits!r}")
        if not self.step > 0:
            raise ConfigError(f"FixedPoint: step must be positive, got {self.step!r}")

    @property
    def label(self) -> str:
        return f"fixed point, {self.bits} bits, step {self.step:g}"

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        values = grouped(torch.nan_to_num(x.to(torch.float32), nan=0.0), RUN, 8 // self.bits)
        codes = ((values - self.low) * (1.0 / self.step)).round().clamp(0, 2**self.bits - 1)
        return (pack(codes, self.bits),)

    def decode(self, parts: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        values = unpack(parts[0], self.bits) * self.step + self.low
        return ungrouped(values, shape, RUN, 8 // self.bits).to(dtype)

    def error_bound(self, x: Tensor) -> Tensor:
        values = x.double()
        high = self.low + self.step * (2**self.bits - 1)
        outside = (values - high).clamp(min=0) + (self.low - values).clamp(min=0)
        return outside + self.step * (0.5 + 1e-4) + rounding_bound(x)


def _noise(values: Tensor, seed: int) -> Tensor:
    """Numbers in [0, 1) from a hash (C. Wellons' `lowbias32`) of value, place and seed."""
    place = torch.arange(values.numel(), device=values.device, dtype=torch.int32).reshape(values.shape)
    bits = values.to(torch.float32).view(torch.int32) ^ (place * -1640531527) ^ (seed * 668265263 % 2**31)
    for shift, factor in ((16, 2146121005), (15, -2073254261)):
        bits = (bits ^ _shifted(bits, shift)) * factor
    bits = bits ^ _shifted(bits, 16)
    return (bits & 0xFFFFFF).to(values.dtype) * 2.0**-24


def _shifted(bits: Tensor, by: int) -> Tensor:
    """A logical right shift of int32."""
    return (bits >> by) & (2 ** (32 - by) - 1)
