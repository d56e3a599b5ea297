"""Losses and gradients on a device, against torch.compile without the passes on the same device."""

from __future__ import annotations

import pytest
import torch
from device_runs import NAMES, autocast, faults, model_on, one_step, relative, slim
from helpers import loss_of, no_recompile, reference

import slimfit_fx
from slimfit_fx.inspection.gradient_difference import rounding

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("preset", ["exact", "balanced"])
def test_gradients_are_those_of_torch_compile(preset, name, dtype, device):
    """At a freezing rate of 0.9, then with all gates open, in one graph; the same dropout masks."""
    model, inputs = model_on(device, name)
    expected_loss, expected = one_step(reference(model, "inductor"), inputs, dtype)
    ours = slim(model, preset=preset, freeze_rate=0.9)
    gates = slimfit_fx.gates(ours)

    loss, found = one_step(ours, inputs, dtype)
    assert len(gates.closed) > 0.7 * len(gates)
    assert relative([loss], [expected_loss]) <= rounding(dtype)
    assert not faults(ours, found, expected, preset, dtype)

    gates.set(gates.names)
    with no_recompile():
        loss, found = one_step(ours, inputs, dtype)
    assert relative([loss], [expected_loss]) <= rounding(dtype)
    assert not faults(ours, found, expected, preset, dtype)


@pytest.mark.parametrize(
    ("name", "preset", "dtype"), list(zip(NAMES, ["balanced", "tight", "exact"], [*DTYPES, torch.float32], strict=True))
)
def test_verify(name, preset, dtype, device):
    """Gradients, bytes and closed layers by the library's own call, which a user makes first on a new machine."""
    model, inputs = model_on(device, name)
    with autocast(device, dtype):
        found = slimfit_fx.verify(model, inputs, loss_of, preset=preset)
    assert found.ok, str(found)
    assert all(parameter.device == device for parameter in model.parameters())
