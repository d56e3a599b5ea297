from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck

from slimfit_fx import ops

layers = st.lists(st.integers(0, 3), min_size=1, max_size=4)
tables = st.lists(st.booleans(), min_size=4, max_size=4).map(torch.tensor)


@given(tables, layers, st.sampled_from([torch.float32, torch.bfloat16, torch.bool]))
def test_keep(gates, needed_by, dtype):
    x = torch.randn(5, 2, 3).transpose(1, 2).to(dtype)
    kept = torch.ops.slimfit_fx.keep(x, gates, needed_by)
    if any(gates[layer] for layer in needed_by):
        assert torch.equal(kept, x)
        assert kept.data_ptr() != x.data_ptr()
    else:
        assert kept.shape == (0, 3, 2)
    assert kept.dtype == x.dtype
    assert kept.is_contiguous()


@given(tables, st.integers(0, 3), st.sampled_from([torch.float32, torch.bfloat16]))
def test_weight_gradient(gates, layer, dtype):
    a, b = torch.randn(7, 4).t(), torch.randn(7, 3)
    gradient = torch.ops.slimfit_fx.weight_gradient(a, b, gates, layer, dtype)
    assert gradient.dtype is dtype
    if gates[layer]:
        assert torch.equal(gradient, (a @ b).to(dtype))
    else:
        assert gradient.shape == (0, 3)


def test_schemas_and_fake_kernels_agree_with_the_kernels():
    gates = torch.tensor([True, False])
    x = torch.randn(4, 3)
    tests = ("test_schema", "test_faketensor")
    for layer in (0, 1):
        opcheck(torch.ops.slimfit_fx.keep.default, (x, gates, [layer]), test_utils=tests)
        opcheck(torch.ops.slimfit_fx.pass_gradient.default, (x, gates, layer), test_utils=tests)
        arguments = (x.t(), x, gates, layer, torch.bfloat16)
        opcheck(torch.ops.slimfit_fx.weight_gradient.default, arguments, test_utils=tests)


def test_the_kernels_are_plain_functions():
    assert ops.keep(torch.ones(2, 2), torch.tensor([False]), [0]).shape == (0, 2)


def test_embedding_gradient_sums_rows_where_the_mask_is():
    rows, indices = torch.arange(8.0).view(4, 2), torch.tensor([1, 0, 1, 9])
    mask = torch.tensor([[True], [True], [True], [False]])
    gates = torch.tensor([True, False])
    arguments = (rows, indices, mask, 3, gates)
    expected = [[2.0, 3.0], [4.0, 6.0], [0.0, 0.0]]
    assert ops.embedding_gradient(*arguments, 0, torch.float32).tolist() == expected
    assert ops.embedding_gradient(*arguments, 1, torch.bfloat16).shape == (0, 2)
    assert ops.embedding_gradient(*arguments, 1, torch.bfloat16).dtype is torch.bfloat16
