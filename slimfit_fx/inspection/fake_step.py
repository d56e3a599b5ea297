"""A training step on tensors without memory: the compiled code's allocations and autograd's, counted."""

from __future__ import annotations

import copy
import functools
import random
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from slimfit_fx.compiler.written_code import written
from slimfit_fx.config import Config
from slimfit_fx.errors import ModelError
from slimfit_fx.graph.plan import Plan
from slimfit_fx.model.regions import find_regions
from slimfit_fx.runtime.module_calls import compile_calls
from slimfit_fx.runtime.session import Session
from slimfit_fx.scheduling.budget import choose_open
from slimfit_fx.scheduling.rate import freeze_rate_at
from slimfit_fx.torch_internals import FakeTensor

from .fake_memory import FakeMemory
from .sample import scalar_loss

MakeOptimizer = Callable[[nn.Module, dict[int, nn.Parameter]], Optimizer | None]


@dataclass(frozen=True)
class Step:
    """Bytes of one training step, weights, states and batch not among those of the phases.

    Attributes:
        weights: of parameters and buffers.
        states: of the optimizer.
        inputs: of the batch.
        gradients: that the backward leaves in `.grad`.
        phases: the bytes that are alive, behind each allocation of a phase.
        plan: what is saved.
        open_gates: of the step.
        layers: names, in the order of the gates.
    """

    weights: int
    states: int
    inputs: int
    gradients: int
    phases: Mapping[str, tuple[int, ...]]
    plan: Plan
    open_gates: tuple[bool, ...]
    layers: tuple[str, ...]


def fake_step(
    model: nn.Module,
    batch: Any,
    make_optimizer: MakeOptimizer,
    loss: Callable[[Any], Tensor] | None,
    config: Config,
    device: torch.device | None,
) -> Step:
    """The step that takes most, of a copy of `model` on fake tensors on `device`, by default the model's own."""
    memory = FakeMemory()
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        python_state = random.getstate()
        try:
            with torch.enable_grad():
                return _step(memory, model, batch, make_optimizer, loss, config, device)
        finally:
            random.setstate(python_state)


def _step(
    memory: FakeMemory,
    model: nn.Module,
    batch: Any,
    make_optimizer: MakeOptimizer,
    loss: Callable[[Any], Tensor] | None,
    config: Config,
    device: torch.device | None,
) -> Step:
    place = functools.partial(_fake, memory, device)
    twins: dict[int, nn.Parameter] = {}
    fake = _copied(model, place, twins).train()
    weights = memory.now
    inputs = _mapped(batch, place)
    batch_bytes = memory.now - weights
    optimizer = make_optimizer(fake, twins)
    session = Session(fake, config)
    session.generate = functools.partial(written, memory.empty)
    session._hooks()  # the steps that are counted below make their own
    try:
        compile_calls(fake, find_regions(fake, config), session)
        _loss(fake, inputs, loss).backward()  # compiles, and tells what is saved
        flags = _most_open(session, fake, config)
        session.gates.set_flags(flags)
        _make_states(fake, session, optimizer, flags)
        states = memory.now - weights - batch_bytes
        held, phases = memory.now, {}
        memory.begin()
        value = _loss(fake, inputs, loss)
        phases["forward"] = memory.course
        memory.begin()
        value.backward()
        del value
        phases["backward"] = memory.course
        gradients = sum(p.grad.untyped_storage().nbytes() for p in fake.parameters() if p.grad is not None)
        if optimizer is not None:
            memory.begin()
            session.scheduler.before_optimizer_step(optimizer)
            optimizer.step()
            session.scheduler.after_optimizer_step(optimizer)
            phases["optimizer"] = memory.course
        courses = {name: tuple(now - held for now in course) for name, course in phases.items()}
        names = tuple(layer.name for layer in session.layers)
        return Step(weights, states, batch_bytes, gradients, courses, session.plan, tuple(flags), names)
    finally:
        session.close()


