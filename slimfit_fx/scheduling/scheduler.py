"""Drives a policy from `torch.optim` step hooks, so that a training loop needs no new line."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from itertools import chain, compress
from typing import Any
from weakref import WeakSet

from torch import nn
from torch.optim import Optimizer

from slimfit_fx.config import Config
from slimfit_fx.graph.plan import Plan
from slimfit_fx.model.gate_table import Gates
from slimfit_fx.model.layers import Layer
from slimfit_fx.policies import POLICIES, State, held_open, select

from .agreement import Agreement
from .budget import check_budget, choose_open
from .closed_states import ClosedStates, state_bytes
from .closures import Arguments, Evaluations, LbfgsMemory
from .history import History
from .optimizer_step import RunningSteps
from .rate import freeze_rate_at
from .saved_state import SavedState, read_state
from .statistics import Measurement, may_skip
from .unheard import UnheardSteps


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
        self.history: History = History(gates.names)
        self.plan: Plan | None = None
        self.optimizers: WeakSet[Optimizer] = WeakSet()
        self._config = config
        self._policy = POLICIES[config.policy]
        freezes = config.memory_budget is not None or config.freeze_rate > 0
        self._measures = self._policy.measures if freezes else ""
        self._closable = [not layer.always_open for layer in layers]
        self._members = [[parameters[name] for name in layer.parameters] for layer in layers]
        self._parameters = frozenset(map(id, parameters.values()))  # ungated ones, too
        self._layer_of = {id(p): index for index, members in enumerate(self._members) for p in members}
        self._state = self._policy.init(len(layers), config.seed)
        self._closed_states = ClosedStates(config.closed_state, config.closed_state_after)
        self._evaluations = Evaluations()
        self._lbfgs = LbfgsMemory()
        self._agreement = Agreement()
        self._unheard = UnheardSteps(config, self._measures)
        self._running = RunningSteps(config, self._measures)
        self._measuring = Measurement()  # at the step that is under way
        self._measured: Measurement | Mapping[int, float] = {}  # at the step before, not yet learnt
        self._trained: frozenset[int] = frozenset()  # layers that were open there
        self._flags: list[bool] | None = None  # what was open in a forward of the last step that had one
        self._forwards = False  # whether there was a training forward since the last step was counted
        self._stepped = False  # whether an optimizer stepped since then
        self._told = False  # whether `step` was called since then
        self._choose()

    @property
    def state(self) -> State:
        """What the policy remembers, all pending optimizer steps included."""
        self._count()
        return self._state

    @property
    def freeze_rate(self) -> float:
        """The part of the closable layers that is closed at the present step; without those that the user froze."""
        gated = list(compress(self.gates.table.tolist(), self._closable_of(self._trains())))
        return gated.count(False) / len(gated) if gated else 0.0

    def is_open(self, parameter: nn.Parameter) -> bool:
        """Whether the present step trains a parameter of the model; one without a gate always."""
        layer = self._layer_of.get(id(parameter))
        return layer is None or self._seen()[layer]

    def optimizer_bytes(self) -> tuple[int, int]:
        """Bytes of the layers' optimizer states: (on the layers' devices, on the host)."""
        return state_bytes(self.optimizers, [parameter for members in self._members for parameter in members])

    def step(self) -> None:
        """Says that the weights were updated. Only needed where the optimizer is not one of torch.optim over the
        model's own parameters: an optimizer over copies of them, or a loop that updates them itself.

        Call it behind the update, with the weights back in the model. After a step of an optimizer that the scheduler
        hears of, the next gates are chosen now instead of when the next forward begins; nothing is counted twice.

        Raises:
            StateError: the policy measures gradients, and there are none any more; or the configuration changes
                updates or optimizer states, which takes an optimizer that the scheduler hears of.
        """
        if self._forwards and not self._stepped:
            if self.optimizers:  # one of them may be about to step
                self._told = True
            else:
                self._count_unheard()
        self._count()

    def begin_forward(self) -> None:
        """Chooses the gates anew if steps were made. Call when a training forward, or a part of one, begins."""
        self._unheard.watch(self._members, self._seen())
        told, self._told = self._told, False
        if told and not self._stepped:
            self._count_unheard()
        self._count()
        flags = self.gates.table.tolist()
        self.gates.forget_by_hand()
        if not self._forwards:
            self._flags, self._forwards = flags, True
            self._unheard.begin(self._state, self._open_parameters())
        elif flags != self._flags:
            self._flags = [now or before for now, before in zip(flags, self._seen(), strict=True)]
        self.history.correct(self._seen())

    def backward_began(self) -> None:
        """Call when a backward reaches one of the model's compiled graphs."""
        self._unheard.backward_began()

    def compare_ranks(self) -> None:
        """Call when a training forward begins, on all ranks of DistributedDataParallel or FSDP2. Raises `StateError` if
        their gates differed one forward ago."""
        self._agreement.check(self._state.step, self.gates.table.tolist(), chain.from_iterable(self._members))

    def before_optimizer_step(
        self, optimizer: Optimizer, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Arguments | None:
        """Makes sure that a closed layer does not move, and remembers weights of the open ones.

        Returns what to call the optimizer's `step` with, instead of the given arguments, if they have a closure: what
        needs gradients happens whenever that has made them.
        """
        owned = self._owned(optimizer)
        if not owned:
            return None
        self.optimizers.add(optimizer)
        self._unheard.heard()
        known = functools.partial(self._gradients_known, optimizer, owned)
        arguments = self._evaluations.follow((args, dict(kwargs or {})), known)
        if arguments is None:
            known()
        elif not self._stepped:  # else the closure's forward chooses the gates
            self._running.of(optimizer, self._state).weights_known(self._trained_of(owned))
        return arguments

    def after_optimizer_step(self, optimizer: Optimizer) -> None:
        """Measures how far the open layers moved, and lengthens the updates of those that missed steps."""
        owned = self._owned(optimizer)
        if not owned and not self._updates_others(optimizer):
            return
        measured = self._running.finish(optimizer, owned)
        if (found_inf := getattr(optimizer, "found_inf", None)) is not None:
            measured += may_skip(found_inf)
        if self._config.closed_state != "device":
            # at the first step of several optimizers, for all: those of closed layers may not step at all
            for each in [optimizer] if self._stepped else list(self.optimizers):
                self._put_states_away(each)
        if self._forwards or self._flags is None:
            self._measuring += measured
            self._stepped = True
        else:  # the step was counted before this optimizer took its part
            self._measured = {**self._read(), **measured.read()}

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs to choose the same layers; plain numbers, strings and lists."""
        saved = SavedState(self.state, self._read(), self._trained, tuple(self.gates.table.tolist()))
        return saved.to_dict(self._config.policy, self.gates.names)

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continues from a `state_dict`; gates set by hand before are void.

        Raises:
            StateError: it is damaged, or was saved by another version, policy or model; nothing is changed then.
        """
        found = read_state(saved, self._config.policy, self.gates.names)
        if not self._forwards:
            self.history.pop()  # it was never used
        self._state, self._trained, self._measured = found.state, found.trained, found.measured
        self._measuring = Measurement()
        self._running.clear()
        self._flags = None
        self._forwards = self._stepped = self._told = False
        self.gates.forget_by_hand()
        self.gates.set_flags(found.flags)
        self.history.begin(found.state.step, self._policy.priority(found.state), list(found.flags))

    def check_budget(self, plan: Plan) -> None:
        """Raises `ConfigError` if the memory budget cannot hold what `plan` saves with all closable gates closed."""
        if self._config.budget is not None:
            check_budget(plan, [not may_close for may_close in self._closable], self._config.budget)

    def _count(self) -> None:
        """Turns what the last optimizer steps did into the next gates; nothing pending, no change."""
        if not self._stepped or self._evaluations.repeated:
            return
        self._learn()
        flags = self._seen()
        self._measured, self._measuring = self._measuring, Measurement()
        self._trained = frozenset(layer for layer, is_open in enumerate(flags) if is_open)
        self._state = self._policy.advance(self._state, flags)
        self._forwards = self._stepped = self._told = False
        self._choose()

    def _count_unheard(self) -> None:
        """Counts a step that the user told of, and no optimizer."""
        self._measuring += self._unheard.measure(self._open_parameters())
        self._stepped = True

    def _seen(self) -> list[bool]:
        """The gates that the gradients of the present step were made with: open in one of its forwards."""
        return self.gates.table.tolist() if self._flags is None else self._flags

    def _gradients_known(self, optimizer: Optimizer, owned: Mapping[nn.Parameter, int]) -> None:
        """The backwards that `optimizer` steps by are done, or those of one call of its closure."""
        trained, flags = self._trained_of(owned), self._seen()
        opened = frozenset(layer for layer in owned.values() if flags[layer])
        self._lbfgs.begin(optimizer, opened, self._trained.intersection(owned.values()))
        self._closed_states.before_step(optimizer, trained)
        step = self._running.of(optimizer, self._state)
        step.weights_known(trained)
        step.gradients_known(optimizer, trained)

    def _trained_of(self, owned: Mapping[nn.Parameter, int]) -> dict[nn.Parameter, int]:
        """Those with a gradient; a closed layer has none afterwards."""
        flags = self._seen()
        for parameter, layer in owned.items():
            if not flags[layer]:
                # zero_grad(set_to_none=False) leaves zeros, which momentum and weight decay would act on
                parameter.grad = None
        return {parameter: layer for parameter, layer in owned.items() if parameter.grad is not None}

    def _open_parameters(self) -> dict[nn.Parameter, int]:
        flags = self._seen()
        return {p: layer for layer, members in enumerate(self._members) if flags[layer] for p in members}

    def _put_states_away(self, optimizer: Optimizer) -> None:
        flags, missed = self._seen(), self._state.missed
        closed = {p: missed[layer] + 1 for p, layer in self._owned(optimizer).items() if not flags[layer]}
        self._closed_states.after_step(optimizer, closed)

    def _choose(self) -> None:
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
        self.gates.choose([is_open and alive for is_open, alive in zip(flags, trains, strict=True)])
        self.history.begin(state.step, priority, self.gates.table.tolist())

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
        self._measured, self._trained = {}, frozenset()

    def _read(self) -> Mapping[int, float]:
        if isinstance(self._measured, Measurement):
            self._measured = self._measured.read()
        return self._measured

    def _owned(self, optimizer: Optimizer) -> dict[nn.Parameter, int]:
        """The gated parameters that the optimizer updates, and their layers."""
        parameters = (p for group in optimizer.param_groups for p in group["params"])
        return {p: self._layer_of[id(p)] for p in parameters if id(p) in self._layer_of}

    def _updates_others(self, optimizer: Optimizer) -> bool:
        """Whether it updates parameters of the model, layers or not: its step is one, even if all layers are closed."""
        return any(id(p) in self._parameters for group in optimizer.param_groups for p in group["params"])
