"""Codecs by themselves: their error bound on any finite input, their bytes, and what NaN and infinity do."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from slimfit_fx.passes.compress import trace
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from slimfit_fx.codecs import (
    BitMask,
    Codec,
    Derivative,
    FixedPoint,
    Float8,
    Quantize,
    Recompute,
    TopK,
    TopOfBlock,
    WhenFrozen,
)
from slimfit_fx.errors import ConfigError

LOSSY = [
    *(Quantize(bits, 32, symmetric) for bits in (8, 6, 5, 4, 2) for symmetric in (True, False)),
    Quantize(4, 32, stochastic=True),
    Quantize(2, 32, symmetric=False, stochastic=True),
    Quantize(6, 32, stochastic=True),
    FixedPoint(6, 1 / 8, -4.0),
    FixedPoint(4, 0.5, -4.0),
    FixedPoint(8, 1 / 16, -8.0),
    FixedPoint(8, 1 / 256, 0.0),
    Float8("e4m3", 32),
    Float8("e5m2", 32),
    TopK(0.1),
    TopOfBlock(8),
    TopOfBlock(3),
]
GROUPED = [codec for codec in LOSSY if isinstance(codec, (Quantize, Float8))]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
lossy = pytest.mark.parametrize("codec", LOSSY, ids=repr)

shapes = st.lists(st.integers(0, 9), max_size=3).map(tuple) | st.sampled_from([(3, 70), (2, 197), (1, 129), (300,)])


@st.composite
def tensors(draw, dtypes=DTYPES):
    """Finite tensors of any shape and magnitude: ordinary, constant, denormal, huge, with zeros of both signs."""
    dtype, shape = draw(st.sampled_from(dtypes)), draw(shapes)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(shape, generator=generator)
    largest, smallest = torch.finfo(dtype).max, torch.finfo(dtype).tiny
    kind = draw(st.sampled_from(["ordinary", "constant", "offset", "sparse", "mixed", "huge", "denormal", "zero"]))
    if kind == "constant":
        x = torch.full(shape, draw(st.sampled_from([1.0, -3.7, 1e-30, largest, -largest])))
    elif kind == "offset":
        x = x * 1e-3 + 100
    elif kind == "sparse":
        x = torch.where(torch.rand(shape, generator=generator) < 0.8, -0.0, x)
    elif kind == "mixed":
        x = x * torch.exp(8 * torch.randn(shape, generator=generator))
    elif kind == "huge":
        x = torch.sign(x) * largest * torch.rand(shape, generator=generator)
    elif kind == "denormal":
        x = x * smallest / 8
    elif kind == "zero":
        x = torch.sign(x) * 0.0
    x = x.double().clamp(-largest, largest).to(dtype)
    if draw(st.booleans()) and x.dim() > 1:
        x = x.transpose(0, -1)  # not contiguous
    return x


def round_trip(codec: Codec, x: torch.Tensor) -> torch.Tensor:
    return codec.decode(codec.encode(x), x.shape, x.dtype)


@lossy
@given(x=tensors())
def test_error_bound_and_bytes(codec, x):
    parts = codec.encode(x)
    decoded = codec.decode(parts, x.shape, x.dtype)
    assert decoded.shape == x.shape
    assert decoded.dtype == x.dtype
    assert decoded.is_contiguous()
    error, bound = (decoded.double() - x.double()).abs(), codec.error_bound(x)
    assert bound.shape == x.shape
    assert (error <= bound).all(), f"off by {(error - bound).max()}"
    assert sum(part.numel() * part.element_size() for part in parts) == codec.nbytes(x.shape, x.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_denormal_numbers_may_be_rounded_to_the_shortest_step(symmetric, dtype):
    """It is longer than what they span, and stochastic rounding takes some of them a whole step away."""
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(64, 64, generator=generator).double() * torch.finfo(dtype).tiny / 8).to(dtype)
    codec = Quantize(2, 32, symmetric, stochastic=True)
    error, bound = (round_trip(codec, x).double() - x.double()).abs(), codec.error_bound(x)
    assert (error <= bound).all()
    assert error.max() > 0.3 * bound.max() > 0


@given(st.integers(0, 100), shapes, st.booleans())
def test_bit_masks_are_lossless(seed, shape, transposed):
    x = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    x = x.transpose(0, -1) if transposed and x.dim() else x
    decoded = round_trip(BitMask(), x)
    assert torch.equal(decoded, x)
    assert decoded.dtype == torch.bool


@pytest.mark.parametrize("codec", GROUPED, ids=repr)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@given(place=st.integers(0, 127), dtype=st.sampled_from(DTYPES))
def test_nan_and_infinity_stay_in_their_group(codec, bad, place, dtype):
    x = torch.randn(1, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    clean = round_trip(codec, x)
    x[0, place] = bad
    decoded = round_trip(codec, x)
    group = torch.arange(128) // 32 == place // 32
    assert decoded[0, group].isnan().all()
    assert torch.equal(decoded[0, ~group], clean[0, ~group])


@pytest.mark.parametrize("codec", [TopK(0.1), TopOfBlock(8)], ids=repr)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_pruning_keeps_nan_and_infinity(codec, bad):
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    x[1, 7] = bad
    decoded = round_trip(codec, x)
    assert torch.equal(decoded[1, 7], x[1, 7]) or decoded[1, 7].isnan()
    decoded[1, 7] = 0
    assert decoded.isfinite().all()


def test_fixed_point_saturates():
    x = torch.tensor([math.inf, -math.inf, math.nan, 100.0, -100.0, 0.3])
    assert round_trip(FixedPoint(4, 0.5, -4.0), x).tolist() == [3.5, -4.0, 0.0, 3.5, -4.0, 0.5]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [8, 6, 5, 4, 2])
@pytest.mark.parametrize("value", [0.1234, -0.777, 0.5])
def test_stochastic_rounding_is_unbiased(bits, symmetric, value):
    """The mean over n draws is within 5 standard errors: a correct codec fails once in 1.7 million such tests."""
    x = torch.full((1024, 32), value)
    x[:, 0], x[:, 1] = 1.0, -1.0  # the group's extent
    draws = torch.stack([round_trip(Quantize(bits, 32, symmetric, True, seed), x)[:, 2:] for seed in range(4)]).double()
    errors = draws - x[:, 2:].double()
    standard_error = errors.std() / errors.numel() ** 0.5
    assert errors.mean().abs() <= 5 * standard_error + 1e-7
    assert not torch.equal(draws[0], draws[1])


def test_pruning_keeps_the_largest():
    x = torch.arange(1.0, 101.0) * (-1) ** torch.arange(100)
    assert round_trip(TopK(0.1), x).abs().gt(0).tolist() == [False] * 90 + [True] * 10
    blocks = round_trip(TopOfBlock(4), torch.randn(2, 512))
    assert (blocks != 0).sum() == 2 * 512 / 4


def test_bytes():
    assert Quantize(8, 128).nbytes((16, 768), torch.float32) == 16 * (768 + 6 * 2)
    assert Quantize(4, 64).nbytes((16, 768), torch.bfloat16) == 16 * (384 + 12 * 2)
    assert Quantize(6, 64).nbytes((16, 768), torch.bfloat16) == 16 * (576 + 12 * 2)
    assert Quantize(5, 64).nbytes((16, 768), torch.bfloat16) == 16 * (480 + 12 * 2)
    assert Quantize(2, 64, symmetric=False).nbytes((4, 64), torch.float32) == 4 * (16 + 2 + 4)
    assert FixedPoint(4, 0.5, -4.0).nbytes((8, 512), torch.float32) == 8 * 256
    assert BitMask().nbytes((8, 512), torch.bool) == 8 * 64
    assert TopK(0.1).nbytes((10, 100), torch.float32) == 100 * 8
    assert TopOfBlock(8).nbytes((1, 512), torch.float32) == 64 * 4 + 32


def test_they_print_and_compare():
    assert repr(Quantize(4, 64)) == "Quantize(bits=4, group=64, symmetric=True, stochastic=False, seed=0)"
    assert Quantize(4, 64) == Quantize(4, 64) != Quantize(4, 128)
    assert len({TopK(0.1), TopK(0.1), Recompute(), Derivative(), WhenFrozen()}) == 4


@pytest.mark.parametrize(
    "make",
    [
        lambda: Quantize(3),
        lambda: Quantize(7),
        lambda: Quantize(6.0),
        lambda: Quantize(8, 7),
        lambda: Quantize(8, 32.0),
        lambda: FixedPoint(3, 0.5, 0.0),
        lambda: FixedPoint(8, 0.0, 0.0),
        lambda: Float8("e3m4"),
        lambda: Float8(group=0),
        lambda: TopK(0.0),
        lambda: TopK(1.1),
        lambda: TopOfBlock(1),
        lambda: TopOfBlock(17),
        lambda: TopOfBlock(8.0),
    ],
)
def test_bad_options_are_named(make):
    with pytest.raises(ConfigError):
        make()


@pytest.mark.parametrize(
    "codec",
    [
        *(Quantize(bits, 8) for bits in (8, 6, 5, 4, 2)),
        Float8(group=8),
        TopK(1.0),
        TopK(1e-3),
        TopOfBlock(2),
        TopOfBlock(16),
    ],
    ids=repr,
)
def test_options_at_their_limits(codec):
    x = torch.randn(3, 48, generator=torch.Generator().manual_seed(0))
    assert ((round_trip(codec, x) - x).abs() <= codec.error_bound(x)).all()


def traced_round_trip(codec: Codec, *dynamic: DimDynamic):
    """Encoding and decoding as one graph for sizes that are known at run time only, and as a function."""

    def both(x):
        return codec.decode(codec.encode(x), x.shape, x.dtype)

    mode = FakeTensorMode(shape_env=ShapeEnv())
    sizes = StatelessSymbolicContext(dynamic_sizes=list(dynamic))
    with enable_python_dispatcher():  # as AOTAutograd does where sizes are symbols
        return trace(both, mode.from_tensor(torch.randn(5, 96), symbolic_context=sizes)), both


@lossy
def test_sizes_known_at_run_time_only(codec):
    """One trace serves any number of rows."""
    traced, both = traced_round_trip(codec, DimDynamic.DYNAMIC, DimDynamic.STATIC)
    for rows in (3, 7):
        x = torch.randn(rows, 96)
        assert torch.equal(traced(x), both(x))


@lossy
def test_row_lengths_known_at_run_time_only(codec):
    """One trace serves rows of any length, each a group: the same numbers where it is one of known length, too."""
    traced, both = traced_round_trip(codec, DimDynamic.DYNAMIC, DimDynamic.DYNAMIC)
    for shape in ((3, 96), (4, 16), (2, 5), (3, 8), (5, 37), (1, 3), (3, 300)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        found = traced(x)
        largest = x.abs().amax(-1, keepdim=True)
        if isinstance(codec, TopOfBlock):  # other blocks
            assert ((found == 0) | (found == x)).all(), shape
            assert (found != 0).sum() * codec.block >= x.numel(), shape
        elif getattr(codec, "stochastic", False):  # groups of other lengths have other noise
            steps = (1 if codec.symmetric else 2) * largest / {2: 3, 4: 7, 6: 31}[codec.bits]
            assert ((found - x).abs() <= 1.01 * steps).all(), shape
        elif isinstance(codec, (Quantize, Float8)) and shape[-1] > 37:  # other groups
            step = 2 * largest / {8: 255, 6: 63, 5: 31, 4: 15, 2: 3}[getattr(codec, "bits", 4)]
            assert ((found - x).abs() <= 1.01 * step).all(), shape
        else:
            assert torch.equal(found, both(x)), shape


@pytest.mark.parametrize(
    "codec",
    [Quantize(6), Quantize(5), Quantize(4), Quantize(2), FixedPoint(4, 0.5, -4.0), BitMask(), TopOfBlock(8)],
    ids=repr,
)
def test_row_lengths_known_at_run_time_only_cost_little_padding(codec):
    mode = FakeTensorMode(shape_env=ShapeEnv())
    sizes = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * 2)
    x = torch.randn(5, 96) > 0 if isinstance(codec, BitMask) else torch.randn(5, 96)
    with enable_python_dispatcher():
        traced = trace(lambda x: codec.encode(x), mode.from_tensor(x, symbolic_context=sizes))
    stored = sum(part.numel() * part.element_size() for part in traced(x))
    assert stored <= 1.25 * codec.nbytes(x.shape, x.dtype)
