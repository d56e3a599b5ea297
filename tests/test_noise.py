"""The noise of stochastic rounding."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from slimfit_fx.codecs import Quantize


def lowbias32(x: np.ndarray) -> np.ndarray:
    """C. Wellons' hash of uint32, as published."""
    x = x ^ (x >> 16)
    x = x * np.uint32(0x7FEB352D)
    x = x ^ (x >> 15)
    x = x * np.uint32(0x846CA68B)
    return x ^ (x >> 16)


def stochastic_codes(x: Tensor, seed: int = 0) -> Tensor:
    """The int8 codes of one group."""
    return Quantize(8, x.numel(), stochastic=True, seed=seed).encode(x)[0].flatten().to(torch.int64)


@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_noise_is_a_hash_of_value_place_and_seed(seed):
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    with np.errstate(over="ignore"):
        place = (np.arange(4096, dtype=np.uint32) ^ np.uint32(seed * 668265263 % 2**31)) * np.uint32(0x9E3779B9)
        noise = lowbias32(x.numpy().view(np.uint32) ^ place) & 0xFFFFFF
    step = Quantize(8, 4096).encode(x)[1].float()
    expected = (x / step.flatten() + torch.from_numpy(noise.astype(np.float32)) * 2.0**-24).floor()
    assert torch.equal(stochastic_codes(x, seed), expected.flatten().clamp(-127, 127).to(torch.int64))


def rounded_up(values: Sequence[float], seed: int = 0) -> Tensor:
    """Whether each of `values`, numbers of steps, was rounded up; they share a group with its largest."""
    x = torch.tensor([*values, 127.0])
    step = Quantize(8, x.numel()).encode(x)[1].float().item()
    return (stochastic_codes(x, seed) > (x / step).floor())[:-1]


def agreement(first: Tensor, second: Tensor) -> float:
    return (first == second).double().mean().item()


def test_noise_depends_on_value_place_and_seed_and_on_nothing_else():
    """Each alone changes half of the decisions, within 4 standard errors of 4096 coins."""
    some, other = [0.5] * 4096, [1.5] * 4096
    assert agreement(rounded_up(some), rounded_up(some)) == 1.0
    assert abs(agreement(rounded_up(some), rounded_up(other)) - 0.5) < 0.035, "a neighbouring value, the same place"
    assert abs(agreement(rounded_up(some, 0), rounded_up(some, 1)) - 0.5) < 0.035
    assert abs(rounded_up(some).double().mean() - 0.5) < 0.035, "one value, many places"
