"""A whole training step of a tiny model in generated CUDA code, interpreted on the CPU, beside the library's own."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

import slimfit_fx

from . import generate
from .interpret import execute
from .models import TINY, Inputs
from .simulate import argument_names, examples

Gradients = dict[str, Tensor | None]


def both(preset: str, closed: Collection[str] = (), batch: int = 2) -> tuple[Gradients, Gradients]:
    """(in generated code, in the library's interpreter of graphs): the gradients of the loss by parameter's name.

    None stands for that of a closed layer.

    Args:
        preset: of the library.
        closed: names of layers.
    """
    torch.manual_seed(0)
    model, inputs = TINY.build(batch, device="cpu")
    expected = _expected(model, inputs, preset, closed)
    meta, meta_inputs = TINY.build(batch)
    made = generate.slim(meta, meta_inputs, preset=preset, always_open=())
    (pair,) = made.pairs
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers()), **inputs}
    gated = [name for place, name in enumerate(pair.names) if pair.capture and place in pair.capture.gated]
    gates = torch.tensor([name not in closed for name in gated])
    arguments = [*(tensors[name].detach() for name in pair.names), gates]
    wanted = [int(name.rpartition("_")[2]) - 1 for name in argument_names(pair.forward.source)]
    results = execute(pair.forward.source, [arguments[place] for place in wanted])
    tangents = [torch.zeros_like(x, device="cpu") for x in examples(pair.backward.source, "tangents", "cpu")]
    tangents[0].fill_(1.0)  # the loss; the logits lead nowhere
    saved = results[len(results) - len(argument_names(pair.backward.source)) + len(tangents) :]
    found = execute(pair.backward.source, [*saved, *tangents])
    gradients = dict(zip(pair.names, found, strict=False))
    return {name: _or_none(gradients[name]) for name in expected}, expected


def _expected(model: nn.Module, inputs: Inputs, preset: str, closed: Collection[str]) -> Gradients:
    slimfit_fx.transform(model, preset=preset, mode="eager", always_open=())
    gates = slimfit_fx.gates(model)
    gates.set([name for name in gates if name not in closed])
    torch._dynamo.reset()
    model(**inputs).loss.backward()
    slimfit_fx.undo(model)
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def _or_none(gradient: Tensor | None) -> Tensor | None:
    return None if gradient is None or gradient.numel() == 0 else gradient
