from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from slimfit_fx.graph import gate_ops

layers = st.lists(st.integers(0, 3), min_size=1, max_size=4)
tables = st.lists(st.booleans(), min_size=4, max_size=4).map(torch.tensor)


@given(tables, layers, st.sampled_from([torch.float32, torch.bfloat16, torch.bool]))
def test_keep(gates, needed_by, dtype):
    x = torch.randn(5, 2, 3).transpose(1, 2).to(dtype)
    kept = torch.ops.slimfit_fx.save_if_open(x, gates, needed_by)
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
        opcheck(torch.ops.slimfit_fx.save_if_open.default, (x, gates, [layer]), test_utils=tests)
        opcheck(torch.ops.slimfit_fx.pass_gradient.default, (x, gates, layer), test_utils=tests)
        arguments = (x.t(), x, gates, layer, torch.bfloat16)
        opcheck(torch.ops.slimfit_fx.weight_gradient.default, arguments, test_utils=tests)


def test_the_kernels_are_plain_functions():
    assert gate_ops.save_if_open(torch.ones(2, 2), torch.tensor([False]), [0]).shape == (0, 2)


def test_embedding_gradient_sums_rows_where_the_mask_is():
    rows, indices = torch.arange(8.0).view(4, 2), torch.tensor([1, 0, 1, 9])
    mask = torch.tensor([[True], [True], [True], [False]])
    gates = torch.tensor([True, False])
    arguments = (rows, indices, mask, 3, gates)
    expected = [[2.0, 3.0], [4.0, 6.0], [0.0, 0.0]]
    assert gate_ops.embedding_gradient(*arguments, 0, torch.float32).tolist() == expected
    assert gate_ops.embedding_gradient(*arguments, 1, torch.bfloat16).shape == (0, 2)
    assert gate_ops.embedding_gradient(*arguments, 1, torch.bfloat16).dtype is torch.bfloat16


class Recorded(TorchDispatchMode):
    """Notes the operators that run."""

    def __init__(self):
        super().__init__()
        self.operators = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operators.append(function.overloadpacket.__name__)
        return function(*args, **kwargs or {})


ROWS, INDICES, MASK = torch.randn(4, 3), torch.arange(4), torch.ones(4, 1, dtype=torch.bool)
COLUMNS = ROWS.t().contiguous()


@pytest.mark.parametrize(
    ("work", "call"),
    [
        ("clone", lambda gates, gate: gate_ops.save_if_open(ROWS, gates, [gate])),
        ("clone", lambda gates, gate: gate_ops.pass_gradient(ROWS, gates, gate)),
        ("mm", lambda gates, gate: gate_ops.weight_gradient(COLUMNS, ROWS, gates, gate, torch.float32)),
        (
            "index_put_",
            lambda gates, gate: gate_ops.embedding_gradient(ROWS, INDICES, MASK, 9, gates, gate, torch.float32),
        ),
    ],
    ids=["save_if_open", "pass_gradient", "weight_gradient", "embedding_gradient"],
)
def test_a_closed_gate_costs_nothing(work, call):
    """No memory for a result that is dropped, no multiplication and no sum: nothing but a look at the gate."""
    gates, ran = torch.tensor([True, False]), []
    for gate in (0, 1):
        with Recorded() as recorded:
            call(gates, gate)
        ran.append(set(recorded.operators))
    assert work in ran[0]
    assert ran[1] <= {"select", "_local_scalar_dense", "is_nonzero", "new_empty"}
