"""Many steps with changing gates: nothing is compiled again, and the host waits for no device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from device_runs import model_on, slim, train
from helpers import no_recompile
from torch import nn

import slimfit_fx
from slimfit_fx.policies import POLICIES
from slimfit_fx.runtime.registry import session_of

OPTIONS = [
    *({"policy": policy} for policy in POLICIES if policy != "static"),
    {"catch_up": 0.5, "decay_moments": True},
    {"closed_state": "host", "closed_state_after": 1},
    {"preset": "tight", "regions": "blocks"},
    {"preset": "paper"},
    {"memory_budget": "1GiB"},
]


def open_sets(model: nn.Module) -> set[tuple[str, ...]]:
    """The open layers that the steps had so far."""
    return {tuple(choice.open) for choice in slimfit_fx.scheduler(model).history}


@contextmanager
def no_waiting() -> Iterator[None]:
    """What makes the host wait for the GPU raises inside."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_thirty_steps_compile_nothing(device):
    model, inputs = model_on(device)
    ours = slim(model, preset="balanced", freeze_rate=0.7)
    optimizer = torch.optim.AdamW(ours.parameters(), fused=True)
    list(train(ours, optimizer, inputs, 2))
    with no_recompile():
        losses = torch.stack(list(train(ours, optimizer, inputs, 30)))
    assert losses.isfinite().all()
    assert len(open_sets(ours)) > 10
    assert len(session_of(ours).captures) == 1


def test_what_waits_is_found(cuda):
    with no_waiting(), pytest.raises(RuntimeError, match="synchroniz"):
        torch.ones(3, device=cuda).sum().item()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_no_step_waits(options, fused, cuda):
    """After the steps that compile, allocate and make optimizer states."""
    # between its blocks BERT's own code looks at the values of the mask
    model, inputs = model_on(cuda, "timm vit" if "regions" in options else "bert with dropout")
    rate = {} if "memory_budget" in options else {"freeze_rate": 0.5}
    ours = slim(model, **{"preset": "balanced", **rate, **options})
    optimizer = torch.optim.AdamW(ours.parameters(), fused=fused, foreach=not fused)
    list(train(ours, optimizer, inputs, 4))
    with no_waiting(), no_recompile():
        losses = list(train(ours, optimizer, inputs, 8))
    assert torch.stack(losses).isfinite().all()


def test_what_is_measured_arrives_in_pinned_memory(cuda):
    model, inputs = model_on(cuda)
    ours = slim(model, preset="balanced", freeze_rate=0.5)
    scheduler = slimfit_fx.scheduler(ours)
    list(train(ours, torch.optim.AdamW(ours.parameters(), fused=True), inputs, 3))
    measured = scheduler._measuring
    assert measured.parts and measured.arrived
    assert all(part.numerators.is_pinned() for part in measured.parts)
    values = measured.read()
    assert values and all(value > 0 for value in values.values())
    assert all(event.query() for event in measured.arrived)
