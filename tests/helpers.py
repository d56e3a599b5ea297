"""What several test files share: a reference backend, runs of a model, and the bytes that a forward hands over."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import slimfit_fx
from slimfit_fx import Config
from slimfit_fx.compiler import pipeline
from slimfit_fx.inspection.handed_over import handed_over as bytes_handed_over
from slimfit_fx.inspection.plain import interpreter
from slimfit_fx.model.regions import find_regions
from slimfit_fx.runtime.registry import session_of

FLOAT_ROLES = [role for role in slimfit_fx.ROLES if role not in ("dropout mask", "indices")]


def reference(model: nn.Module, mode: str = "eager", regions: str = "model") -> nn.Module:
    """A copy of `model` compiled by the same code generator, region by region, without the passes."""
    model = copy.deepcopy(model)
    backend = "inductor" if mode == "inductor" else interpreter()
    for region in find_regions(model, Config(regions=regions)):
        if region.module is model:
            model.compile(backend=backend)
        else:  # torch's own layers are compiled as a part of something only
            call = lambda *args, _module=region.module, **kwargs: _module._call_impl(*args, **kwargs)  # noqa: E731
            region.module._compiled_call_impl = torch.compile(call, backend=backend)
    return model


def transformed(model: nn.Module, **config: Any) -> nn.Module:
    """A transformed copy of `model`, in the interpreter mode and without codecs unless `config` says otherwise."""
    return slimfit_fx.transform(copy.deepcopy(model), **{"mode": "eager", "preset": "exact", **config})


def loss_of(outputs: Any) -> Tensor:
    """A scalar that depends on every float output."""
    parts = (
        t.float() * torch.linspace(0.5, 1.5, t.numel(), device=t.device).view(t.shape)
        for t in tensors(outputs)
        if t.requires_grad
    )
    return sum((part.sum() for part in parts), torch.zeros(()))


def tensors(outputs: Any) -> list[Tensor]:
    """The tensors in what a model returned, whatever container they are in."""
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]


def run(model: nn.Module, inputs: dict[str, Any], seed: int = 0) -> tuple[Any, dict[str, Any]]:
    """One forward and backward from `seed`: the outputs, and the gradients by parameter name."""
    model.zero_grad()
    torch.manual_seed(seed)
    outputs = model(**inputs)
    loss_of(outputs).backward()
    return outputs, gradients(model)


def gradients(model: nn.Module) -> dict[str, Any]:
    """The gradients by parameter name: a tensor or None."""
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def gated_parameters(model: nn.Module) -> dict[str, str]:
    """The layer of each gated parameter, by parameter name."""
    session = session_of(model)
    return {name: layer.name for layer in session.layers for name in layer.parameters}


def handed_over(outputs: Any, model: nn.Module, inputs: dict[str, Any]) -> int:
    """Bytes that the compiled forwards behind `outputs` keep for their backward, parameters and inputs left out."""
    given = [value for value in inputs.values() if isinstance(value, Tensor)]
    return bytes_handed_over(outputs, [*model.parameters(), *model.buffers(), *given])


@contextmanager
def given_to_regions(model: nn.Module) -> Iterator[list[Tensor]]:
    """The tensors without a gradient, masks and position tables, that the model hands to its regions inside."""
    found = []

    def spied(call):
        def spy(*args, **kwargs):
            found.extend(tensor for tensor in tensors((args, kwargs)) if tensor.is_leaf)
            return call(*args, **kwargs)

        return spy

    calls = {module: module._compiled_call_impl for module in session_of(model).calls}
    for module, call in calls.items():
        module._compiled_call_impl = spied(call)
    yield found
    for module, call in calls.items():
        module._compiled_call_impl = call


@contextmanager
def no_recompile() -> Iterator[None]:
    """Any recompile inside raises."""
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield


def count_calls(module: torch.fx.GraphModule, target: Callable[..., Any]) -> int:
    return sum(node.target is target for node in module.graph.nodes)


def replace_pass(monkeypatch: pytest.MonkeyPatch, name: str, function: Callable[..., Any]) -> None:
    """Runs another function in the place of a pass, under its name."""

    def replaced(*arguments: Any, **options: Any) -> Any:
        return function(*arguments, **options)

    replaced.__name__ = name
    passes = [dataclasses.replace(p, function=replaced) if p.name == name else p for p in pipeline.PIPELINE]
    monkeypatch.setattr(pipeline, "PIPELINE", passes)


def add_pass(monkeypatch: pytest.MonkeyPatch, function: Callable[..., Any]) -> None:
    """Runs one more pass on split graphs, behind the others."""
    monkeypatch.setattr(pipeline, "PIPELINE", [*pipeline.PIPELINE, pipeline.Pass(function, "split")])
