"""Steps that no optimizer hook tells of: the optimizer works on copies of the weights, or is none of torch's."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from slimfit_fx.config import Config
from slimfit_fx.errors import SlimFitWarning, StateError
from slimfit_fx.model.shards import local
from slimfit_fx.policies import State

from .optimizer_step import OptimizerStep
from .statistics import Measurement

# Training forwards before which gated weights had changed: what else changes them does it once or twice.
_CHANGES = 3
# Training forwards before which gradients had gone: a gradient scaler may skip some steps at first.
_GONE = 10
# Elements of a weight that tell whether it changed where no version does (`.data`).
_FIRST = 16


class UnheardSteps:
    """Warns of such steps, once, and measures those that the user tells of.

    Args:
        config: of the model.
        measures: what the policy measures.
    """

    def __init__(self, config: Config, measures: str) -> None:
        self._config = config
        self._measures = measures
        self._watching = True  # until a step is heard of
        self._possible = True  # that the next step is not heard of
        self._step: OptimizerStep | None = None  # in case that it is not
        self._backward = False  # since the last forward
        self._versions: list[int] = []
        self._changes = 0
        self._gone = 0
        self._first: list[Tensor] = []  # of each weight, from before gradients had gone

    def heard(self) -> None:
        """An optimizer that owns a layer steps."""
        self._watching = self._possible = False
        self._step = None

    def backward_began(self) -> None:
        """A backward reached a compiled graph."""
        self._backward = True

    def watch(self, members: Sequence[Sequence[nn.Parameter]], open_gates: Sequence[bool]) -> None:
        """A training forward begins; the layers have these parameters, and had these gates in the one before."""
        if not self._watching:
            return
        versions = [parameter._version for parameters in members for parameter in parameters]
        if self._backward:
            self._changes += versions != self._versions
            opened = [p for parameters, is_open in zip(members, open_gates, strict=True) if is_open for p in parameters]
            self._gone += bool(opened) and all(parameter.grad is None for parameter in opened)
        self._backward, self._versions = False, versions
        if self._changes >= _CHANGES or self._changed(members):
            self._watching = False
            warnings.warn(
                "slimfit_fx: the model trains, but no torch.optim optimizer that owns its layers has made a step, so "
                "the same layers stay frozen. Does the optimizer work on copies of the weights? Then call "
                "slimfit_fx.scheduler(model).step() after each step, when the weights are back in the model.",
                SlimFitWarning,
                stacklevel=2,
            )

    def _changed(self, members: Sequence[Sequence[nn.Parameter]]) -> bool:
        """Whether gradients went often enough, and weights are others than then: who only looks at gradients does
        not train."""
        if self._gone not in (1, _GONE):
            return False
        first = [local(p).detach().flatten()[:_FIRST].clone() for parameters in members for p in parameters]
        before, self._first = self._first, first
        if self._gone < _GONE:
            return False
        self._gone = 1
        return not all(map(torch.equal, before, first))

    def begin(self, state: State, opened: Mapping[nn.Parameter, int]) -> None:
        """The first forward of a step begins: `opened` have the weights that it starts from."""
        if self._possible and self._step is None:
            self._step = OptimizerStep(state, self._measures)
            self._step.weights_known(opened)

    def measure(self, opened: Mapping[nn.Parameter, int]) -> Measurement:
        """What can be measured of a step that the user tells of, after it.

        Raises:
            StateError: see `Scheduler.step`.
        """
        if self._config.catch_up or self._config.decay_moments or self._config.closed_state != "device":
            raise StateError(
                "catch_up, decay_moments and closed_state act on an optimizer's updates and state, and none that owns "
                "a layer has stepped since the forward. Call scheduler.step() after optimizer.step(); if the optimizer "
                "works on copies of the weights, leave these options out."
            )
        trained = dict(opened)
        if self._measures in ("gradient", "gain"):
            trained = {parameter: layer for parameter, layer in opened.items() if parameter.grad is not None}
            if opened and not trained:
                raise StateError(
                    f"policy={self._config.policy!r} measures gradients, and no open layer has one. Call "
                    "scheduler.step() before they are taken away, or take policy='update'."
                )
        found = Measurement()
        if self._step is not None:
            self._step.gradients_known(None, trained)
            found = self._step.finish(None, trained)
        self._watching, self._possible, self._step = False, True, None
        return found
