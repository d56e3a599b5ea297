"""Drives a policy from `torch.optim` step hooks, so that a training loop needs no new line."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import compress
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..config import Config
from ..errors import StateError
from ..gates import Gates
from ..layers import Layer
from ..plan import Plan
from ..policies import POLICIES, State, held_open, select
from .agreement import Agreement
from .budget import check_budget, choose_open
from .catch_up import catch_up_factor, fade_momentum, lengthen
from .closed_states import ClosedStates, state_bytes
from .rate import freeze_rate_at
from .statistics import Measurement, may_skip, measure_gains, measure_gradients, measure_updates, sample

_STATE_VERSION = 2
_HISTORY = 10_000


class Choice(NamedTuple):
    """The gates of one step: names of the open layers, and the priorities, one per layer, that they were chosen by."""

    step: int
    open: tuple[str, ...]
    scores: Sequence[float]


class Scheduler:
    """Chooses the open layers of each step.

    Around an optimizer step it measures the open layers; the gates change when the next training forward begins. So
    micro-batches of one step share their gates, several optimizers may step in turn, and a step that a gradient
    scaler skips changes no score. What is measured at one step counts from the next but one: nothing waits for a
    device.

    Attributes:
        gates: the gates that it sets.
        history: the `Choice` of each of the last 10,000 steps.
        plan: of the last whole forward, which a memory budget is spent by; None before the first.
        optimizers: those that update layers of the model.
    """

    def __init__(
        self, gates: Gates, layers: Sequence[Layer], parameters: Mapping[str, nn.Parameter], config: Config
    ) -> None:
        self.gates = gates
        self.history: deque[Choice] = deque(maxlen=_HISTORY)
        self.plan: Plan | None = None
        self.optimizers: WeakSet[Optimizer] = WeakSet()
        self._config = config
        self._policy = POLICIES[config.policy]
        self._closable = [not layer.always_open for layer in layers]
        self._members = [[parameters[name] for name in layer.parameters] for layer in layers]
        self._layer_of = {id(p): index for index, members in enumerate(self._members) for p in members}
        self._state = self._policy.init(len(layers), config.seed)
        self._closed_states = ClosedStates(config.closed_state, config.closed_state_after)
        self._agreement = Agreement()
        self._before: dict[nn.Parameter, Tensor] = {}  # the weights of open layers, for as long as an optimizer steps
        self._sampled: dict[nn.Parameter, Tensor] = {}
        self._measuring = Measurement()  # at the step that is under way
        self._measured: Measurement | Mapping[int, float] = {}  # at the step before, not yet learnt
        self._trained: set[int] = set()  # layers that were open there
        self._stepped = False
        self._select()

    @property
    def state(self) -> State:
        """What the policy remembers, all pending optimizer steps included."""
        self.step()
        return self._state

    @property
    def freeze_rate(self) -> float:
        """The part of the closable layers that is closed at the present step; without those that the user froze."""
        gated = list(compress(self.gates.table.tolist(), self._closable_of(self._trains())))
        return gated.count(False) / len(gated) if gated else 0.0

    def optimizer_bytes(self) -> tuple[int, int]:
        """Bytes of the layers' optimizer states: (on the layers' devices, on the host)."""
        return state_bytes(self.optimizers, [parameter for members in self._members for parameter in members])

    def step(self) -> None:
        """Turns what the last optimizer steps did into the next gates; nothing pending, no change.

        Called when a training forward begins.
        """
        if not self._stepped:
            return
        self._learn()
        flags = self.gates.table.tolist()
        self._measured, self._measuring = self._measuring, Measurement()
        self._trained = {layer for layer, is_open in enumerate(flags) if is_open}
        self._state = self._policy.advance(self._state, flags)
        self._stepped = False
        self._select()

    def compare_ranks(self) -> None:
        """Under DistributedDataParallel: compares the gates of all ranks. Called when a training forward begins.

        Raises:
            StateError: they differed one forward ago.
        """
        self._agreement.check(self._state.step, self.gates.table.tolist())

    def before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Makes sure that a closed layer does not move, and remembers weights of the open ones."""
        owned = self._owned(optimizer)
        if not owned:
            return
        self.optimizers.add(optimizer)
        flags = self.gates.table.tolist()
        for parameter, layer in owned.items():
            if not flags[layer]:
                # zero_grad(set_to_none=False) leaves zeros, which momentum and weight decay would act on
                parameter.grad = None
        trained = {parameter: layer for parameter, layer in owned.items() if parameter.grad is not None}
        self._closed_states.before_step(optimizer, trained)
        if self._config.decay_moments:
            fade_momentum(optimizer, {parameter: self._state.missed[layer] for parameter, layer in trained.items()})
        self._before = {p: p.detach().clone() for p, layer in trained.items() if self._catch_up(layer) != 1}
        compares = self._measures("update") or self._measures("gain")
        self._sampled = {p: sample(p).clone() for p in trained} if compares else {}
        if self._measures("gradient"):
            for parameters in _by_device(trained):
                layers = [trained[p] for p in parameters]
                gradients = [p.grad for p in parameters if p.grad is not None]
                scale = getattr(optimizer, "grad_scale", None)
                self._measuring += measure_gradients(layers, gradients, parameters, scale)

    def after_optimizer_step(self, optimizer: Optimizer) -> None:
        """Measures how far the open layers moved, and lengthens the updates of those that missed steps."""
        owned = self._owned(optimizer)
        if not owned:
            return
        self._stepped = True
        if (found_inf := getattr(optimizer, "found_inf", None)) is not None:
            self._measuring += may_skip(found_inf)
        for parameters in _by_device(self._sampled):
            layers, old = [owned[p] for p in parameters], [self._sampled[p] for p in parameters]
            if self._measures("update"):
                self._measuring += measure_updates(layers, old, [sample(p) for p in parameters])
            else:
                self._measuring += measure_gains(layers, old, parameters, getattr(optimizer, "grad_scale", None))
        for parameter, old in self._before.items():
            if (factor := self._catch_up(owned[parameter])) != 1:
                lengthen(parameter, old, factor)
        self._before.clear()
        self._sampled.clear()
        flags = self.gates.table.tolist()
        closed = {p: self._state.missed[layer] + 1 for p, layer in owned.items() if not flags[layer]}
        self._closed_states.after_step(optimizer, closed)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs to choose the same layers; plain numbers, strings and lists."""
        state = self.state
        return {
            "version": _STATE_VERSION,
            "policy": self._config.policy,
            "layers": list(self.gates.names),
            **{name: list(value) if isinstance(value, tuple) else value for name, value in asdict(state).items()},
            "measured": sorted(map(list, self._read().items())),
            "trained": sorted(self._trained),
            "open": self.gates.table.tolist(),
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continues from a `state_dict`.

        Raises:
            StateError: it is damaged, or was saved by another version, policy or model; nothing is changed then.
        """
        if not isinstance(saved, Mapping) or "version" not in saved:
            raise StateError("this is no scheduler state: pass what slimfit_fx.scheduler(model).state_dict() returned")
        if saved["version"] != _STATE_VERSION:
            raise StateError(f"scheduler state of version {saved['version']!r}, this library reads {_STATE_VERSION}")
        try:
            policy, names, flags = saved["policy"], list(saved["layers"]), list(map(bool, saved["open"]))
            values = {
                "step": int(saved["step"]),
                "seed": int(saved["seed"]),
                "score": tuple(map(float, saved["score"])),
                "missed": tuple(map(int, saved["missed"])),
                "held": tuple(map(int, saved["held"])),
            }
            measured = {int(layer): float(value) for layer, value in saved["measured"]}
            trained = set(map(int, saved["trained"]))
        except (KeyError, TypeError, ValueError) as error:
            raise StateError(f"the scheduler state is damaged ({type(error).__name__}: {error})") from error
        if policy != self._config.policy:
            raise StateError(f"scheduler state of policy {policy!r}, the model has {self._config.policy!r}")
        if names != list(self.gates.names):
            different = set(names) ^ set(self.gates.names)
            example = f", for example {min(different)!r}" if different else " in their order"
            raise StateError(f"scheduler state of another model: layers differ{example}")
        if any(len(column) != len(names) for column in (flags, values["score"], values["missed"], values["held"])):
            raise StateError(f"the scheduler state is damaged: it does not have {len(names)} numbers in each column")
        self._state = State(**values)
        self._measured, self._trained, self._measuring = measured, trained, Measurement()
        self.gates.set_flags(flags)
        self._stepped = False

    def check_budget(self, plan: Plan) -> None:
        """Raises `ConfigError` if the memory budget cannot hold what `plan` saves with all closable gates closed."""
        if self._config.budget is not None:
            check_budget(plan, [not may_close for may_close in self._closable], self._config.budget)

    def _select(self) -> None:
        state, budget = self._state, self._config.budget
        priority, held = self._policy.priority(state), held_open(state, self._config.min_open_steps)
        trains = self._trains()
        closable = self._closable_of(trains)
        if budget is None:
            closed = int(freeze_rate_at(self._config, state.step) * sum(closable))
            flags = select(priority, closable, closed, held)
        elif self.plan is None:
            flags = tuple(not may_close for may_close in closable)  # what the others cost is not known yet
        else:
            flags = choose_open(self.plan, priority, held, closable, budget)
        self.gates.set_flags([is_open and alive for is_open, alive in zip(flags, trains, strict=True)])
        self.history.append(Choice(state.step, tuple(self.gates.open), array("f", priority)))

    def _trains(self) -> list[bool]:
        """For each layer whether the user lets it train: whether anything of it requires a gradient."""
        return [any(parameter.requires_grad for parameter in members) for members in self._members]

    def _closable_of(self, trains: Sequence[bool]) -> list[bool]:
        """For each layer whether it trains and a policy may close it."""
        return [may_close and alive for may_close, alive in zip(self._closable, trains, strict=True)]

    def _learn(self) -> None:
        """Hands the policy what was measured at the step before the last."""
        measured = self._read()
        self._state = self._policy.learn(self._state, measured)
        self._state = self._policy.forget(self._state, self._trained - measured.keys())
        self._measured, self._trained = {}, set()

    def _read(self) -> Mapping[int, float]:
        if isinstance(self._measured, Measurement):
            self._measured = self._measured.read()
        return self._measured

    def _measures(self, what: str) -> bool:
        freezes = self._config.memory_budget is not None or self._config.freeze_rate > 0
        return freezes and self._policy.measures == what

    def _catch_up(self, layer: int) -> float:
        return catch_up_factor(self._state.missed[layer], self._config.catch_up)

    def _owned(self, optimizer: Optimizer) -> dict[nn.Parameter, int]:
        """The gated parameters that the optimizer updates, and their layers."""
        parameters = (p for group in optimizer.param_groups for p in group["params"])
        return {p: self._layer_of[id(p)] for p in parameters if id(p) in self._layer_of}


def _by_device(parameters: Iterable[nn.Parameter]) -> Iterable[list[nn.Parameter]]:
    """The parameters of each device, those of one dtype together."""
    groups: dict[torch.device, list[nn.Parameter]] = {}
    for parameter in sorted(parameters, key=lambda p: str(p.dtype)):
        groups.setdefault(parameter.device, []).append(parameter)
    return groups.values()
