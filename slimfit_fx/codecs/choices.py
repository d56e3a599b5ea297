"""Codecs that choose by the graph: store nothing, something else, or one or the other as the gates are."""

from __future__ import annotations

from dataclasses import dataclass

from .codec import Codec
from .prune import TopK
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


@dataclass(frozen=True)
class WhenFrozen(Codec):
    """Another codec while the norm that reads the tensor is frozen; while it trains the tensor is stored as it is, too.

    Attributes:
        codec: for frozen steps, and where no gated norm reads the tensor; None stores it as it is.
    """

    codec: Codec | None = TopK(0.1)  # noqa: RUF009  (frozen)

    @property
    def label(self) -> str:
        return f"{self.codec.label} when frozen" if self.codec else "as it is"
