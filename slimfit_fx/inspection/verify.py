"""One call that compares a model's compiled training call with the untransformed model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from typing_extensions import Unpack

from slimfit_fx.config import Config
from slimfit_fx.config_options import ConfigOptions
from slimfit_fx.errors import StateError
from slimfit_fx.runtime.registry import original, session_of

from .verification import Verification


def verify(
    model: nn.Module,
    batch: Any,
    loss: Callable[[Any], Tensor] | None = None,
    config: Config | None = None,
    **overrides: Unpack[ConfigOptions],
) -> Verification:
    """Whether training this model with slimfit_fx does what training it without does; print the answer.

    Four forwards and backwards of `batch`, all from the same random state, under the autocast of the moment: the model
    run by eager PyTorch; compiled as it is; compiled with slimfit_fx, all gates open; and with every second layer
    closed. Compared are outputs (to the last bit with the compiled model in float32 on a CPU; up to rounding in
    bfloat16 and float16, where fused kernels keep more bits than they store, on a GPU, where sums may be divided
    otherwise, where a loss is made in parts, and with eager PyTorch; with `outputs="loss"` the loss alone), each
    gradient (with the compiled model's: the same dropout masks), that closed layers have none, and the bytes that
    are really handed to the backward with those of the report. How far gradients may be off is stated per preset in
    `slimfit_fx.inspection.gradient_difference.TOLERANCES`; rounding comes on top. A gradient whose norm is less
    than 1e-4 of that of all together is not judged: a key's bias in attention, say, is zero by symmetry, and what
    is left of it is rounding.

    The model, its gradients, buffers, gates, scheduler and compiled graphs, and the random state stay as they are.
    With `mode="inductor"` it compiles twice, which takes about as long as twice the first training step. Under
    torch.distributed every rank should call it.

    Example:
        >>> print(slimfit_fx.verify(model, batch))
        >>> assert slimfit_fx.verify(model, batch, preset="tight").ok

    Args:
        model: transformed, or not yet: then `config` and `overrides` say how it would be.
        batch: a mapping of keyword arguments, or what the model takes first.
        loss: makes a scalar of the model's output; by default its `.loss`, or the output itself if it is a scalar.
        config: other options than those that the model was transformed with; `overrides` are its fields.

    Raises:
        ModelError: the batch gives no loss, or nothing in the model can be frozen.
        ConfigError: as `transform`.
        StateError: a part of the model is transformed, not the model; or it is compiled, but not yet by slimfit_fx.
    """
    options = _options(model, config, overrides)
    from .compare import compare  # with Dynamo and Inductor: `import slimfit_fx` stays cheap

    return compare(original(model), batch, loss, options)


def _options(model: nn.Module, config: Config | None, overrides: ConfigOptions) -> Config:
    """How `model` is, or would be, transformed; all gates open until they are set by hand."""
    session = session_of(model)
    if session is None:
        if original(model) is not model:
            raise StateError(
                "the model is compiled, but no graph of it by slimfit_fx yet: verify the plain model, with the options "
                "that torch.compile was given"
            )
        inner = next((name for name, module in model.named_modules() if session_of(module) is not None), None)
        if inner is not None:
            raise StateError(f"not the model, but {inner} in it was transformed: verify that")
    chosen = (config or (session.config if session else Config())).replace(**overrides)
    return chosen.replace(
        freeze_rate=0.0, rate_schedule="constant", rise_steps=0, warmup_steps=0, memory_budget=None, policy="update"
    )
