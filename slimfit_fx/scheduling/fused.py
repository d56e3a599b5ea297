"""Whether an optimizer could update its parameters in one kernel, and does not."""

from __future__ import annotations

from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

from slimfit_fx.torch_internals import fused_devices

_FUSED = (Adam, AdamW, SGD, Adagrad)
# What the user asked for instead, or what fused kernels do not do.
_INSTEAD = ("fused", "foreach", "capturable", "differentiable")
# Whether it has a kernel for CUDA depends on torch's version; it has none for others.
_ONLY: dict[type[Optimizer], set[str]] = {Adagrad: {"cpu"}}


def not_fused(optimizer: Optimizer) -> str | None:
    """A hint for an optimizer that torch has a fused kernel for. Its gradients are known: sparse ones have none."""
    kind = type(optimizer)
    if kind not in _FUSED or any(group.get(option) for group in optimizer.param_groups for option in _INSTEAD):
        return None
    devices = _ONLY.get(kind, set(fused_devices()))
    for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
        sparse = parameter.grad is not None and parameter.grad.is_sparse
        if parameter.device.type not in devices or not parameter.is_floating_point() or sparse:
            return None
    return (
        f"{kind.__name__} makes temporaries as large as the weights, and reads them several times: "
        f"torch.optim.{kind.__name__}(..., fused=True) takes one kernel and none."
    )
