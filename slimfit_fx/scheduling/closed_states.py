"""Where the optimizer's state of a layer stays while the layer is closed: on the device, on the host, or nowhere.

A policy that moves on leaves the states of refrozen layers behind: after some time all layers have them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from slimfit_fx.model.shards import local

from .closures import shares_state


class ClosedStates:
    """Moves or drops the states of layers that have been closed for long, around an optimizer's step.

    Attributes:
        place: `"device"`, `"host"` or `"none"`.
        after: steps that a layer is closed before that happens, so that a layer that soon opens again costs no copy.
    """

    def __init__(self, place: str, after: int) -> None:
        self.place = place
        self.after = after
        self._saved_later: WeakSet[Optimizer] = WeakSet()

    def before_step(self, optimizer: Optimizer, opened: Iterable[nn.Parameter]) -> None:
        """Brings the states of parameters that train now back to them."""
        if self.place == "host" and not shares_state(optimizer):
            for parameter in opened:
                for name, value in _states(optimizer, parameter).items():
                    optimizer.state[parameter][name] = value.to(parameter.device, non_blocking=True)

    def after_step(self, optimizer: Optimizer, closed: Mapping[nn.Parameter, int]) -> None:
        """Puts away the states of parameters that have been closed for so many steps."""
        if self.place == "device" or shares_state(optimizer):
            return
        for parameter, steps in closed.items():
            if steps < self.after:
                continue
            if self.place == "none":
                optimizer.state.pop(parameter, None)
                continue
            for name, value in _states(optimizer, parameter).items():
                if value.device.type != "cpu":
                    self._finish_before_saving(optimizer)
                    optimizer.state[parameter][name] = _to_pinned(value)

    def _finish_before_saving(self, optimizer: Optimizer) -> None:
        """Copies run in the background: who asks for the optimizer's state waits for them."""
        if optimizer not in self._saved_later:
            self._saved_later.add(optimizer)
            optimizer.register_state_dict_pre_hook(_wait)


def state_bytes(optimizers: Iterable[Optimizer], parameters: Sequence[nn.Parameter]) -> tuple[int, int]:
    """Bytes of the optimizers' states of `parameters` on this rank: (on the parameters' devices, elsewhere)."""
    near = far = 0
    for optimizer in optimizers:
        for parameter in parameters:
            for value in _states(optimizer, parameter).values():
                nbytes = local(value).numel() * value.element_size()
                near, far = (near + nbytes, far) if value.device == parameter.device else (near, far + nbytes)
    return near, far


def _states(optimizer: Optimizer, parameter: nn.Parameter) -> dict[Any, Tensor]:
    """The tensors of the parameter's size: moments, not step counts."""
    state = optimizer.state.get(parameter, {})
    return {name: v for name, v in state.items() if isinstance(v, Tensor) and v.numel() == parameter.numel()}


def _wait(optimizer: Optimizer) -> None:
    for device in {parameter.device for group in optimizer.param_groups for parameter in group["params"]}:
        if device.type not in ("cpu", "meta"):
            torch.accelerator.synchronize(device)


def _to_pinned(value: Tensor) -> Tensor:
    copy = torch.empty_like(value, device="cpu", pin_memory=True)
    return copy.copy_(value, non_blocking=True)
