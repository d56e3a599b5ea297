"""Optimizer states of closed layers, and of all of them in the report."""

from __future__ import annotations

import torch
from training_loops import adamw, batches, net, plain_loop, transformed

import slimfit_fx
from slimfit_fx.runtime.registry import session_of
from slimfit_fx.runtime.session import Session


def test_states_of_closed_layers_are_dropped():
    slim = transformed(net(8), freeze_rate=0.75, policy="random", closed_state="none", closed_state_after=3)
    optimizer = adamw(slim.parameters())
    session = session_of(slim)
    assert isinstance(session, Session)
    for x in batches(30):
        optimizer.zero_grad()
        slim(x).square().sum().backward()
        optimizer.step()
        missed = session.scheduler._state.missed
        open_now = slimfit_fx.gates(slim).table.tolist()
        for layer, name in enumerate(slimfit_fx.gates(slim).names):
            has_state = bool(optimizer.state.get(slim.get_parameter(name)))
            assert not has_state or open_now[layer] or missed[layer] + 1 < 3
    assert all(torch.isfinite(value).all() for value in slim.state_dict().values())


def test_states_on_the_host_change_nothing():
    """On a CPU the host is where they are; on a GPU this is the test of the copies."""
    device = torch.accelerator.current_accelerator() or "cpu"
    results = []
    for place in ("device", "host"):
        slim = transformed(net(8).to(device), freeze_rate=0.75, closed_state=place, closed_state_after=2)
        optimizer = adamw(slim.parameters())
        for x in batches(12):
            optimizer.zero_grad()
            slim(x.to(device)).square().sum().backward()
            optimizer.step()
        results.append(slim.state_dict())
        optimizer.load_state_dict(optimizer.state_dict())
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


def test_the_report_counts_optimizer_states():
    slim = transformed(net(4), freeze_rate=0.5)
    plain_loop(slim, steps=1)
    slim(batches(1)[0])
    assert "optimizer states" not in str(slimfit_fx.report(slim)), "no optimizer is alive"
    optimizer = adamw(slim.parameters())
    slim(batches(1)[0]).sum().backward()
    optimizer.step()
    report = slimfit_fx.report(slim)
    gated = sum(p.nbytes for p in slim.parameters() if p.grad is not None and p.dim() > 1)
    assert report.optimizer_bytes == (2 * gated, 0)
    assert "Optimizer states of layers: " in str(report)
