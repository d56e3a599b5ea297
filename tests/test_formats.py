"""The formats of codecs, worked out here from their definition: which numbers there are, and where a group ends.

Nothing is taken from a codec's own fields or its `error_bound`: a codec of half as many levels fails.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from slimfit_fx.codecs import BitMask, Codec, FixedPoint, Float8, Quantize, TopK, TopOfBlock, WhenFrozen

ROWS = (688, 197, 100, 36, 7, 1)
# The size of groups of about 64 elements, by bits and row. The largest of the divisors from 16 to 64 that fill their
# bytes; a shorter row is a group; 197, a prime, is three groups, and 7 one, filled up.
SIZES = {
    8: {688: 43, 197: 66, 100: 50, 36: 36, 7: 7, 1: 1},
    6: {688: 16, 197: 68, 100: 20, 36: 36, 7: 8, 1: 4},
    5: {688: 16, 197: 72, 100: 56, 36: 40, 7: 8, 1: 8},
    4: {688: 16, 197: 66, 100: 50, 36: 36, 7: 8, 1: 2},
    2: {688: 16, 197: 68, 100: 20, 36: 36, 7: 8, 1: 4},
}
# The bits of a code in each of its parts: 6 do not divide a byte, 4 and 2 do.
PLANES = {8: [8], 6: [4, 2], 5: [4, 1], 4: [4], 2: [2]}
# The size of groups of TopOfBlock(8), about 512 elements and a multiple of 16.
BLOCKED = {688: 688, 197: 208, 100: 112, 36: 48, 7: 16, 1: 16}
STEP_ROUNDING = 2**-7  # up to the next bfloat16

every_row = pytest.mark.parametrize("row", ROWS)


def rows_of(row: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """16 rows, each of a magnitude of its own."""
    generator = torch.Generator().manual_seed(row)
    scales = torch.logspace(-3, 3, 16, dtype=dtype)[:, None]
    return torch.randn(16, row, generator=generator, dtype=dtype) * scales


def grouped(x: Tensor, size: int) -> Tensor:
    """x [..., row] in float64 as [..., groups, size], filled up with zeros."""
    return F.pad(x.double(), (0, -x.shape[-1] % size)).unflatten(-1, (-1, size))


def spread(numbers: Tensor, size: int, row: int) -> Tensor:
    """A number for each group as one for each element."""
    return numbers.repeat_interleave(size, -1)[..., :row]


def round_trip(codec: Codec, x: Tensor) -> Tensor:
    return codec.decode(codec.encode(x), x.shape, x.dtype)


def steps_of(x: Tensor, bits: int, symmetric: bool, size: int) -> Tensor:
    """A group's extent / levels: from zero to the largest magnitude, or from the smallest element to the largest."""
    groups = grouped(x, size)
    if symmetric:
        return groups.abs().amax(-1) / {8: 127, 6: 31, 5: 15, 4: 7, 2: 1}[bits]
    return (groups.amax(-1) - groups.amin(-1)) / {8: 255, 6: 63, 5: 31, 4: 15, 2: 3}[bits]


@every_row
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [8, 6, 5, 4, 2])
def test_integers_are_off_by_half_a_step(bits, symmetric, stochastic, dtype, row):
    """By a whole one if rounding is stochastic. `error_bound` promises that, and no more."""
    codec, x, size = Quantize(bits, 64, symmetric, stochastic), rows_of(row, dtype), SIZES[bits][row]
    steps = spread(steps_of(x, bits, symmetric, size), size, row)
    bound = steps * (1 + STEP_ROUNDING) * (1.0 if stochastic else 0.5)
    largest = spread(grouped(x, size).abs().amax(-1), size, row)
    error = (round_trip(codec, x).double() - x.double()).abs()
    assert (error <= bound + 1e-6 * largest).all()
    claimed = codec.error_bound(x)
    assert (claimed >= bound).all()
    assert (claimed <= 1.001 * bound + 2e-6 * largest).all()
    if row >= 36:
        assert (error / bound).max() > 0.9, "the bound could be smaller"


