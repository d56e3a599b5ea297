"""A forward or backward that raises: the error is the one that it raised, and nothing is lost."""

from __future__ import annotations

import pytest
import torch
from helpers import no_recompile, run, transformed
from small_net import Net, X, check_gates

import slimfit_fx
from slimfit_fx.runtime.registry import session_of


class Stop(BaseException):
    """As KeyboardInterrupt, which pytest would take for itself."""


def raising(error: type[BaseException], compiled: bool):
    def fault(x):
        raise error("out of luck")

    return fault if compiled else torch.compiler.disable(fault)


@pytest.mark.parametrize("regions", ["model", "blocks"])
@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("when", ["first", "later"])
def test_a_batch_that_the_model_refuses(regions, broken, when):
    plain = Net(broken=broken)
    slim = transformed(plain, regions=regions)
    if when == "later":
        run(slim, {"x": X})
    for _ in range(3):
        with pytest.raises(ValueError, match="give x or y"):
            slim(X, X)
    check_gates(slim, plain)
    with pytest.raises(ValueError, match="give x or y"):
        slim(X, X)
    with no_recompile():
        check_gates(slim, plain)


@pytest.mark.parametrize("regions", ["model", "blocks"])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("error", [ValueError, torch.OutOfMemoryError, Stop])
def test_an_exception_in_the_middle_of_a_forward(regions, compiled, error):
    """Graphs ran before it: they belong to no forward, and the last whole one stays the last."""
    plain = Net(broken=not compiled)
    slim = transformed(plain, regions=regions)
    run(slim, {"x": X})
    report, active = slimfit_fx.report(slim), session_of(slim).active
    calm, slim.fault = slim.fault, raising(error, compiled)
    for _ in range(2):
        with pytest.raises(error, match="out of luck"):
            slim(X)
    assert session_of(slim).active == active
    assert slimfit_fx.report(slim).to_json() == report.to_json()
    slim.fault = calm
    check_gates(slim, plain)
    assert len(session_of(slim).active) == len(active)


@pytest.mark.parametrize("broken", [False, True])
def test_a_batch_of_a_wrong_width(broken):
    plain = Net(broken=broken)
    slim = transformed(plain)
    run(slim, {"x": X})
    with pytest.raises(RuntimeError):
        slim(torch.ones(4, 7))
    check_gates(slim, plain)


def test_an_exception_in_a_backward():
    plain = Net()
    slim = transformed(plain)
    x = X.clone().requires_grad_()

    def stop(_):
        raise ValueError("no backward today")

    handle = x.register_hook(stop)
    with pytest.raises(ValueError, match="no backward today"):
        slim(x).sum().backward()
    handle.remove()
    check_gates(slim, plain)


def test_a_budget_is_spent_by_the_last_whole_forward():
    slim = transformed(Net(broken=True), memory_budget="1MiB")
    slim(X).sum().backward()
    planned = slimfit_fx.scheduler(slim).plan
    assert planned.nbytes == slimfit_fx.report(slim).saved_bytes_before > 0
    slim.fault = raising(ValueError, compiled=False)
    with pytest.raises(ValueError):
        slim(X)
    session_of(slim).begin_forward()  # as the next call, which chooses the gates right then
    assert slimfit_fx.scheduler(slim).plan is planned
