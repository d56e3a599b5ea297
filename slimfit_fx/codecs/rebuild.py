"""Codecs that store something else than the tensor: what the graph lets it be rebuilt from."""

from __future__ import annotations

from dataclasses import dataclass

from .codec import Codec
from .quantize import Quantize


@dataclass(frozen=True)
class Recompute(Codec):
    """Nothing is stored: the backward computes the tensor again from other saved tensors, matrix products included.

    Attributes:
        otherwise: the codec where the other saved tensors do not suffice; None saves the tensor as it is.
    """

    otherwise: Codec | None = Quantize(8)  # noqa: RUF009  (frozen)

    @property
    def label(self) -> str:
        return "recomputed"


@dataclass(frozen=True)
class Derivative(Codec):
    """An activation function's derivative instead of its input: fewer bits do, as it varies little
    (Approximate Backpropagation, Yang et al., ICML 2024).

    Attributes:
        codec: for the derivative; None saves it as it is.
        otherwise: for the input, where the backward reads it for anything else than the derivative too.
    """

    codec: Codec | None = Quantize(4)  # noqa: RUF009  (frozen)
    otherwise: Codec | None = Quantize(8)  # noqa: RUF009  (frozen)

    @property
    def label(self) -> str:
        return f"derivative, {self.codec.label}" if self.codec else "derivative"
