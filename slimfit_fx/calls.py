"""What calls of a transformed model and of its regions do: training calls run compiled, all others as they did."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .errors import BackendError, ModelError
from .layers import check_sharding
from .regions import Region
from .session import Session, not_traced


def compile_calls(model: nn.Module, regions: Sequence[Region], session: Session) -> None:
    """Takes the calls of `model` and `regions` over, in the place where `nn.Module.compile` does it: no copy has it."""
    for region, compiled in zip(regions, session.compiled(regions), strict=True):
        region.module._compiled_call_impl = _region_call(region, compiled, model, session)
        session.compiled_modules.add(region.module)
    model._compiled_call_impl = _model_call(model, session)


def restore_calls(model: nn.Module, session: Session) -> None:
    """Undoes `compile_calls`."""
    for module in (model, *session.compiled_modules):
        module._compiled_call_impl = None


def _model_call(model: nn.Module, session: Session) -> Callable[..., Any]:
    """A call of the model: it begins a forward, in which regions run compiled. The model may be one itself.

    Trainer and accelerate may compile a model that is transformed already: their compiler has to leave it alone.
    """
    inner = model._compiled_call_impl or model._call_impl

    @not_traced
    def call(*args: Any, **kwargs: Any) -> Any:
        if not _trains(model):
            return model._call_impl(*args, **kwargs)
        if not session.captures:
            check_sharding(model)
        session.begin_forward()
        outputs = inner(*args, **kwargs)
        if not session.active:
            raise _gave_up("the model")
        return outputs

    return call


def _region_call(
    region: Region, compiled: Callable[..., Any], model: nn.Module, session: Session
) -> Callable[..., Any]:
    """A call of a region: `compiled` while `model` trains."""

    @not_traced
    def call(*args: Any, **kwargs: Any) -> Any:
        if not _trains(model):
            return region.module._call_impl(*args, **kwargs)
        if region.module is not model and torch._C._current_graph_task_id() != -1:
            raise ModelError(
                f"{region.path} is computed again in the backward by gradient checkpointing, which regions='blocks' "
                "does not see. Switch checkpointing off, or take regions='model'."
            )
        before = len(session.active)
        outputs = compiled(*args, **kwargs)
        if len(session.active) == before and _computed(outputs, (args, kwargs)):
            raise _gave_up(region.path or "the model")
        return outputs

    return call


def _gave_up(name: str) -> BackendError:
    return BackendError(
        f"{name} ran without its compiled graph, so nothing was saved. torch.compile gave up on it: usually its "
        "recompile limit was hit by inputs that change in more than size. Run with TORCH_LOGS=recompiles to see why, "
        "pad the inputs, or raise torch._dynamo.config.recompile_limit."
    )


def _trains(model: nn.Module) -> bool:
    return model.training and torch.is_grad_enabled()


def _computed(outputs: Any, inputs: Any) -> bool:
    """Whether there is a result to differentiate that is not an input: a skipped block hands its input on."""
    given = {id(leaf) for leaf in tree_leaves(inputs)}
    results = (leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor))
    return any(result.requires_grad and id(result) not in given for result in results)
