"""Measures what codecs do to gradients: one sample with the model's codecs, and one without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from slimfit_fx.config import Config
from slimfit_fx.graph.plan import Plan
from slimfit_fx.model.regions import find_regions
from slimfit_fx.runtime.session import Session

from .gradient_difference import GradientDifference, gradient_errors
from .sample import call, scalar_loss, untouched


def probe(
    model: nn.Module, config: Config, sample: Any, loss: Callable[[Any], Tensor] | None = None
) -> dict[str, GradientDifference]:
    """The error of each gradient under `config`'s codecs, by parameter name, and of all together as `"all"`.

    Both runs have all gates open and the same random state; the interpreter runs the whole model's graph.
    """
    exact, _ = sample_gradients(model, config.replace(preset="exact", codecs={}), sample, loss)
    found, _ = sample_gradients(model, config, sample, loss)
    return gradient_errors(found, exact)


def sample_gradients(
    model: nn.Module, config: Config, sample: Any, loss: Callable[[Any], Tensor] | None = None
) -> tuple[dict[str, Tensor], Plan]:
    """The gradients of one sample with all gates open, by parameter name, on the CPU; and what was saved for them.

    The interpreter runs the graphs. The model, its gradients and torch's random state stay as they are.
    """
    session = Session(model, config.replace(mode="eager", compile_options={}, freeze_rate=0.0, regions="model"))
    with untouched(model, sample), torch.enable_grad():
        try:
            (run,) = session.compiled(find_regions(model, session.config))
            scalar_loss(call(run, sample), loss).backward()
        finally:
            session.close()
        gradients = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    return gradients, session.plan
