"""Generated CUDA code, interpreted on the CPU, beside what the library computes there: codecs, and a training step."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn

import slimfit_fx
from slimfit_fx.codecs import BitMask, Codec, FixedPoint, Float8, Quantize, TopK, TopOfBlock, layout

from . import generate
from .generate import Pair
from .interpret import execute, function_source
from .models import TINY, Inputs
from .simulate import argument_names, examples

CODECS: Sequence[Codec] = (
    Quantize(8),
    Quantize(8, group=64, symmetric=False),
    Quantize(4, group=64),
    Quantize(2),
    Quantize(8, stochastic=True),
    FixedPoint(8, 1 / 16, -8.0),
    FixedPoint(4, 1.26 / 15, -0.13),
    Float8("e4m3"),
    Float8("e5m2"),
    TopK(0.1),
    TopOfBlock(8),
    BitMask(),
)
_SHAPES = ((3, 2, 96), (2, 137))  # rows of one group, and rows that no group, block or byte divides
Gradients = dict[str, Tensor | None]
Run = Callable[[list[Any]], list[Any]]


def codecs() -> Iterator[dict[str, Any]]:
    """For each codec, shape and dtype, whether generated code encodes and decodes as eager mode does, to the bit."""
    for codec in CODECS:
        for shape in _SHAPES:
            for dtype in (torch.float32, torch.bfloat16):
                x = _example(shape, dtype)
                x = x > 0 if isinstance(codec, BitMask) else x
                yield {"codec": repr(codec), "shape": shape, "dtype": str(x.dtype)} | _compared(codec, x)


def _compared(codec: Codec, x: Tensor) -> dict[str, bool]:
    def encode(x: Tensor) -> list[Tensor]:
        return list(codec.encode(x))

    def decode(*parts: Tensor) -> list[Tensor]:
        return [codec.decode(parts, x.shape, x.dtype)]

    with mock.patch.object(layout, "joins_neighbours", lambda _: True):  # as on a GPU
        parts = encode(x)
        found = execute(function_source(encode, [x]), [x])
        decoded = execute(function_source(decode, parts), parts)
        return {"encode": all(map(_same, found, parts)), "decode": all(map(_same, decoded, decode(*parts)))}


def _example(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Random numbers with a NaN, an infinity, and a last row of zeros."""
    x = torch.randn(math.prod(shape), generator=torch.Generator().manual_seed(0))
    x[3], x[50], x[-shape[-1] :] = float("nan"), float("inf"), 0.0
    return x.reshape(tuple(shape)).to(dtype)


def _same(a: Tensor, b: Tensor) -> bool:
    """The same shape, dtype and bits, any NaN for any other."""
    alike = a.shape == b.shape and a.dtype == b.dtype
    return alike and torch.equal(torch.nan_to_num(a.double(), nan=-7e77), torch.nan_to_num(b.double(), nan=-7e77))


def step(preset: str) -> Iterator[dict[str, Any]]:
    """For each parameter, with every other layer closed, the relative distance of its two gradients; see `both`."""
    names = [name for name, x in TINY.build(1)[0].named_parameters() if x.dim() > 1]
    found, expected = both(preset, names[::2])
    for name, wanted in expected.items():
        gradient = found[name]
        if gradient is None or wanted is None:
            yield {"name": name, "closed": name in names[::2], "both_none": gradient is None and wanted is None}
            continue
        norm = float(wanted.norm())
        yield {"name": name, "closed": False, "norm": norm, "distance": float((gradient - wanted).norm()) / norm}


def both(preset: str, closed: Collection[str] = (), batch: int = 2) -> tuple[Gradients, Gradients]:
    """The gradients of the loss by parameter's name: from generated code, and from operators of the CPU.

    With `exact` the CPU runs the library itself. Other presets choose codecs by what there is to save, which Inductor
    makes other choices about for a GPU: there the CPU runs the graphs that the code was generated from.

    Args:
        preset: of the library.
        closed: names of layers; their gradients are None.
    """
    torch.manual_seed(0)
    model, inputs = TINY.build(batch, device="cpu")
    (pair,) = generate.slim(*TINY.build(batch), preset=preset, always_open=()).pairs
    assert pair.capture is not None and pair.capture.split is not None
    split = pair.capture.split
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers()), **inputs}
    gates = torch.tensor([pair.names[place] not in closed for place in pair.capture.gated])
    arguments = [*(tensors[name].detach() for name in pair.names), gates]
    found = _step(pair, arguments, partial(execute, pair.forward.source), partial(execute, pair.backward.source))
    if preset == "exact":
        return found, _library(model, inputs, closed)
    return found, _step(pair, arguments, _on_cpu(split.forward), _on_cpu(split.backward))


def _step(pair: Pair, arguments: Sequence[Tensor], forward: Run, backward: Run) -> Gradients:
    taken = [int(name.rpartition("_")[2]) - 1 for name in argument_names(pair.forward.source)]
    results = forward([arguments[place] for place in taken])
    tangents = [torch.zeros_like(x, device="cpu") for x in examples(pair.backward.source, "tangents", "cpu")]
    tangents[0].fill_(1.0)  # the loss; the logits lead nowhere
    saved = results[len(results) - len(argument_names(pair.backward.source)) + len(tangents) :]
    gradients = dict(zip(pair.names, backward([*saved, *tangents]), strict=False))
    return {name: _or_none(gradients[name]) for name in pair.names if gradients[name] is not None}


def _on_cpu(module: fx.GraphModule) -> Run:
    """Runs a graph for CUDA operator by operator on CPU tensors."""
    module = copy.deepcopy(module)
    for node in module.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": torch.device("cpu")}
    module.recompile()
    return lambda inputs: list(module(*inputs))


def _library(model: nn.Module, inputs: Inputs, closed: Collection[str]) -> Gradients:
    slimfit_fx.transform(model, preset="exact", mode="eager", always_open=())
    gates = slimfit_fx.gates(model)
    gates.set([name for name in gates if name not in closed])
    torch._dynamo.reset()
    model(**inputs).loss.backward()
    slimfit_fx.undo(model)
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def _or_none(gradient: Tensor | None) -> Tensor | None:
    return None if gradient is None or gradient.numel() == 0 else gradient
