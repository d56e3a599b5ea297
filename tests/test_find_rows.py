"""Which elements of a saved tensor share a group: those of one row, whatever views made of the tensor."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers import transformed
from torch import Tensor, nn

from slimfit_fx.analysis.find_rows import Rows, find_rows
from slimfit_fx.runtime.registry import session_of


class Net(nn.Module):
    def __init__(self, function: Callable[..., Tensor], *layers: nn.Module):
        super().__init__()
        self.layers, self.function = nn.ModuleList(layers), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.layers)


def one_after_the_other(x: Tensor, first: nn.Module, second: nn.Module) -> Tensor:
    return second(first(x))


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (2, 8)).transpose(1, 2)


def attention(x: Tensor, *projections: nn.Module) -> Tensor:
    return F.scaled_dot_product_attention(*(heads(projection(x)) for projection in projections))


def packed(x: Tensor, projection: nn.Module) -> Tensor:
    return F.scaled_dot_product_attention(*map(heads, projection(x).chunk(3, -1)))


CONV2D, CONV1D, LINEAR = nn.Conv2d(3, 8, 1), nn.Conv1d(3, 8, 1), nn.Linear(16, 16)
IMAGES, SEQUENCES, SIGNALS = torch.randn(2, 3, 5, 6), torch.randn(2, 4, 16), torch.randn(2, 3, 7)


@pytest.mark.parametrize(
    ("role", "model", "x", "expected"),
    [
        # a token
        ("norm input", Net(one_after_the_other, LINEAR, nn.LayerNorm(16)), SEQUENCES, {(8, 16)}),
        # a head of a token
        (
            "norm input",
            Net(lambda x, a, b: b(a(x).unflatten(-1, (2, 8))), LINEAR, nn.RMSNorm(8)),
            SEQUENCES,
            {(8, 2, 8)},
        ),
        # a pixel, whose channels lie apart
        (
            "norm input",
            Net(lambda x, a, b: b(a(x).permute(0, 2, 3, 1)), CONV2D, nn.LayerNorm(8)),
            IMAGES,
            {(2, 5, 6, 8)},
        ),
        # a channel
        ("norm input", Net(one_after_the_other, CONV2D, nn.GroupNorm(2, 8)), IMAGES, {(2, 8, 30)}),
        ("norm input", Net(one_after_the_other, CONV1D, nn.BatchNorm1d(8)), SIGNALS, {(2, 8, 7)}),
        ("norm input", Net(one_after_the_other, nn.Linear(3, 8), nn.BatchNorm1d(8)), torch.randn(6, 3), {(6, 8)}),
        ("convolution input", Net(one_after_the_other, CONV2D, nn.Conv2d(8, 4, 1)), IMAGES, {(2, 8, 30)}),
        ("convolution input", Net(one_after_the_other, CONV1D, nn.Conv1d(8, 4, 1)), SIGNALS, {(2, 8, 7)}),
        # all heads of a token in query, key and value; a head in the result, which the kernel makes by heads
        ("attention operand", Net(attention, *[LINEAR] * 3), SEQUENCES, {(2, 4, 16), (2, 4, 2, 8)}),
        ("attention operand", Net(packed, nn.Linear(16, 48)), SEQUENCES, {(2, 4, 16), (2, 4, 2, 8)}),
        ("activation input", Net(lambda x, a, b: b(F.gelu(a(x))), LINEAR, nn.Linear(16, 4)), SEQUENCES, {(8, 16)}),
    ],
)
def test_a_row_is_what_is_scaled_by_itself(role, model, x, expected):
    slim = transformed(model.train(), always_open=())
    slim(x)
    capture = session_of(slim).captures[-1]
    found = set()
    for produced, taken in capture.split.saved():
        row = capture.plan.find(taken.name)
        if row is not None and row.role == role:
            sizes = tuple(produced.meta["val"].shape)
            found.add(tuple(find_rows(produced, taken, role).shape(sizes)))
    assert found == expected


@pytest.mark.parametrize(
    ("rows", "sizes", "expected"),
    [
        (Rows((0, 1, 2), 16), (2, 4, 16), [2, 4, 16]),
        (Rows((0, 1, 2), 8), (2, 4, 16), [2, 4, 2, 8]),
        (Rows((0, 2, 1, 3), 16), (2, 2, 4, 8), [2, 4, 16]),
        (Rows((0, 1, 2), 128), (2, 4, 16), [128]),
        (Rows((), 1), (), []),
    ],
)
def test_dimensions_that_a_row_does_not_reach_stay(rows, sizes, expected):
    assert rows.shape(sizes) == expected


def test_a_tensor_without_elements_has_no_rows():
    assert Rows((0, 1), 0).shape((3, 0)) == [3, 0]
