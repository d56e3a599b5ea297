"""The ways of fine-tuning that the table compares, each as a trace of one step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from slimfit_fx.model.layers import find_head
from slimfit_fx.torch_internals import inductor_config

from . import generate
from .capture import attention
from .machine import Machine, nbytes
from .models import Model
from .simulate import simulate
from .trace import Trace

FREEZE_RATE = 0.9
RANK = 8


@dataclass(frozen=True)
class Step:
    """Attributes:
    weights: bytes of all parameters.
    states: bytes of AdamW's two moments, of every parameter that trains at some time.
    """

    trace: Trace
    weights: int
    states: int


def eager(model: Model, batch: int, layers: int, bf16: bool) -> Step:
    """Operator by operator: what autograd saves stays, and every operator that is no view is a kernel."""
    module, inputs = model.build(batch, layers)
    with FakeTensorMode():
        _move(module)
        inputs = {name: torch.empty(x.shape, dtype=x.dtype, device="cuda") for name, x in inputs.items()}
        machine = Machine([], [*module.parameters(), *module.buffers(), *inputs.values()])
        with mock.patch.object(nn.functional, "scaled_dot_product_attention", attention), machine:
            with _precision(bf16):
                output = module(**inputs)
            forward, saved = machine.take(), machine.memory.look()
            loss = getattr(output, "loss", output)
            loss.backward(torch.empty_like(loss))
            backward = machine.take()
        gradients = sum(nbytes(p.grad) for p in module.parameters() if p.grad is not None)
        return _step(module, Trace(forward, backward, saved, gradients))


def compiled(model: Model, batch: int, layers: int, bf16: bool) -> Step:
    """torch.compile, all layers train."""
    return _plain(*model.build(batch, layers), bf16)


def joined(model: Model, batch: int, layers: int, bf16: bool) -> Step:
    """torch.compile with the option of Inductor's that this library sets on a GPU."""
    with inductor_config.patch(combo_kernels=True):
        return compiled(model, batch, layers, bf16)


def checkpointing(model: Model, batch: int, layers: int, bf16: bool) -> Step:
    """torch.compile, each block is computed again in the backward."""
    module, inputs = model.build(batch, layers)
    if isinstance(enable := getattr(module, "gradient_checkpointing_enable", None), Callable):
        enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # transformers
    else:
        module.set_grad_checkpointing(True)  # type: ignore[operator]  (timm)
    return _plain(module, inputs, bf16)


def lora(model: Model, batch: int, layers: int, bf16: bool) -> Step:
    """torch.compile, low-rank adapters on every linear layer, and the head trains."""
    from peft import LoraConfig, get_peft_model

    module, inputs = model.build(batch, layers)
    head = {name.rpartition(".")[0] for name in find_head(module, dict(module.named_parameters()))}
    linear = [name for name, part in module.named_modules() if isinstance(part, nn.Linear) and name not in head]
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=linear, modules_to_save=sorted(head))
    return _plain(get_peft_model(module, config), inputs, bf16)  # type: ignore[arg-type]


def slim(preset: str) -> Callable[[Model, int, int, bool], Step]:
    """This library with `preset`, all layers take turns."""

    def run(model: Model, batch: int, layers: int, bf16: bool) -> Step:
        module, inputs = model.build(batch, layers)
        made = generate.slim(module, inputs, bf16=bf16, preset=preset, freeze_rate=FREEZE_RATE)
        (pair,) = made.pairs
        return _step(module, simulate(pair, FREEZE_RATE))

    return run


METHODS: Mapping[str, Callable[[Model, int, int, bool], Step]] = {
    "eager": eager,
    "torch.compile": compiled,
    "combo_kernels": joined,
    "checkpointing": checkpointing,
    "LoRA": lora,
    "balanced": slim("balanced"),
    "tight": slim("tight"),
}


def _plain(module: nn.Module, inputs: dict[str, torch.Tensor], bf16: bool) -> Step:
    (pair,) = generate.plain(module, inputs, bf16=bf16).pairs
    return _step(module, simulate(pair))


def _step(module: nn.Module, trace: Trace) -> Step:
    parameters = list(module.parameters())
    weights = sum(map(nbytes, [*parameters, *module.buffers()]))
    return Step(trace, weights, 2 * sum(nbytes(p) for p in parameters if p.requires_grad))


@contextlib.contextmanager
def _precision(bf16: bool) -> Iterator[Any]:
    with torch.autocast("cuda", torch.bfloat16) if bf16 else contextlib.nullcontext():
        yield


def _move(module: nn.Module) -> None:
    """From the meta device to fake CUDA tensors, in the fake mode that is on."""
    moved: dict[torch.Tensor, torch.Tensor] = {}
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, x in tensors.items():
                if x is not None and x not in moved:
                    fake = torch.empty(x.shape, dtype=x.dtype, device="cuda")
                    moved[x] = nn.Parameter(fake, x.requires_grad) if isinstance(x, nn.Parameter) else fake
                if x is not None:
                    tensors[name] = moved[x]  # type: ignore[assignment]
