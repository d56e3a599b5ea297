"""What calls of a transformed model and of its regions do: training calls run compiled, all others as they did."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slimfit_fx.compiler.dynamo import not_traced
from slimfit_fx.errors import ModelError
from slimfit_fx.model.fsdp import is_unit
from slimfit_fx.model.regions import Region, check_places, places_of
from slimfit_fx.torch_internals import current_graph_task_id, tree_leaves

from .session import Session


def compile_calls(model: nn.Module, regions: Sequence[Region], session: Session) -> None:
    """Takes the calls of `model` and `regions` over, in the place where `nn.Module.compile` does it: no copy has it."""
    for region, compiled in zip(regions, session.compiled(regions), strict=True):
        _put(region.module, _region_call(region, compiled, model, session), session)
    _put(model, _model_call(model, regions, session), session)


def restore_calls(model: nn.Module, session: Session) -> None:
    """Undoes `compile_calls`."""
    for module in list(session.calls):
        module._compiled_call_impl = None


def _put(module: nn.Module, call: Callable[..., Any], session: Session) -> None:
    module._compiled_call_impl = call
    session.calls[module] = weakref.ref(call)


def _model_call(model: nn.Module, regions: Sequence[Region], session: Session) -> Callable[..., Any]:
    """A call of the model: it begins a forward, in which regions run compiled. The model may be one itself.

    Trainer and accelerate may compile a model that is transformed already: their compiler has to leave it alone.
    """
    inner = model._compiled_call_impl or model._call_impl
    places = places_of(model, regions)

    @not_traced
    def call(*args: Any, **kwargs: Any) -> Any:
        if not _trains(model):
            return model._call_impl(*args, **kwargs)
        check_places(places)
        with session.forward():
            return inner(*args, **kwargs)

    return call


def _region_call(
    region: Region, compiled: Callable[..., Any], model: nn.Module, session: Session
) -> Callable[..., Any]:
    """A call of a region: `compiled` while `model` trains."""
    if is_unit(region.module):
        compiled = _inside_hooks(region.module, compiled)

    @not_traced
    def call(*args: Any, **kwargs: Any) -> Any:
        if not _trains(model):
            return region.module._call_impl(*args, **kwargs)
        if region.module is not model and current_graph_task_id() != -1:
            raise ModelError(
                f"{region.path} is computed again in the backward by gradient checkpointing, which regions='blocks' "
                "does not see. Switch checkpointing off, or take regions='model'."
            )
        before = session.graph_calls
        outputs = compiled(*args, **kwargs)
        if session.graph_calls == before and _computed(outputs, (args, kwargs)):
            session.region_left_out(region.path)
        return outputs

    return call


def _inside_hooks(module: nn.Module, compiled: Callable[..., Any]) -> Callable[..., Any]:
    """A call of `module` that runs its hooks as they are, and `compiled` in the place of its forward.

    FSDP2 gathers parameters in hooks: a graph has to get them as inputs.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        present = vars(module)
        own = {"forward": present["forward"]} if "forward" in present else {}  # as accelerate sets one

        def restore() -> None:
            present.pop("forward", None)
            present.update(own)

        def forward(*args: Any, **kwargs: Any) -> Any:
            restore()  # it is what the compiler shall see
            return compiled(*args, **kwargs)

        present["forward"] = forward
        try:
            return module._call_impl(*args, **kwargs)
        finally:
            restore()

    return call


def _trains(model: nn.Module) -> bool:
    return model.training and torch.is_grad_enabled()


def _computed(outputs: Any, inputs: Any) -> bool:
    """Whether there is a result to differentiate that is not an input: a skipped block hands its input on."""
    given = {id(leaf) for leaf in tree_leaves(inputs)}
    results = (leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor))
    return any(result.requires_grad and id(result) not in given for result in results)
