"""What a backward through compiled graphs may not do, said by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from slimfit_fx.compiler.capture import Capture
from slimfit_fx.errors import BackwardError
from slimfit_fx.torch_internals import backward_keeps_graph


def watch_backward(outputs: Iterable[Any], capture: Capture, begin: Callable[[], None]) -> None:
    """Calls `begin` when the outputs' backward begins, and makes it name what it cannot do; torch would fail later, or
    speak of its own internals."""

    def check(_: Any) -> None:
        if torch.is_grad_enabled():
            raise BackwardError(
                "backward(create_graph=True) needs a second backward, which compiled graphs do not have. "
                "Use slimfit_fx.undo(model) for the steps that differentiate gradients."
            )
        if backward_keeps_graph() and not capture.retainable:
            raise BackwardError(
                "backward(retain_graph=True): the compiled backward reuses the memory of saved tensors. Set "
                "torch._functorch.config.donated_buffer = False before the model's first training call to allow it."
            )
        begin()

    for output in outputs:
        if isinstance(output, Tensor) and output.grad_fn is not None:
            output.grad_fn.register_prehook(check)
            return
