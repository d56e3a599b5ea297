"""The comparison that the tests of generated code rest on can fail."""

from __future__ import annotations

import pytest
import torch
from differential import compared

EXACT = {"large": torch.full((4,), 10.0), "small": torch.full((4,), 1e-3), "none": None, "zero": torch.full((4,), 1e-9)}


def test_equal_gradients():
    assert not compared("", EXACT, EXACT, EXACT, 1e-6, 1e-6)


@pytest.mark.parametrize(
    ("name", "value", "fault"),
    [
        ("small", torch.zeros(4), "small of norm 0.002 is off by 0.002"),
        ("small", -EXACT["small"], "small of norm 0.002 is off by 0.004"),
        ("large", torch.full((4,), float("nan")), "large of norm 20 is off by nan"),
        ("zero", torch.ones(4), "zero of norm 0 is off by 2"),
        ("large", None, "large misses a gradient"),
        ("none", torch.zeros(4), "none has an unexpected gradient"),
    ],
)
def test_faults(name, value, fault):
    """A gradient of zeros, however small the true one, is a fault; noise where the true one is zero is none."""
    found = compared("", {**EXACT, name: value}, EXACT, EXACT, 0.1)
    assert len(found) == 1
    assert fault in found[0]
    assert not compared("", {**EXACT, "zero": torch.full((4,), 1e-6)}, EXACT, EXACT, 1e-6)


def test_all_together_and_nothing_at_all():
    off = {**EXACT, "large": EXACT["large"] * 1.05}
    assert compared("", off, EXACT, EXACT, 0.1, 0.01) == [": all together are off by 0.05, allowed 0.01"]
    zeros = {"a": torch.zeros(3)}
    assert "nothing to compare" in compared("", zeros, zeros, zeros, 0.1)[0]
    assert not compared("", {"a": None}, {"a": None}, zeros, 0.1)
