"""A candidate for bf16 tensors: few bits for most of a group, and its largest elements kept apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slimfit_fx.codecs import Codec
from slimfit_fx.codecs.layout import Layout, as_rows, quotient, row_of
from slimfit_fx.codecs.planes import layout_of, pack, planes_of, unpack
from slimfit_fx.codecs.step import finite, step_of, stored, wide


@dataclass(frozen=True)
class Outliers(Codec):
    """Each group as whole multiples of a step that its `kept` largest magnitudes do not count in; these are stored as
    a bfloat16 and a place in the group, a byte. Decoding compares places: it is pointwise, without a scatter.
    """

    bits: int = 4
    group: int = 64
    kept: int = 1

    @property
    def label(self) -> str:
        return f"int{self.bits}, group {self.group}, {self.kept} kept"

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        layout = self._layout(x.shape)
        values = layout.split(as_rows(wide(x)))
        rest, position, outliers = values.abs(), torch.arange(layout.size, device=x.device), []
        for _ in range(self.kept):
            place = rest.argmax(-1, keepdim=True)
            outliers += [values.gather(-1, place).to(torch.bfloat16), place.to(torch.uint8)]
            rest = torch.where(position == place, 0.0, rest)
        step = step_of(rest.amax(-1, keepdim=True), self._levels, x.dtype)
        codes = (values / step).round().clamp(-self._levels, self._levels) + self._levels
        return *pack(layout, codes, self.bits), stored(step), *outliers

    def decode(self, parts: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        planes = planes_of(self.bits)
        codes, (step, *outliers) = parts[:planes], parts[planes:]
        layout = self._layout(shape)
        values = (unpack(layout, codes, self.bits) - self._levels) * layout.spread(wide(step))
        if layout.even:
            position = torch.arange(layout.size, device=step.device)
        else:
            _, position = quotient(layout.places(step.device), layout.size)
        for value, place in zip(outliers[::2], outliers[1::2], strict=True):
            values = torch.where(position == layout.spread(place), layout.spread(wide(value)), values)
        return layout.join(finite(values, dtype)).reshape(tuple(shape)).to(dtype).contiguous()

    @property
    def _levels(self) -> int:
        return 2 ** (self.bits - 1) - 1

    def _layout(self, shape: Sequence[int]) -> Layout:
        return layout_of(row_of(shape), self.group, self.bits)
