"""Runs a model four ways on one batch, and compares the runs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from slimfit_fx.config import Config
from slimfit_fx.model.regions import find_regions
from slimfit_fx.runtime.module_calls import compile_calls

from .comparison import Comparison, forward_rounding_of, rounding_of
from .plain import compile_plain
from .runs import Watched
from .runs import run as run_once
from .sample import plain_calls
from .verification import Verification


def compare(model: nn.Module, batch: Any, loss: Callable[[Any], Tensor] | None, options: Config) -> Verification:
    """What `verify` says of a plain model under `options`, which open all gates."""
    session = Watched(model, options)
    run = functools.partial(run_once, only_loss=options.outputs == "loss")
    regions = find_regions(model, options)
    try:
        with plain_calls(model):
            eager = run(model, batch, loss)
        with plain_calls(model):
            compile_plain(regions, options.mode, options.compile_options)
            plain = run(model, batch, loss)
        with plain_calls(model):
            compile_calls(model, regions, session)
            opened = run(model, batch, loss, session)
            closable = [index for index, layer in enumerate(session.layers) if not layer.always_open]
            closed = {session.gates.names[index] for index in closable[::2]}
            session.gates.set(set(session.gates.names) - closed)
            half = run(model, batch, loss, session)
    finally:
        session.close()
    comparison = Comparison(
        options.preset,
        rounding_of(model),
        forward_rounding_of(model, in_parts=bool(opened.plan.heads)),
        session.layers,
        closed,
        eager,
        plain,
        opened,
        half,
    )
    return comparison.verification(options.mode)
