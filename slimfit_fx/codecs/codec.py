"""What every codec is: a pair of functions in plain torch operators, traced into the graphs and fused with them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .format import Format
from .step import smallest


@dataclass(frozen=True)
class Codec(Format):
    """Stores a saved tensor in fewer bytes.

    Subclasses are frozen dataclasses with `encode` and `decode`. These use plain torch operators without
    data-dependent control flow, so that one trace serves every step, and the sizes of what `encode` returns depend on
    nothing but the input's shape and dtype.
    """

    def accepts(self, dtype: torch.dtype) -> bool:
        """Whether tensors of this dtype can be encoded."""
        return dtype.is_floating_point and dtype.itemsize > 1

    @abstractmethod
    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """x of any shape to its parts, which are what is saved."""

    @abstractmethod
    def decode(self, parts: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The inverse of `encode` within `error_bound`: a contiguous tensor of the given shape and dtype."""

    def error_bound(self, x: Tensor) -> Tensor:
        """An upper bound of |decode(encode(x)) - x| for finite x: float64, for each element of x."""
        raise NotImplementedError(f"{type(self).__name__} states no error_bound; training does without")

    def nbytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        """Bytes of all parts of a tensor."""
        parts = self.encode(torch.empty(tuple(shape), dtype=dtype, device="meta"))
        return sum(part.numel() * part.element_size() for part in parts)


def rounding_bound(x: Tensor) -> Tensor:
    """What decoding in float32 and rounding to x's dtype may add to a codec's error: a few units in the last place."""
    return x.double().abs() * (torch.finfo(x.dtype).eps + 4 * torch.finfo(torch.float32).eps) + smallest(x.dtype)
