"""Boolean masks, eight elements a byte."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .codec import Codec
from .layout import RUN, grouped, pack, ungrouped, unpack


@dataclass(frozen=True)
class BitMask(Codec):
    """A bit for each element of a bool tensor, which torch saves as a byte. Lossless."""

    @property
    def label(self) -> str:
        return "bits"

    def accepts(self, dtype: torch.dtype) -> bool:
        return dtype is torch.bool

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        return (pack(grouped(x.to(torch.float32), RUN, 8), 1),)

    def decode(self, parts: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return ungrouped(unpack(parts[0], 1, dtype), shape, RUN, 8)

    def error_bound(self, x: Tensor) -> Tensor:
        return torch.zeros(x.shape, dtype=torch.float64)