def _loss(model: nn.Module, inputs: Any, loss: Callable[[Any], Tensor] | None) -> Tensor:
    if isinstance(inputs, Mapping):
        return scalar_loss(model(**inputs), loss)
    return scalar_loss(model(*inputs) if isinstance(inputs, tuple) else model(inputs), loss)


def _copied(model: nn.Module, place: Callable[[Tensor], Tensor], twins: dict[int, nn.Parameter]) -> nn.Module:
    """A copy whose parameters and buffers have no memory; `twins` gets the parameters by the identities of `model`'s.

    Raises:
        ModelError: the model cannot be copied.
    """
    for parameter in model.parameters():
        twin = nn.Parameter(place(parameter), requires_grad=parameter.requires_grad)
        twins[id(parameter)] = twin
    memo: dict[int, Any] = {**twins, **{id(buffer): place(buffer) for buffer in model.buffers()}}
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise ModelError(
            f"preview works on a copy of the model without weights, and {type(model).__name__} cannot be copied "
            f"(copy.deepcopy: {error}). Build a second one for it, on the meta device for instance."
        ) from error


def _fake(memory: FakeMemory, device: torch.device | None, tensor: Tensor) -> Tensor:
    """A tensor of the same form without memory."""
    if type(tensor) not in (Tensor, nn.Parameter) and not isinstance(tensor, FakeTensor):
        raise ModelError(
            f"preview knows plain tensors, and the model or batch has a {type(tensor).__name__}: what that takes "
            "is not known before it runs"
        )
    where = device if device is not None else tensor.device
    fake = memory.empty(tensor.shape, tensor.stride(), tensor.dtype, where)
    return fake.requires_grad_() if tensor.requires_grad and not isinstance(tensor, nn.Parameter) else fake


def _mapped(values: Any, place: Callable[[Tensor], Tensor]) -> Any:
    """`values` with each tensor replaced, in mappings, lists and tuples."""
    if isinstance(values, Tensor):
        return place(values)
    if isinstance(values, Mapping):
        return {key: _mapped(value, place) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return type(values)(_mapped(value, place) for value in values)
    return values


def _most_open(session: Session, model: nn.Module, config: Config) -> list[bool]:
    """The gates of the step of the run that takes most: the layers with most bytes are open, of as many as may be."""
    plan, parameters = session.plan, dict(model.named_parameters())
    closable = [not layer.always_open for layer in session.layers]
    costs = [float(sum(parameters[n].nbytes for n in layer.parameters)) for layer in session.layers]
    for tensor in plan.saved:
        for gate in tensor.gates:
            costs[gate] += tensor.stored / len(tensor.gates)
    if config.budget is not None:
        return list(choose_open(plan, costs, [False] * len(costs), closable, config.budget))
    count = sum(closable)
    opened = count - int(freeze_rate_at(config, 0) * count)
    order = sorted((i for i, may in enumerate(closable) if may), key=lambda i: -costs[i])
    chosen = set(order[:opened])
    return [not may or i in chosen for i, may in enumerate(closable)]


def _make_states(model: nn.Module, session: Session, optimizer: Optimizer | None, flags: Iterable[bool]) -> None:
    """Steps once, so that states are there: of all layers, or of the open ones if closed ones have theirs elsewhere."""
    if optimizer is not None:
        layers = zip(session.layers, flags, strict=True)
        shut = {name for layer, is_open in layers if not is_open for name in layer.parameters}
        for name, parameter in model.named_parameters():
            absent = session.config.closed_state != "device" and name in shut
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad and not absent else None
        optimizer.step()
    model.zero_grad()


def same_optimizer(optimizer: Optimizer, twins: Mapping[int, nn.Parameter]) -> Optimizer:
    """A copy of `optimizer` over other parameters, without states."""
    memo: dict[int, Any] = {**twins, id(optimizer.state): defaultdict(dict)}
    return copy.deepcopy(optimizer, memo)