@every_row
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [8, 6, 5, 4, 2])
def test_steps_of_integers_are_stored_in_bfloat16(bits, symmetric, row):
    x, size = rows_of(row), SIZES[bits][row]
    parts = Quantize(bits, 64, symmetric).encode(x)
    codes, (step, *low) = parts[: len(PLANES[bits])], parts[len(PLANES[bits]) :]
    groups = -(-row // size)
    expected = steps_of(x, bits, symmetric, size) * (1.0 if symmetric else 0.5)  # of halves
    assert step.dtype is torch.bfloat16
    assert step.shape == (16, groups, 1)
    ratio = step.squeeze(-1).double()[expected > 0] / expected[expected > 0]
    assert (ratio > 1 - 1e-6).all()
    assert (ratio <= 1 + STEP_ROUNDING).all()
    assert [part.shape for part in codes] == [(16, groups, size * width // 8) for width in PLANES[bits]]
    assert {part.dtype for part in codes} == {torch.int8 if symmetric and bits == 8 else torch.uint8}
    assert [(part.dtype, part.shape) for part in low] == [] if symmetric else [(torch.float32, step.shape)]
    assert Quantize(bits, 64, symmetric).encode(x.double())[len(codes)].dtype is torch.float64


def test_a_step_that_bfloat16_has_is_not_lengthened():
    x = torch.tensor([[1.0, -1.0, 0.0, 0.25], [3.0, 3.0, -3.0, 0.0]])
    assert Quantize(2).encode(x)[1].flatten().tolist() == [1.0, 3.0]


def test_codes_share_bytes_across_the_group():
    """Byte j holds elements j, j + s, ... from its low bits up."""
    x = torch.tensor([[0.0, 1.0, 2.0, 3.0, 3.0, 0.0, 1.0, 2.0]])
    packed = FixedPoint(2, 1.0, 0.0).encode(x)[0].flatten().tolist()
    assert packed == [0 | 2 << 2 | 3 << 4 | 1 << 6, 1 | 3 << 2 | 0 << 4 | 2 << 6]
    packed = FixedPoint(4, 1.0, 0.0).encode(x)[0].flatten().tolist()
    assert packed == [0 | 3 << 4, 1 | 0 << 4, 2 | 1 << 4, 3 | 2 << 4]
    low, high = FixedPoint(6, 1.0, 0.0).encode(torch.tensor([[5.0, 63.0, 16.0, 34.0]]))
    assert low.flatten().tolist() == [5 | 0 << 4, 15 | 2 << 4]
    assert high.flatten().tolist() == [0 | 3 << 2 | 1 << 4 | 2 << 6]
    mask = torch.tensor([True, False, False, True, True, True, False, False])
    assert BitMask().encode(mask)[0].flatten().tolist() == [0b00111001]


@every_row
@pytest.mark.parametrize(
    ("bits", "step", "low"),
    [
        (4, 0.5, -4.0),
        (8, 1 / 16, -8.0),
        (8, 1 / 256, 0.0),
        (6, 0.02, -0.13),
        (5, 0.5, -8.0),
        (2, 0.75, -1.5),
        (4, 0.084, -0.13),
    ],
)
def test_fixed_point_takes_the_nearest_of_its_numbers(bits, step, low, row):
    numbers = low + step * torch.arange(2**bits, dtype=torch.float64)
    x = torch.linspace(low - 2 * step, numbers[-1].item() + 2 * step, 5 * row).view(5, row)
    decoded = round_trip(FixedPoint(bits, step, low), x).double()
    nearest = (x.double().unsqueeze(-1) - numbers).abs().amin(-1)
    torch.testing.assert_close((decoded - x.double()).abs(), nearest, rtol=0, atol=1e-6)
    assert (decoded.unsqueeze(-1) - numbers).abs().amin(-1).max() < 1e-6
    claimed = FixedPoint(bits, step, low).error_bound(x)
    outside = (x.double() - x.double().clamp(low, numbers[-1].item())).abs()
    torch.testing.assert_close(claimed, outside + step / 2, rtol=1e-3, atol=0)


@every_row
@pytest.mark.parametrize(
    ("format", "largest", "mantissa", "lowest"), [("e4m3", 448.0, 3, 2.0**-9), ("e5m2", 57344.0, 2, 2.0**-16)]
)
def test_float8_scales_a_groups_largest_to_its_own(format, largest, mantissa, lowest, row):
    generator = torch.Generator().manual_seed(row)
    x = rows_of(row) * torch.exp(4 * torch.randn(16, row, generator=generator))
    codec, size = Float8(format, 64), SIZES[8][row]
    codes, scale = codec.encode(x)
    assert codes.dtype is {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}[format]
    assert scale.dtype is torch.bfloat16
    exact = grouped(x, size).abs().amax(-1) / largest
    ratio = scale.squeeze(-1).double() / exact
    assert (ratio > 1 - 1e-6).all()
    assert (ratio <= 1 + STEP_ROUNDING).all()
    spacing = spread(scale.squeeze(-1).double(), size, row) * lowest  # of the smallest numbers
    bound = torch.maximum(x.double().abs() * 2.0 ** -(mantissa + 1), spacing / 2)
    error = (round_trip(codec, x).double() - x.double()).abs()
    assert (error <= bound * (1 + 1e-6)).all()
    assert (error / bound).max() > (0.8 if row > 1 else 0.0)
    claimed = codec.error_bound(x)
    assert (claimed >= bound).all()
    largest_of = spread(grouped(x, size).abs().amax(-1), size, row)
    sum_of_both = x.double().abs() * 2.0 ** -(mantissa + 1) + spacing / 2
    assert (claimed <= 1.01 * sum_of_both + 2e-6 * largest_of).all()


@every_row
@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.3, 1.0])
def test_the_largest_of_all_are_kept(ratio, row):
    x = rows_of(row)
    values, indices, _ = TopK(ratio).encode(x)
    count = math.ceil(round(ratio * x.numel(), 6))
    assert values.shape == indices.shape == (count,)
    assert indices.dtype is torch.int32
    threshold = x.flatten().abs().sort(descending=True).values[count - 1]
    expected = torch.where(x.abs() >= threshold, x, 0.0)
    assert torch.equal(round_trip(TopK(ratio), x), expected)
    at_risk = torch.where(x.abs() > threshold, 0.0, x).abs()  # there may be more than one at the threshold
    assert torch.equal(TopK(ratio).error_bound(x), at_risk.double())


@every_row
def test_the_largest_of_every_block_is_kept(row):
    """Blocks of 8, whose members lie apart in a group."""
    x, size = rows_of(row), BLOCKED[row]
    blocks = grouped(x, size).unflatten(-1, (8, -1))
    largest = blocks.abs().amax(-2, keepdim=True)
    expected = torch.where(blocks.abs() == largest, blocks, 0.0).flatten(-2).flatten(-2)[..., :row]
    assert torch.equal(round_trip(TopOfBlock(8), x).double(), expected)
    assert torch.equal(TopOfBlock(8).error_bound(x), (x.double() - expected).abs())
    values, places = TopOfBlock(8).encode(x)
    groups = -(-row // size)
    assert values.numel() == 16 * groups * size // 8
    assert places.numel() * 2 == values.numel()


@every_row
def test_masks_take_a_bit(row):
    mask = rows_of(row) > 0
    (packed,) = BitMask().encode(mask)
    assert packed.dtype is torch.uint8
    assert mask.numel() / 8 <= packed.numel() <= mask.numel() / 8 * 1.02 + 1
    assert torch.equal(round_trip(BitMask(), mask), mask)
    assert torch.equal(BitMask().error_bound(mask), torch.zeros(mask.shape, dtype=torch.float64))


@pytest.mark.parametrize(
    ("codec", "shape", "expected"),
    [
        (Quantize(8, 128), (2, 3, 688), [(2, 3, 8, 86), (2, 3, 8, 1)]),
        (Quantize(8, 128), (131,), [(1, 131), (1, 1)]),
        (Quantize(8, 128), (), [(1, 1), (1, 1)]),
        (Quantize(4, 64, symmetric=False), (3, 256), [(3, 4, 32), (3, 4, 1), (3, 4, 1)]),
        (Quantize(8, 32), (3, 38), [(3, 2, 19), (3, 2, 1)]),
        (Quantize(8, 32), (3, 62), [(3, 2, 31), (3, 2, 1)]),
        (Quantize(8, 32), (3, 59), [(3, 1, 59), (3, 1, 1)]),  # up to twice as large
        (Quantize(8, 32), (3, 67), [(3, 2, 34), (3, 2, 1)]),
        (Quantize(8, 32), (3, 94), [(3, 2, 47), (3, 2, 1)]),  # the nearest divisor above
        (Quantize(8, 32), (3, 64), [(3, 2, 32), (3, 2, 1)]),
        (Quantize(8, 32), (3, 0), [(3, 1, 1), (3, 1, 1)]),
        (FixedPoint(4, 0.5, -4.0), (4, 8, 32), [(2, 256)]),
        (FixedPoint(4, 0.5, -4.0), (5, 5), [(1, 13)]),
        (Float8(group=64), (4, 128), [(4, 2, 64), (4, 2, 1)]),
        (BitMask(), (10, 100), [(5, 25)]),
        (BitMask(), (2, 1030), [(4, 65)]),
        (TopK(0.1), (10, 100), [(100,), (100,), (10, 0)]),
        (TopK(0.1), (), [(1,), (1,), (1, 0)]),
        (TopOfBlock(8), (4, 1024), [(4, 2, 64), (4, 2, 32)]),
        (TopOfBlock(3), (4, 100), [(4, 1, 34), (4, 1, 17)]),
    ],
    ids=str,
)
def test_shapes_of_what_is_stored(codec, shape, expected):
    x = torch.zeros(shape, dtype=torch.bool if isinstance(codec, BitMask) else torch.float32)
    assert [tuple(part.shape) for part in codec.encode(x)] == expected


@pytest.mark.parametrize(
    ("codec", "dtypes"),
    [
        (Quantize(8), {torch.float64, torch.float32, torch.float16, torch.bfloat16}),
        (FixedPoint(8, 1.0, 0.0), {torch.float64, torch.float32, torch.float16, torch.bfloat16}),
        (BitMask(), {torch.bool}),
    ],
    ids=["quantize", "fixed-point", "bits"],  # a set has another order in each process
)
def test_dtypes_that_are_encoded(codec, dtypes):
    every = {*dtypes, torch.float8_e4m3fn, torch.int8, torch.int64, torch.complex64, torch.bool, torch.float32}
    assert {dtype for dtype in every if codec.accepts(dtype)} == dtypes


def test_labels():
    codecs = (
        Quantize(4, 64),
        Quantize(8, 32, symmetric=False, stochastic=True),
        FixedPoint(4, 0.5, -4.0),
        Float8("e5m2", 32),
        TopK(0.25),
        TopOfBlock(4),
        BitMask(),
        WhenFrozen(TopK(0.1)),
        WhenFrozen(None),
    )
    assert [codec.label for codec in codecs] == [
        "int4, group 64",
        "int8, group 32, asymmetric, stochastic",
        "fixed point, 4 bits, step 0.5",
        "float8 e5m2, group 32",
        "largest 25%",
        "largest of 4",
        "bits",
        "largest 10% when frozen",
        "as it is",
    ]
