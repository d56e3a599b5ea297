"""A language model's head and loss in parts: logits are neither saved nor whole, and gradients are what they were."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import handed_over, no_recompile, reference, transformed
from small_language import IDS, WIDTH, WORDS, Language, assert_close, gradients, in_parts
from torch import nn
from torch.library import opcheck

import slimfit_fx
from slimfit_fx.graph.head_ops import head_cross_entropy

# the operators


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_operators_are_cross_entropy(reduction):
    torch.manual_seed(0)
    for smoothing, weighted, cap, biased, ignored in itertools.product(
        (0.0, 0.1), (0, 1), (0.0, 3.0), (0, 1), (0, 1, 2)
    ):
        x = torch.randn(3, 37, WIDTH, requires_grad=True)
        weight = (torch.randn(WORDS, WIDTH) * 0.3).requires_grad_()
        bias = torch.randn(WORDS, requires_grad=True) if biased else None
        classes = torch.rand(WORDS) if weighted else None
        targets = torch.randint(0, WORDS, (3, 37))
        targets[:, :: (3, 3, 1)[ignored]] = -100 if ignored else 5
        logits = F.linear(x, weight, bias) * 0.7
        logits = cap * torch.tanh(logits) if cap else logits
        options: Any = dict(reduction=reduction, label_smoothing=smoothing)
        whole = F.cross_entropy(logits.view(-1, WORDS), targets.view(-1), classes, **options)
        parts = head_cross_entropy(
            x, weight, bias, targets, classes, -100, smoothing, 0.7, cap, torch.float32, torch.float32, reduction
        ).view(whole.shape)
        torch.testing.assert_close(parts, whole, rtol=3e-6, atol=1e-6, equal_nan=True)
        trained = [x, weight] if bias is None else [x, weight, bias]
        tangent = torch.randn_like(whole)
        expected, found = (torch.autograd.grad(loss, trained, tangent) for loss in (whole, parts))
        for e, f in zip(expected, found, strict=True):
            assert (f - e).norm() <= 3e-6 * e.norm(), (smoothing, weighted, cap, biased, ignored)


def test_fake_kernels_agree_with_the_kernels():
    x, weight, bias = torch.randn(9, 4), torch.randn(30, 4), torch.randn(30)
    targets, options = torch.randint(0, 30, (9,)), (None, -100, 0.1, 1.0, 0.0, torch.float32)
    tests, ops = ("test_schema", "test_faketensor"), torch.ops.slimfit_fx
    opcheck(ops.token_losses.default, (x, weight, bias, targets, *options, True), test_utils=tests)
    _, sums, _ = ops.token_losses(x, weight, bias, targets, *options, True)
    gates = torch.tensor([True, False])
    for gate in (0, 1):
        arguments = (x, weight, bias, targets, *options, sums, torch.ones(9), True, True, gates, gate)
        opcheck(ops.head_gradients.default, arguments, test_utils=tests)
        opcheck(ops.sum_if_open.default, (x, x, gates, gate), test_utils=tests)


def test_a_closed_head_costs_no_product():
    x, weight = torch.randn(9, 4), torch.randn(30, 4)
    options = (torch.zeros(9, dtype=torch.int64), None, -100, 0.0, 1.0, 0.0, torch.float32)
    closed, gate = torch.tensor([False]), 0
    gradient, _ = torch.ops.slimfit_fx.head_gradients(
        x[:0], weight, None, *options, torch.zeros(9), torch.ones(9), True, False, closed, gate
    )  # it has no rows of x to multiply
    assert gradient.shape == (0, 4)


# what is found, and what is not


FORMS = {
    "plain": {},
    "bias": {"bias": True},
    "soft cap": {"cap": 3.0},
    "scale": {"scale": 0.3},
    "padded labels": {"pad": True, "ignore_index": 7},
    "sum": {"reduction": "sum"},
    "each": {"reduction": "none"},
    "ignored": {"ignore_index": int(IDS[0, 1])},
    "smoothed": {"label_smoothing": 0.1},
    "tied": {"tied": True},
    "tied, all of it": {"tied": True, "bias": True, "cap": 4.0, "label_smoothing": 0.2, "pad": True},
}


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_the_whole(form):
    model = Language(**FORMS[form])
    slim = transformed(model, freeze_rate=0)
    assert_close(gradients(slim), gradients(model))
    assert in_parts(slim)


def test_no_token_counts():
    model = Language()
    labels = torch.full_like(IDS, -100)
    slim = transformed(model, freeze_rate=0)
    (loss, found), (_, expected) = (gradients(m, ids=IDS, labels=labels) for m in (slim, model))
    assert loss.isnan() and in_parts(slim)
    assert found.keys() == expected.keys() and not any(g.any() for g in found.values())


@pytest.mark.parametrize("answer", ["accuracy", "tuple", "dict"])
def test_logits_that_are_read_elsewhere_stay_whole(answer):
    model = Language(answer=answer)
    slim = transformed(model, freeze_rate=0)
    assert_close(gradients(slim), gradients(model))
    assert not in_parts(slim)
    assert ("outputs" in str(slimfit_fx.report(slim))) == (answer != "accuracy")


def test_it_can_be_switched_off():
    model = Language()
    slim = transformed(model, freeze_rate=0, disable_passes="chunk_loss")
    assert torch.equal(gradients(slim)[0], gradients(reference(model))[0])
    assert not in_parts(slim)


def test_a_small_head_stays_as_it_is():
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(16, 16), nn.Linear(16, 32)

        def forward(self, x, labels):
            return F.cross_entropy(self.head(self.body(x).relu()), labels)

    slim = transformed(Classifier(), freeze_rate=0)
    gradients(slim, x=torch.randn(9, 16), labels=torch.arange(9))
    assert not slimfit_fx.report(slim).plan.heads


# gates


def close(model: nn.Module, *closed: str) -> None:
    table = slimfit_fx.gates(model)
    table.set([name for name in table.names if name not in closed])


@pytest.mark.parametrize(
    ("mode", "tied"), [("eager", False), ("eager", True), pytest.param("inductor", True, marks=pytest.mark.inductor)]
)
def test_a_closed_head_has_no_gradient_and_nothing_is_compiled_again(mode, tied):
    model = Language(tied=tied)
    exact = gradients(model)
    slim = transformed(model, mode=mode, freeze_rate=0, always_open=())
    head = "words.weight" if tied else "head.weight"
    assert_close(gradients(slim), exact)
    opened = slimfit_fx.report(slim).saved_bytes_after
    with no_recompile():
        for _ in range(2):
            close(slim, head)
            loss, found = gradients(slim)
            assert_close((loss, found), (exact[0], {n: g for n, g in exact[1].items() if n != head}))
            gradients(slim)
            slimfit_fx.gates(slim).set(slimfit_fx.gates(slim).names)
            assert_close(gradients(slim), exact)
    close(slim, head)
    assert slimfit_fx.report(slim).saved_bytes_after <= opened
    assert not any(g.gate == slimfit_fx.gates(slim).names.index(head) and not g.conditional
                   for g in slimfit_fx.report(slim).plan.gradients)  # fmt: skip


def test_the_head_s_input_is_saved_exactly_and_only_if_the_head_is_open():
    model = Language()
    slim = transformed(model, preset="balanced", freeze_rate=0, always_open=())
    exact = gradients(model)[1]["head.weight"]
    found = gradients(slim)[1]["head.weight"]
    assert (found - exact).norm() < 2e-6 * exact.norm()  # codes would change logits, and those go through exp
    (row,) = (row for row in slimfit_fx.report(slim).rows if row["layers"] == ["head.weight"])
    assert (row["kind"], row["stored_as"]) == ("dynamic", "")
    close(slim, "head.weight")
    gradients(slim)
    (row,) = (row for row in slimfit_fx.report(slim).rows if row["layers"] == ["head.weight"])
    assert row["bytes_now"] == 0
    outputs = slim(ids=IDS, labels=IDS)
    assert handed_over(outputs, slim, {"ids": IDS}) == slimfit_fx.report(slim).saved_bytes_after


def test_a_backward_uses_the_gates_of_its_forward():
    model = Language()
    exact = gradients(model)[1]
    slim = transformed(model, freeze_rate=0, always_open=())
    losses = []
    for closed in ((), ("head.weight",)):
        close(slim, *closed)
        losses.append(slim(IDS, IDS))
    (0.5 * sum(losses)).backward()  # as in `gradients`
    for name, parameter in slim.named_parameters():
        times = 1 if name == "head.weight" else 2
        torch.testing.assert_close(parameter.grad, times * exact[name], rtol=1e-4, atol=1e-7)
