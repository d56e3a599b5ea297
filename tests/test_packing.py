"""On a GPU eight neighbours share a word, on a CPU codes share a byte across the group: the same numbers and bytes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from slimfit_fx.codecs import BitMask, Codec, FixedPoint, Quantize, TopOfBlock, layout

PACKED = [
    Quantize(4, 64),
    Quantize(4, 64, symmetric=False),
    Quantize(4, 64, stochastic=True),
    Quantize(2, 64),
    FixedPoint(4, 1.26 / 15, -0.13),
    FixedPoint(2, 0.75, -1.5),
    TopOfBlock(4),
    BitMask(),
]
# groups that are multiples of eight, and others: 100 in groups of 50 or 20, 197 filled up, rows shorter than a word
SHAPES = [(3, 64), (2, 3, 688), (4, 100), (2, 197), (5, 12), (3, 4), (2, 1), (16, 96), (8,), ()]


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(layout, "joins_neighbours", lambda device: True)


def parts_of(codec: Codec, x: Tensor) -> tuple[list[Tensor], Tensor]:
    parts = codec.encode(x)
    return list(parts), codec.decode(parts, x.shape, x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("codec", PACKED, ids=repr)
def test_both_packings_hold_the_same_numbers_in_as_many_bytes(codec, shape, dtype, monkeypatch):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    x = x > 0 if isinstance(codec, BitMask) else x
    across, expected = parts_of(codec, x)
    monkeypatch.setattr(layout, "joins_neighbours", lambda device: True)
    neighbours, found = parts_of(codec, x)
    assert torch.equal(found, expected)
    assert [part.nbytes for part in neighbours] == [part.nbytes for part in across]
    assert sum(part.nbytes for part in neighbours) == codec.nbytes(x.shape, x.dtype)


def test_eight_neighbours_share_a_word(as_on_a_gpu):
    """The first in its lowest bits."""
    codes = [3, 0, 1, 2, 3, 3, 0, 1]
    x = torch.tensor([[float(code) for code in codes]])
    (packed,) = FixedPoint(2, 1.0, 0.0).encode(x)
    assert packed.dtype is torch.int16
    assert int(packed.item()) & 0xFFFF == sum(code << 2 * place for place, code in enumerate(codes))
    (packed,) = FixedPoint(4, 1.0, 0.0).encode(x * 5)
    assert packed.dtype is torch.int32
    assert int(packed.item()) & 0xFFFFFFFF == sum(5 * code << 4 * place for place, code in enumerate(codes))
    (packed,) = BitMask().encode(x > 1)
    assert packed.dtype is torch.uint8
    assert packed.item() == sum((code > 1) << place for place, code in enumerate(codes))


@pytest.mark.parametrize("codec", [Quantize(4, 16), Quantize(2, 16, symmetric=False)], ids=repr)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_stay_in_their_group(codec, bad, as_on_a_gpu):
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    expected = codec.decode(codec.encode(x), x.shape, x.dtype)
    x[1, 20] = bad
    found = codec.decode(codec.encode(x), x.shape, x.dtype)
    assert found[1, 16:32].isnan().all()
    found[1, 16:32] = expected[1, 16:32]
    assert torch.equal(found, expected)
