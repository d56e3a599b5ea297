"""Eight-bit floating point with a scale for each group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slimfit_fx.errors import choose

from .codec import Codec, rounding_bound
from .layout import Layout, as_rows, check_group, row_of
from .step import STEP_ROUNDING, finite, step_of, stored, wide

_FORMATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@dataclass(frozen=True)
class Float8(Codec):
    """Each group scaled so that its largest element is the format's largest number.

    Small elements of a group keep their relative precision (2**-4 for e4m3, 2**-3 for e5m2), which integers of eight
    bits lose. NaN or infinity in a group makes the whole group NaN when decoded, and no other group.

    Attributes:
        format: `"e4m3"` or `"e5m2"`.
        group: about how many elements share a scale.
    """

    format: str = "e4m3"
    group: int = 128

    def __post_init__(self) -> None:
        choose("Float8 format", self.format, _FORMATS)
        check_group("Float8", self.group)

    @property
    def label(self) -> str:
        return f"float8 {self.format}, group {self.group}"

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        values = self._layout(x.shape).split(as_rows(x.to(torch.float32)))
        scale = step_of(values.abs().amax(-1, keepdim=True), self._largest, x.dtype)
        scaled = (values / scale).clamp(-self._largest, self._largest)
        return scaled.to(_FORMATS[self.format]), stored(scale)

    def decode(self, parts: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        codes, scale = parts
        layout = self._layout(shape)
        values = layout.elements(codes).to(torch.float32) * layout.spread(wide(scale))
        return layout.join(finite(values, dtype)).reshape(tuple(shape)).to(dtype).contiguous()

    def error_bound(self, x: Tensor) -> Tensor:
        layout = self._layout(x.shape)
        values = layout.split(as_rows(x)).double()
        information = torch.finfo(_FORMATS[self.format])
        largest = values.abs().amax(-1, keepdim=True)
        scale = largest / self._largest * (1 + STEP_ROUNDING)
        error = values.abs() * information.eps / 2 + scale * information.smallest_normal * information.eps / 2
        rounded = rounding_bound(largest.to(x.dtype))
        return layout.join(layout.elements(error * (1 + 1e-4) + 2 * rounded)).reshape(x.shape)

    def _layout(self, shape: Sequence[int]) -> Layout:
        return Layout.of(row_of(shape), self.group)

    @property
    def _largest(self) -> float:
        return torch.finfo(_FORMATS[self.format]).max
