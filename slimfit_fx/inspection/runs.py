"""Runs of one sample, and what is kept of them to be compared."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from slimfit_fx.compiler.capture import Capture
from slimfit_fx.config import Config
from slimfit_fx.graph.plan import Plan
from slimfit_fx.runtime.outside import outside_allowed
from slimfit_fx.runtime.session import Session

from .handed_over import handed_over
from .sample import call, random_state, scalar_loss, tensors, untouched


@dataclass(frozen=True)
class Run:
    """What one forward and backward gave; tensors are on the CPU.

    Attributes:
        outputs: the tensors that the model returned, if wanted, and the loss.
        gradients: by parameter name, without those that are None.
        saved: bytes handed to the backward, by autograd's own nodes.
        random: whether random numbers were drawn.
        reported: with slimfit_fx, what the report says of those bytes.
        plan: with slimfit_fx, what is saved.
    """

    outputs: list[Tensor]
    gradients: dict[str, Tensor]
    saved: int
    random: bool
    reported: int = 0
    plan: Plan = field(default_factory=Plan)


class Watched(Session):
    """A session that remembers the masks and tables that its graphs are given: their caller holds them."""

    def __init__(self, model: nn.Module, config: Config) -> None:
        self.given: list[Tensor] = []
        super().__init__(model, config)

    def _run(self, capture: Capture, compiled: Callable[..., Any], delimits: bool, *arguments: Any) -> Any:
        self.given.extend(tensor for tensor in tensors(arguments) if tensor.is_leaf)
        return super()._run(capture, compiled, delimits, *arguments)


def run(
    model: nn.Module,
    sample: Any,
    loss: Callable[[Any], Tensor] | None,
    session: Watched | None = None,
    *,
    only_loss: bool = False,
) -> Run:
    """One forward and backward in training mode, with `session` for what runs compiled; the model stays as it is.

    Args:
        only_loss: whether the loss alone is kept of what the model returns.
    """
    from_graphs = nullcontext() if session is not None else outside_allowed()
    with untouched(model, sample), from_graphs, torch.enable_grad():
        before = random_state(model)
        outputs = call(model, sample)
        value = scalar_loss(outputs, loss)
        drawn = not all(map(torch.equal, before, random_state(model)))
        held = [*model.parameters(), *model.buffers(), *tensors(sample)]
        reported, plan = 0, Plan()
        if session is not None:
            held += session.given
            session.given.clear()
            plan = session.plan
            reported = plan.bytes_at(session.gates.table.tolist())
        saved = handed_over([*tensors(outputs), value], held)
        results = [tensor.detach().cpu().clone() for tensor in (*([] if only_loss else tensors(outputs)), value)]
        value.backward()
        gradients = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    return Run(results, gradients, saved, drawn, reported, plan)
