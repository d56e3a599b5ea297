"""The formats of the preset `paper`, as SlimFit publishes them (section 4), by what they store."""

from __future__ import annotations

import pytest
import torch

from slimfit_fx.codecs import TopK, WhenFrozen
from slimfit_fx.presets import PRESETS


@pytest.mark.parametrize(
    ("role", "first", "step", "last"),
    [
        ("activation input", -4.0, 0.5, 3.5),
        ("attention operand", -8.0, 1 / 16, 8.0 - 1 / 16),
        ("feed-forward input", -8.0, 1 / 16, 8.0 - 1 / 16),
        ("softmax output", 0.0, 1 / 256, 255 / 256),
    ],
)
def test_the_published_fixed_point_formats(role, first, step, last):
    x = torch.linspace(first - 4 * step, last + 4 * step, 5000)
    codec = PRESETS["paper"].codecs[role]
    numbers = codec.decode(codec.encode(x), x.shape, x.dtype).unique()
    assert torch.equal(numbers, torch.arange(first, last + step / 2, step))


def test_the_rest_of_the_preset():
    """A frozen norm keeps its largest 10%, with int32 indices; nothing else has a format, and nothing is rebuilt."""
    paper = PRESETS["paper"]
    fixed = {"activation input", "attention operand", "feed-forward input", "softmax output"}
    assert set(paper.codecs) == {*fixed, "norm input"}
    norm = paper.codecs["norm input"]
    assert isinstance(norm, WhenFrozen)
    assert isinstance(norm.codec, TopK)
    values, indices, _ = norm.codec.encode(torch.randn(64, 100))
    assert values.numel() == indices.numel() == 640
    assert indices.dtype is torch.int32
    assert not paper.rebuild
    nbytes = {role: paper.codecs[role].nbytes((8, 512), torch.float32) for role in fixed}
    assert nbytes == {role: 2048 if role == "activation input" else 4096 for role in fixed}
