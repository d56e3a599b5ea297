"""Boolean masks, eight elements a byte."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .codec import Codec
from .layout import RUN, Layout, as_rows, flat, row_of


@dataclass(frozen=True)
class BitMask(Codec):
    """A bit for each element of a bool tensor, which torch saves as a byte. Lossless."""

    @property
    def label(self) -> str:
        return "bits"

    def accepts(self, dtype: torch.dtype) -> bool:
        return dtype is torch.bool

    @property
    def lossless(self) -> bool:
        return True

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        layout = self._layout(x.shape)
        return (layout.pack(layout.split(as_rows(x.to(torch.float32).reshape(flat(x.shape))))),)

    def decode(self, parts: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        layout = self._layout(shape)
        return layout.join(layout.unpack(parts[0], dtype)).reshape(tuple(shape)).contiguous()

    def error_bound(self, x: Tensor) -> Tensor:
        return torch.zeros(x.shape, dtype=torch.float64)

    @staticmethod
    def _layout(shape: Sequence[int]) -> Layout:
        return Layout.of(row_of(flat(shape)), RUN, per=8)
