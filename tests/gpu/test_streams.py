"""Training in a stream of the user's, and on a device that is not the current one."""

from __future__ import annotations

import warnings

import pytest
import torch
from device_runs import model_on, moved, relative, slim, train

import slimfit_fx
from slimfit_fx.runtime.registry import session_of


def trained(device: torch.device, streams: list[torch.cuda.Stream]) -> tuple[torch.Tensor, list[list[str]]]:
    """The losses of twelve steps, each in the next of `streams`, and which layers were open."""
    model, inputs = model_on(device)
    ours = slim(model, preset="balanced", freeze_rate=0.6, closed_state="host", closed_state_after=1)
    optimizer = torch.optim.AdamW(ours.parameters(), fused=True)
    gates, losses, opened = slimfit_fx.gates(ours), [], []
    before = torch.cuda.current_stream(device)
    for step in range(12):
        stream = streams[step % len(streams)]
        stream.wait_stream(before)
        with torch.cuda.stream(stream):
            losses += train(ours, optimizer, inputs, 1)
        opened.append(gates.open)
        before = stream
    torch.cuda.synchronize(device)
    assert not session_of(ours).outside_layers
    return torch.stack(losses), opened


def test_a_step_in_another_stream_is_the_same(cuda):
    """By itself, and in turn with the default stream; torch warns of no streams that wait for each other."""
    default = torch.cuda.default_stream(cuda)
    expected, layers = trained(cuda, [default])
    side = torch.cuda.Stream(cuda)
    for streams in ([side], [default, side], [default, default, side, side]):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*AccumulateGrad.*stream.*")
            losses, opened = trained(cuda, streams)
        assert losses.isfinite().all()
        # later on, rounding in atomic sums may have changed the order of scores
        assert relative(losses[:4], expected[:4]) < 1e-4
        assert opened[:2] == layers[:2]


def test_a_device_that_is_not_the_current_one(cuda):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    other = torch.device("cuda", (cuda.index + 1) % torch.cuda.device_count())
    model, inputs = model_on(cuda)
    ours = slim(model.to(other), preset="balanced", freeze_rate=0.6, closed_state="host", closed_state_after=1)
    optimizer = torch.optim.AdamW(ours.parameters(), fused=True)
    losses = list(train(ours, optimizer, moved(inputs, other), 8))
    assert torch.stack(losses).isfinite().all()
    measured = slimfit_fx.scheduler(ours)._measuring.read()
    assert measured and all(0 < value < 1 for value in measured.values())
