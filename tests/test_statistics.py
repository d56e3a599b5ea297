"""What is measured of layers at an optimizer step."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from slimfit_fx.scheduling.statistics import measure_gains, measure_gradients, measure_updates, relative_updates, sample


def test_relative_updates():
    old = [torch.tensor([1.0, -2.0, 0.0, 4.0]), torch.tensor([1.0])]
    new = [torch.tensor([1.5, -2.0, 1.0, 3.0]), torch.tensor([1.0])]
    assert relative_updates(old, new).tolist() == pytest.approx([0.75, 0.0])
    measured = measure_updates([3, 3], old, new).read()
    assert measured == {3: pytest.approx(0.75 / 5)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@given(st.lists(st.floats(-10, 10, width=16), min_size=1, max_size=8), st.data())
def test_relative_updates_are_finite_with_zeros_and_denormals(dtype, values, data):
    old = torch.tensor(values)
    new = old + torch.tensor(
        data.draw(st.lists(st.floats(-1, 1, width=16), min_size=len(values), max_size=len(values)))
    )
    found = relative_updates([old.to(dtype)], [new.to(dtype)])
    assert found.dtype == torch.float32
    assert torch.isfinite(found).all()
    assert relative_updates([old * 0], [new]).item() == 0


@given(st.data())
def test_relative_updates_of_many_tensors_are_those_of_each(data):
    """Chunks, dtypes and sizes do not matter."""
    dtypes = data.draw(st.lists(st.sampled_from([torch.float32, torch.bfloat16]), min_size=1, max_size=6))
    old = [torch.randn(place + 1, 3).to(dtype) for place, dtype in enumerate(dtypes)]
    new = [tensor + 0.5 for tensor in old]
    together = relative_updates(old, new)
    one_by_one = torch.cat([relative_updates([o], [n]) for o, n in zip(old, new, strict=True)])
    assert torch.equal(together, one_by_one)


def test_gradient_norms_relative_to_weights():
    weights, gradients = [torch.tensor([3.0, 4.0]), torch.tensor([0.0])], [torch.tensor([0.0, 10.0]), torch.ones(1)]
    assert measure_gradients([1, 2], gradients, weights, None).read() == {1: pytest.approx(2.0), 2: 0.0}
    assert measure_gradients([1], gradients[:1], weights[:1], torch.tensor(4.0)).read() == {1: pytest.approx(0.5)}


def test_gains_are_what_updates_lower_the_loss_by():
    old, new = [torch.ones(3), torch.ones(2)], [torch.zeros(3), torch.full((2,), 2.0)]
    for tensor in new:
        tensor.grad = torch.ones_like(tensor)
    assert measure_gains([4, 6], old, new, None).read() == {4: 3.0, 6: 0.0}  # the second went uphill
    assert measure_gains([4, 4], old, new, torch.tensor(2.0)).read() == {4: 1.5}  # one layer, two tensors


@given(st.lists(st.integers(1, 700), min_size=1, max_size=2), st.booleans())
@example([150, 438], False)
@example([420, 420], True)
def test_a_sample_is_spread_over_rows_and_columns(shape, transpose):
    tensor = torch.arange(math.prod(shape)).reshape(shape)
    found = sample(tensor.mT if transpose and len(shape) == 2 else tensor)
    assert len(found) <= 2**16
    assert len(found.unique()) == len(found) >= (2**12 if tensor.numel() > 2**16 else tensor.numel())
    if len(shape) == 2 and min(shape) > 1:
        assert len(set((found // shape[1]).tolist())) == shape[0]
        assert len(set((found % shape[1]).tolist())) == shape[1]
