"""What every codec is: a pair of functions in plain torch operators, traced into the graphs and fused with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from slimfit_fx.errors import choose

from .step import smallest


@dataclass(frozen=True)
class Codec:
    """Stores a saved tensor in fewer bytes.

    Subclasses are frozen dataclasses: they print, compare and hash by their options. `encode` and `decode` use plain
    torch operators without data-dependent control flow, so that one trace serves every step, and the sizes of what
    `encode` returns depend on nothing but the input's shape and dtype.
    """

    @property
    def label(self) -> str:
        """A few words for tables."""
        return repr(self)

    def accepts(self, dtype: torch.dtype) -> bool:
        """Whether tensors of this dtype can be encoded."""
        return dtype.is_floating_point and dtype.itemsize > 1

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """x of any shape to its parts, which are what is saved."""
        raise NotImplementedError

    def decode(self, parts: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The inverse of `encode` within `error_bound`: a contiguous tensor of the given shape and dtype."""
        raise NotImplementedError

    def error_bound(self, x: Tensor) -> Tensor:
        """An upper bound of |decode(encode(x)) - x| for finite x: float64, for each element of x."""
        raise NotImplementedError

    def nbytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        """Bytes of all parts of a tensor."""
        parts = self.encode(torch.empty(tuple(shape), dtype=dtype, device="meta"))
        return sum(part.numel() * part.element_size() for part in parts)

    def to_dict(self) -> dict[str, Any]:
        """The class's name and the options, in what JSON knows."""
        options = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            "codec": type(self).__name__,
            **{name: value.to_dict() if isinstance(value, Codec) else value for name, value in options.items()},
        }

    @staticmethod
    def from_dict(options: Mapping[str, Any]) -> Codec:
        """The inverse of `to_dict`. Raises `ConfigError` if there is no such codec or option."""
        known = {kind.__name__: kind for kind in Codec.__subclasses__()}
        kind = known[choose("codec", options.get("codec"), known)]
        names = [field.name for field in fields(kind)]
        values = {
            choose(f"option of {kind.__name__}", name, names): Codec.from_dict(value)
            if isinstance(value, Mapping)
            else value
            for name, value in options.items()
            if name != "codec"
        }
        return kind(**values)


def rounding_bound(x: Tensor) -> Tensor:
    """What decoding in float32 and rounding to x's dtype may add to a codec's error: a few units in the last place."""
    return x.double().abs() * (torch.finfo(x.dtype).eps + 4 * torch.finfo(torch.float32).eps) + smallest(x.dtype)

