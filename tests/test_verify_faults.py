"""Which faults `slimfit_fx.verify` sees."""

from __future__ import annotations

import pytest
import torch
from word_classifier import Classifier, batch

import slimfit_fx


def spoiled(monkeypatch, change) -> slimfit_fx.Verification:
    """What is said when `change(gradients)` happens to what the compiled backward returns."""
    import slimfit_fx.compiler.backend

    def drop_closed(backward, capture):
        def run(arguments):
            return change(good(arguments), capture)

        good = untouched(backward, capture)
        vars(run)["_boxed_call"] = True
        return run

    untouched = slimfit_fx.compiler.backend._drop_closed
    monkeypatch.setattr(slimfit_fx.compiler.backend, "_drop_closed", drop_closed)
    torch.manual_seed(0)
    found = slimfit_fx.verify(Classifier(), batch(), mode="eager")
    assert not found.ok
    assert str(found).splitlines()[-1].startswith("NOT well (preset 'balanced', mode 'eager'): ")
    return found


def replaced(factor: float):
    """One weight's gradient times `factor`."""

    def change(gradients, capture):
        place = next(g.output for g in capture.plan.gradients if gradients[g.output] is not None)
        gradients[place] = gradients[place] * factor
        return gradients

    return change


@pytest.mark.parametrize("factor", [0.0, -1.0, 4000.0, 0.5, float("nan")])
def test_a_wrong_gradient_is_seen(monkeypatch, factor):
    found = spoiled(monkeypatch, replaced(factor))
    assert any("the gradient of embed.weight is off by" in fault for fault in found.faults)


def test_a_missing_gradient_is_seen(monkeypatch):
    found = spoiled(monkeypatch, lambda gradients, _: [None] * len(gradients))
    assert any("open layers have no gradient" in fault for fault in found.faults)


def test_a_gradient_of_a_closed_layer_is_seen(monkeypatch):
    def change(gradients, capture):
        for gradient in capture.plan.gradients:
            if gradients[gradient.output] is None:
                gradients[gradient.output] = torch.zeros(11, 16) if gradient.gate == 0 else None
        return gradients

    found = spoiled(monkeypatch, change)
    assert "closed layers have gradients (embed.weight)" in found.faults


def test_a_wrong_forward_and_wrong_bytes_are_seen(monkeypatch):
    import slimfit_fx.inspection.runs

    torch.manual_seed(0)
    model = Classifier()
    call = slimfit_fx.inspection.runs.Watched._run
    monkeypatch.setattr(
        slimfit_fx.inspection.runs.Watched,
        "_run",
        lambda self, *a: [x * (1 + 1e-6) if x.dim() else x for x in call(self, *a)],
    )
    monkeypatch.setattr(slimfit_fx.inspection.runs, "handed_over", lambda *_: 1)
    found = slimfit_fx.verify(model, batch(), mode="eager")
    assert any("the outputs with all gates open are" in fault for fault in found.faults)
    assert any("1 bytes are handed to the backward, the report says" in fault for fault in found.faults)
