"""The error that codecs make in the gradients of a sample."""

from __future__ import annotations

import copy

import pytest
import torch
from transformer_block import block

import slimfit_fx
from slimfit_fx.errors import ModelError
from slimfit_fx.runtime.registry import session_of


def test_the_gradient_error_of_a_sample():
    slim, x = block(preset="tight")
    slim.zero_grad()
    state, before = torch.get_rng_state(), copy.deepcopy(slim.state_dict())
    report = slimfit_fx.report(slim, sample=x, loss=lambda outputs: outputs.square().mean())
    errors = report.gradient_errors
    assert set(errors) == {"all", *(name for name, _ in slim.named_parameters())}
    assert 0 < errors["all"].relative < 0.5
    assert errors["all"].cosine > 0.9
    assert "relative error" in str(report)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in slim.parameters())
    assert all(torch.equal(value, before[name]) for name, value in slim.state_dict().items())
    assert len(session_of(slim).captures) == 1
    with pytest.raises(ModelError, match="pass loss="):
        slimfit_fx.report(slim, sample=x)
