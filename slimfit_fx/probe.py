"""Measures what codecs do to gradients: one sample with the model's codecs, and one without."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .config import Config
from .errors import ModelError
from .gradient_error import GradientError, gradient_errors
from .plan import Plan
from .regions import find_regions
from .session import Session


def probe(
    model: nn.Module, config: Config, sample: Any, loss: Callable[[Any], Tensor] | None = None
) -> dict[str, GradientError]:
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
    session = Session(model, config.replace(mode="eager", freeze_rate=0.0, regions="model"))
    with _untouched(model), torch.random.fork_rng(), torch.enable_grad():
        try:
            (run,) = session.compiled(find_regions(model, session.config))
            outputs = run(**sample) if isinstance(sample, Mapping) else run(sample)
            _scalar(outputs, loss).backward()
        finally:
            session.close()
        gradients = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    return gradients, session.plan


def _scalar(outputs: Any, loss: Callable[[Any], Tensor] | None) -> Tensor:
    value = loss(outputs) if loss is not None else getattr(outputs, "loss", outputs)
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise ModelError(
            "the sample gives no loss to differentiate: put labels into it, or pass loss=, a function that makes a "
            "scalar of the model's output"
        )
    return value


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Training mode and no gradients inside; afterwards gradients, buffers and modes are what they were."""
    gradients = {parameter: parameter.grad for parameter in model.parameters()}
    buffers = {buffer: buffer.clone() for buffer in model.buffers()}
    modes = {module: module.training for module in model.modules()}
    model.train()
    model.zero_grad()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        with torch.no_grad():
            for buffer, value in buffers.items():
                buffer.copy_(value)
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
