"""One sample through a model that stays as it is: the call, the loss, and what is put back afterwards."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slimfit_fx.errors import ModelError
from slimfit_fx.torch_internals import tree_leaves


def call(model: Callable[..., Any], sample: Any) -> Any:
    """`model` on `sample`: a mapping of keyword arguments, or what the model takes first."""
    return model(**sample) if isinstance(sample, Mapping) else model(sample)


def scalar_loss(outputs: Any, loss: Callable[[Any], Tensor] | None) -> Tensor:
    """`loss(outputs)`; without `loss`, the outputs' own.

    Raises:
        ModelError: there is none, it is no scalar, or nothing can be differentiated by it.
    """
    value = loss(outputs) if loss is not None else getattr(outputs, "loss", outputs)
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise ModelError(
            "the sample gives no loss to differentiate: put labels into it, or pass loss=, a function that makes a "
            "scalar of the model's output"
        )
    if not value.requires_grad:
        raise ModelError(
            "the sample's loss depends on no parameter that requires a gradient: loss= must keep the model's output "
            "attached, and the model must train something"
        )
    return value


def tensors(values: Any) -> list[Tensor]:
    """The tensors in `values`, in whatever container, mappings and data classes that torch does not know included."""
    found = []
    for leaf in tree_leaves(values):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif isinstance(leaf, Mapping):
            found += tensors(list(leaf.values()))
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            found += tensors(list(vars(leaf).values()))
    return found


def mapped(values: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`values` with each tensor replaced, in mappings, lists and tuples."""
    if isinstance(values, Tensor):
        return change(values)
    if isinstance(values, Mapping):
        return {key: mapped(value, change) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return type(values)(mapped(value, change) for value in values)
    return values


def random_state(model: nn.Module) -> list[Tensor]:
    """Of the generators on the CPU and on the model's devices."""
    kind, devices = _accelerators(model)
    module = getattr(torch, kind)
    return [torch.get_rng_state(), *(module.get_rng_state(device) for device in devices)]


@contextmanager
def random_state_kept(model: nn.Module) -> Iterator[None]:
    """What is drawn inside leaves no trace: in Python, on the CPU and on the model's devices."""
    python_state = random.getstate()
    kind, devices = _accelerators(model)
    try:
        with torch.random.fork_rng(devices, device_type=kind):
            yield
    finally:
        random.setstate(python_state)


@contextmanager
def untouched(model: nn.Module, sample: Any = None) -> Iterator[None]:
    """Training mode and no gradients inside.

    Afterwards gradients (the sample's too), buffers, modes and random states are what they were.
    """
    leaves: list[Any] = [*model.parameters(), *(tensor for tensor in tensors(sample) if tensor.is_leaf)]
    gradients = [leaf.grad for leaf in leaves]
    buffers = {module: dict(module._buffers) for module in model.modules() if module._buffers}
    values = {buffer: buffer.clone() for buffer in model.buffers()}
    modes = {module: module.training for module in model.modules()}
    if not model.training:
        model.train()
    for leaf in leaves:
        leaf.grad = None
    try:
        with random_state_kept(model):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for module, named in buffers.items():
            module._buffers.clear()
            module._buffers.update(named)
        with torch.no_grad():
            for buffer, value in values.items():
                if not torch.equal(buffer, value):  # a write would invalidate what the user's forward saved
                    buffer.copy_(value)
        for leaf, gradient in zip(leaves, gradients, strict=True):
            leaf.grad = gradient


@contextmanager
def plain_calls(model: nn.Module) -> Iterator[None]:
    """No module's call is a compiled one inside; afterwards those are that were."""
    name, modules = "_compiled_call_impl", list(model.modules())
    found = {module: vars(module)[name] for module in modules if name in vars(module)}
    for module in found:
        setattr(module, name, None)
    try:
        yield
    finally:
        for module in modules:
            if module in found:
                setattr(module, name, found[module])
            else:
                vars(module).pop(name, None)


def _accelerators(model: nn.Module) -> tuple[str, list[torch.device]]:
    """The kind and the devices that parameters are on, besides the CPU."""
    devices = sorted({p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")}, key=str)
    return (devices[0].type if devices else "cuda"), devices
