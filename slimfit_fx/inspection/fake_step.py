"""A training step on tensors without memory: the compiled code's allocations and autograd's, counted."""

from __future__ import annotations

import copy
import functools
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import closing
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
from slimfit_fx.torch_internals import FakeTensor

from .fake_memory import FakeMemory
from .gate_sets import Flags, largest_sets
from .sample import call, mapped, random_state_kept, scalar_loss

MakeOptimizer = Callable[[nn.Module, dict[int, nn.Parameter]], Optimizer | None]


@dataclass(frozen=True)
class Step:
    """Bytes of a training step, each the most that any set of open layers takes.

    Attributes:
        weights: of parameters and buffers.
        states: of the optimizer.
        inputs: of the batch.
        gradients: that the backward leaves in `.grad`.
        saved: handed to the backward.
        phases: the most that is alive at once, by phase; weights, states and batch not among it.
        plan: what is saved.
        open_gates: of the set that takes most at once.
        layers: names, in the order of the gates.
    """

    weights: int
    states: int
    inputs: int
    gradients: int
    saved: int
    phases: Mapping[str, int]
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
    """The most that a step takes, of a copy of `model` on fake tensors on `device`, by default the model's own."""
    with random_state_kept(model), warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")
        memory = FakeMemory()
        place = functools.partial(_fake, memory, device)
        twins: dict[int, nn.Parameter] = {}
        fake = _copied(model, place, twins).train()
        weights = memory.now
        inputs = mapped(batch, place)
        batch_bytes = memory.now - weights
        optimizer = make_optimizer(fake, twins)
        with closing(Session(fake, config)) as session:
            session.generate = functools.partial(written, memory.empty)
            session._hooks()  # the steps that are counted make their own
            forward = functools.partial(_loss, fake, inputs, loss)
            return _counted(memory, fake, session, optimizer, forward, weights, batch_bytes)


def _counted(
    memory: FakeMemory,
    fake: nn.Module,
    session: Session,
    optimizer: Optimizer | None,
    forward: Callable[[], Tensor],
    weights: int,
    batch_bytes: int,
) -> Step:
    """Runs steps with the sets of open layers that may take most."""
    compile_calls(fake, find_regions(fake, session.config), session)
    forward().backward()  # compiles, and tells what is saved
    fake.zero_grad()
    sets, stateful = _sets(session, fake)
    if optimizer is not None:
        _make_states(fake, session, optimizer, stateful)
    held, runs = memory.now, []
    for flags in sets:
        session.gates.set([layer.name for layer, is_open in zip(session.layers, flags, strict=True) if is_open])
        fake.zero_grad()
        phases: dict[str, int] = {}
        memory.begin()
        value = forward()
        phases["forward"] = memory.highest - held
        memory.begin()
        value.backward()
        del value
        phases["backward"] = memory.highest - held
        runs.append(phases)
    gradients = sum(p.grad.untyped_storage().nbytes() for p in fake.parameters() if p.grad is not None)
    if optimizer is not None:  # with the largest gradients
        memory.begin()
        session.scheduler.before_optimizer_step(optimizer)
        optimizer.step()
        session.scheduler.after_optimizer_step(optimizer)
        runs[-1]["optimizer"] = memory.highest - held
    largest = max(range(len(runs)), key=lambda place: max(runs[place].values()))
    return Step(
        weights,
        held - weights - batch_bytes,
        batch_bytes,
        gradients,
        max(session.plan.bytes_at(flags) for flags in sets),
        {name: max(run.get(name, 0) for run in runs) for name in runs[-1]},
        session.plan,
        sets[largest],
        tuple(layer.name for layer in session.layers),
    )


def _loss(model: nn.Module, inputs: Any, loss: Callable[[Any], Tensor] | None) -> Tensor:
    return scalar_loss(model(*inputs) if isinstance(inputs, tuple) else call(model, inputs), loss)


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


def _sets(session: Session, model: nn.Module) -> tuple[list[Flags], Flags]:
    """The sets of open layers that may take most, and the layers that have optimizer states then, at most."""
    config, parameters = session.config, dict(model.named_parameters())
    trained = [[parameters[n] for n in layer.parameters if parameters[n].requires_grad] for layer in session.layers]
    gradients = [sum(p.nbytes for p in members) for members in trained]
    trains = [bool(members) for members in trained]
    closable = [alive and not layer.always_open for alive, layer in zip(trains, session.layers, strict=True)]
    sets = largest_sets(session.plan, gradients, trains, closable, config)
    leaves = config.closed_state == "none" or (config.closed_state == "host" and _on_accelerator(model))
    if not leaves:
        return sets, tuple(trains)
    # the states of a layer stay for `closed_state_after` steps: at each, others may have been open
    opened = sum(may and now for may, now in zip(closable, sets[-1], strict=True)) * config.closed_state_after
    shut = sorted((i for i, now in enumerate(sets[-1]) if not now and closable[i]), key=lambda i: -gradients[i])
    kept = {*shut[:opened]}
    return sets, tuple(now or i in kept for i, now in enumerate(sets[-1]))


def _on_accelerator(model: nn.Module) -> bool:
    return any(parameter.device.type != "cpu" for parameter in model.parameters())


def _make_states(model: nn.Module, session: Session, optimizer: Optimizer, stateful: Flags) -> None:
    """Steps once, so that the states are there."""
    layers = zip(session.layers, stateful, strict=True)
    absent = {name for layer, has_states in layers if not has_states for name in layer.parameters}
    for name, parameter in model.named_parameters():
        steps = parameter.requires_grad and name not in absent
        parameter.grad = torch.zeros_like(parameter) if steps else None
    optimizer.step()
    model.zero_grad()


def same_optimizer(optimizer: Optimizer, twins: Mapping[int, nn.Parameter]) -> Optimizer:
    """A copy of `optimizer` over other parameters, without states."""
    memo: dict[int, Any] = {**twins, id(optimizer.state): defaultdict(dict)}
    return copy.deepcopy(optimizer, memo)
