"""What makes up for the steps at which a layer was closed: longer updates, and momentum that has faded meanwhile.

Both act around the optimizer's step, on weights and on the optimizer's state: any optimizer will do, and its parameter
groups stay as the user made them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from slimfit_fx.model.shards import local

# A layer that was closed for very long does not jump.
_LONGEST = 10.0


def catch_up_factor(missed: int, exponent: float) -> float:
    """By how much the update of a layer is lengthened that missed so many steps: (missed + 1) ** exponent, at most 10.

    With exponent 1 a layer gets the sum of updates that it would have got if it had been open all the time; with 0.5
    its steps' noise adds up to the same variance.
    """
    return min(_LONGEST, (missed + 1) ** exponent)


@torch.no_grad()
def lengthen(parameter: nn.Parameter, before: Tensor, factor: float) -> None:
    """Makes the last update of `parameter`, from the value `before`, `factor` times as long."""
    local(parameter).lerp_(local(before), 1 - factor)


@torch.no_grad()
def fade_momentum(optimizer: Optimizer, missed: dict[nn.Parameter, int]) -> None:
    """Decays the running means of gradients as steps without a gradient would have done."""
    for group in optimizer.param_groups:
        decays = {"exp_avg": group.get("betas", (1.0,))[0], "momentum_buffer": group.get("momentum", 1.0)}
        for parameter in group["params"]:
            steps = missed.get(parameter, 0)
            state = optimizer.state.get(parameter, {}) if steps else {}
            for name, decay in decays.items():
                if isinstance(state.get(name), Tensor):
                    _scale(state[name], float(decay) ** steps)


def _scale(value: Tensor, factor: float) -> None:
    """Multiplies in place: of a DTensor what is here, through a plain tensor where an optimizer has low-bit ones."""
    value = local(value)
    if hasattr(value, "dequantize") and type(value) is not Tensor:
        value.copy_(value.dequantize() * factor)
    else:
        value.mul_(factor)
