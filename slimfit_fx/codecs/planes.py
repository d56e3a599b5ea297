"""Codes of a width that does not divide a byte, as planes of widths that do: six bits are four and two.

Each plane is packed by itself. An element is read with one load a plane, a shift and a sum, and no code reaches over
the end of a byte: three bytes for four codes would be one part instead of two, but take four loads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from slimfit_fx.errors import ConfigError

from .layout import Layout

# The lowest bits of a code first.
_WIDTHS = {8: (8,), 6: (4, 2), 5: (4, 1), 4: (4,), 2: (2,)}


def check_bits(codec: str, bits: int) -> None:
    """Raises `ConfigError` if there are no codes of so many bits."""
    if isinstance(bits, bool) or not isinstance(bits, int) or bits not in _WIDTHS:
        *most, last = _WIDTHS
        raise ConfigError(f"{codec}: bits is {', '.join(map(str, most))} or {last}, got {bits!r}")


def planes_of(bits: int) -> int:
    """How many parts codes of so many bits are."""
    return len(_WIDTHS[bits])


def layout_of(row: int, group: int, bits: int) -> Layout:
    """Groups of about `group` elements whose planes are whole bytes."""
    return Layout.of(row, group, per=8 // _WIDTHS[bits][0], multiple=8 // min(_WIDTHS[bits]))


def pack(layout: Layout, codes: Tensor, bits: int) -> tuple[Tensor, ...]:
    """Whole numbers from 0 to 2 ** bits - 1, float [..., count, size], as uint8 [..., count, size * width / 8] for each
    plane."""
    parts = []
    *lower, highest = _WIDTHS[bits]
    for width in lower:
        rest = (codes * 2.0**-width).floor()
        parts.append(_plane(layout, width).pack(codes - rest * 2.0**width))
        codes = rest
    return *parts, _plane(layout, highest).pack(codes)


def unpack(layout: Layout, parts: Sequence[Tensor], bits: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The elements of what `pack` packed; see `Layout.elements`."""
    (width, *higher), (part, *others) = _WIDTHS[bits], parts
    codes = _plane(layout, width).unpack(part, dtype)
    for next_width, part in zip(higher, others, strict=True):
        codes = codes + _plane(layout, next_width).unpack(part, dtype) * 2.0**width
        width += next_width
    return codes


def _plane(layout: Layout, width: int) -> Layout:
    """`layout` for codes of `width` bits."""
    return replace(layout, per=8 // width)
