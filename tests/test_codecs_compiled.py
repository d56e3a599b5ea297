"""Codecs in generated code, at sizes that divide nothing: what the interpreter computes, to the bit.

Inductor's C++ loop splits are not guarded here: the layout alone has to give indices that it gets right.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_codecs import LOSSY

from slimfit_fx.codecs import BitMask, Codec, Quantize, TopOfBlock

pytestmark = pytest.mark.inductor

# 688 and 552 have divisors; 197, 101, 59 and 7 are primes; rows of one element, of one group, of several
SHAPES = [(3, 688), (2, 3, 197), (5, 7), (4, 101), (2, 36), (2, 552), (3, 1), (2, 5, 172), (1030,), (1, 59), ()]
CODECS = [*LOSSY, BitMask(), Quantize(8), Quantize(8, 64, symmetric=False), Quantize(4, 64)]
every_codec = pytest.mark.parametrize("codec", CODECS, ids=repr)


def examples(codec: Codec, shapes: list[tuple[int, ...]]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    return [x > 0 for x in tensors] if isinstance(codec, BitMask) else tensors


def compiled(function, dynamic: bool) -> Any:
    """`function` as the passes have it: traced with fake tensors and sizes, which Dynamo does not look into."""
    inner = torch._dynamo.allow_in_graph(function)
    return torch.compile(lambda argument: inner(argument), fullgraph=True, dynamic=dynamic)


@every_codec
def test_compiled_codecs_equal_the_interpreter(codec):
    """Encoding and decoding in graphs of their own, as forward and backward have them."""
    inputs = examples(codec, SHAPES)

    def encode(inputs):
        return [codec.encode(x) for x in inputs]

    def decode(encoded):
        return [codec.decode(parts, x.shape, x.dtype) for parts, x in zip(encoded, inputs, strict=True)]

    encoded = encode(inputs)
    for found, expected in zip(compiled(encode, dynamic=False)(inputs), encoded, strict=True):
        assert all(map(torch.equal, found, expected)), f"encoding {[tuple(part.shape) for part in expected]}"
    for found, expected in zip(compiled(decode, dynamic=False)(encoded), decode(encoded), strict=True):
        assert torch.equal(found, expected), f"decoding {tuple(expected.shape)}"


@every_codec
def test_compiled_codecs_at_changing_sizes(codec):
    """One graph serves any batch and length: no row is of a known length."""

    def both(x):
        return codec.decode(codec.encode(x), x.shape, x.dtype)

    function = compiled(both, dynamic=True)
    for turn, shape in enumerate([(3, 5, 9), (2, 4, 16), (4, 3, 8), (5, 7, 37), (3, 4, 3)]):
        (x,) = examples(codec, [shape])
        with torch._dynamo.config.patch(error_on_recompile=turn > 0):
            found = function(x)
        if getattr(codec, "stochastic", False):  # groups of other lengths have other noise
            assert ((found - x).abs() <= codec.error_bound(x)).all(), shape
        elif isinstance(codec, TopOfBlock):  # and other blocks
            assert ((found == 0) | (found == x)).all(), shape
            assert (found != 0).sum() * codec.block >= x.numel(), shape
        else:
            assert torch.equal(found, both(x)), shape
