"""What the tests on a device share: models there, steps of them, and how their gradients are held against others."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from awkward_models import MODELS
from differential import Gradients, compared
from helpers import gated_parameters, gradients, loss_of, transformed
from torch import Tensor, nn

import slimfit_fx
from slimfit_fx.inspection.gradient_difference import TOLERANCES, rounding

Inputs = dict[str, Any]
# Widths and lengths that divide nothing: BERT with dropout, a ViT whose query, key and value are one layer, a Llama.
NAMES = ("bert with dropout", "timm vit", "llama")


def model_on(device: torch.device, name: str = "bert with dropout") -> tuple[nn.Module, Inputs]:
    """The model in training mode, and a batch."""
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    return model.to(device).train(), moved(inputs(), device)


def moved(inputs: Inputs, device: torch.device) -> Inputs:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}


def slim(model: nn.Module, **config: Any) -> nn.Module:
    """A transformed copy that is compiled by Inductor."""
    return transformed(model, mode="inductor", **config)


def autocast(device: torch.device, dtype: torch.dtype) -> Any:
    """No autocast for float32."""
    return contextlib.nullcontext() if dtype is torch.float32 else torch.autocast(device.type, dtype)


def one_step(model: nn.Module, inputs: Inputs, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Gradients]:
    """The loss of one batch, and its gradients."""
    device = next(model.parameters()).device
    model.zero_grad()
    torch.manual_seed(1)
    with autocast(device, dtype):
        loss = loss_of(model(**inputs))
    loss.backward()
    return loss.detach(), gradients(model)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Inputs, steps: int, dtype: torch.dtype = torch.float32
) -> Iterator[Tensor]:
    """Trains on one batch; yields each loss when its gradients are taken away."""
    device = next(model.parameters()).device
    for step in range(steps):
        torch.manual_seed(step)
        with autocast(device, dtype):
            loss = loss_of(model(**inputs))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss.detach()


def faults(model: nn.Module, found: Gradients, expected: Gradients, preset: str, dtype: torch.dtype) -> list[str]:
    """What is wrong with the gradients of a transformed model, beside those of the model without the passes.

    A key's bias is zero by symmetry: what is left of it is rounding.
    """
    gates, layer_of = slimfit_fx.gates(model), gated_parameters(model)
    wanted = {name: None if layer_of.get(name) in gates.closed else g for name, g in expected.items()}
    exact = {n: torch.zeros_like(g) if g is not None and n.endswith("key.bias") else g for n, g in wanted.items()}
    each, whole = (x + rounding(dtype) for x in (TOLERANCES[preset].each, TOLERANCES[preset].whole))
    return compared(preset, found, wanted, exact, each, whole)


def relative(found: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """The largest relative error of a tensor by its norm."""
    pairs = zip(found, expected, strict=True)
    return max(((f.double() - e.double()).norm() / e.double().norm().clamp(min=1e-30)).item() for f, e in pairs)
