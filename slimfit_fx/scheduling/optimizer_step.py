"""What is remembered while one optimizer steps: the weights and gradients that its step starts from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from slimfit_fx.config import Config
from slimfit_fx.model.shards import shard_groups
from slimfit_fx.policies import State

from .catch_up import catch_up_factor, fade_momentum, lengthen
from .closures import restart
from .statistics import Measurement, measure_gains, measure_gradients, measure_updates, sample


class OptimizerStep:
    """One step of one optimizer, from its beginning to its end.

    `weights_known` and `gradients_known` may be called again: each parameter counts the first time.

    Args:
        state: of the policy, at the step that it belongs to.
        measures: what the policy measures: `"update"`, `"gradient"`, `"gain"` or `""`.
        catch_up: the exponent by which updates are lengthened; 0 for not at all.
        fades: whether the momentum of layers that were closed fades.
    """

    def __init__(self, state: State, measures: str, catch_up: float = 0.0, fades: bool = False) -> None:
        self.number = state.step
        self._missed = state.missed
        self._measures = measures
        self._catch_up = catch_up
        self._fades = fades
        self._before: dict[nn.Parameter, Tensor] = {}  # whole weights, of layers whose updates are lengthened
        self._sampled: dict[nn.Parameter, Tensor] = {}
        self._gradients: dict[nn.Parameter, Tensor] = {}  # samples
        self._known: set[nn.Parameter] = set()
        self._measured = Measurement()

    def weights_known(self, trained: Mapping[nn.Parameter, int]) -> None:
        """The parameters in `trained`, of the layers given there, have the weights that the step starts from."""
        for parameter, layer in trained.items():
            if parameter not in self._before and self._factor(layer) != 1:
                self._before[parameter] = parameter.detach().clone()
            if parameter not in self._sampled and self._measures in ("update", "gain"):
                self._sampled[parameter] = sample(parameter).clone()

    def gradients_known(self, optimizer: Optimizer | None, trained: Mapping[nn.Parameter, int]) -> None:
        """The parameters in `trained` have the gradients that the optimizer steps by; None is one that is not known."""
        new = {p: layer for p, layer in trained.items() if p not in self._known}
        self._known.update(new)
        if self._fades and optimizer is not None:
            fade_momentum(optimizer, {p: self._missed[layer] for p, layer in new.items()})
        if self._measures == "gain":
            # the optimizer may change them, or have them computed again elsewhere
            first = [p for p in trained if p not in self._gradients]
            self._gradients.update({p: sample(p.grad).clone() for p in first if p.grad is not None})
        if self._measures == "gradient":
            scale = getattr(optimizer, "grad_scale", None)
            for groups, parameters in _measured_together(new):
                gradients = [p.grad for p in parameters if p.grad is not None]
                self._measured += measure_gradients([new[p] for p in parameters], gradients, parameters, scale, groups)

    def finish(self, optimizer: Optimizer | None, owned: Mapping[nn.Parameter, int]) -> Measurement:
        """Measures how far the trained layers moved, and lengthens the updates of those that missed steps."""
        found, self._measured = self._measured, Measurement()
        scale = getattr(optimizer, "grad_scale", None)
        moved = [p for p in self._sampled if p in self._known]
        for groups, parameters in _measured_together(moved):
            layers, old = [owned[p] for p in parameters], [self._sampled[p] for p in parameters]
            if self._measures == "update":
                found += measure_updates(layers, old, [sample(p) for p in parameters], groups)
            else:
                gradients = [self._gradients[p] for p in parameters]
                found += measure_gains(layers, old, parameters, scale, gradients, groups)
        for parameter, old in self._before.items():
            if parameter in self._known:
                lengthen(parameter, old, self._factor(owned[parameter]))
        self.drop(list(owned))
        return found

    def lengthens(self) -> bool:
        """Whether `finish` will move parameters."""
        return not self._known.isdisjoint(self._before)

    def drop(self, parameters: Iterable[nn.Parameter]) -> None:
        """Forgets weights: these parameters' steps are done, by this optimizer or by one that it is made of."""
        for parameter in parameters:
            self._before.pop(parameter, None)
            self._sampled.pop(parameter, None)
            self._gradients.pop(parameter, None)

    def _factor(self, layer: int) -> float:
        return catch_up_factor(self._missed[layer], self._catch_up)


class RunningSteps:
    """The steps that are under way: one, or several where an optimizer steps by way of others.

    Args:
        config: of the model.
        measures: what the policy measures.
    """

    def __init__(self, config: Config, measures: str) -> None:
        self._config = config
        self._measures = measures
        self._steps: WeakKeyDictionary[Optimizer, OptimizerStep] = WeakKeyDictionary()

    def of(self, optimizer: Optimizer, state: State) -> OptimizerStep:
        """The step that `optimizer` makes; begun anew at another state of the policy, as one that failed has no end."""
        step = self._steps.get(optimizer)
        if step is None or step.number != state.step:
            step = OptimizerStep(state, self._measures, self._config.catch_up, self._config.decay_moments)
            self._steps[optimizer] = step
        return step

    def finish(self, optimizer: Optimizer, owned: Mapping[nn.Parameter, int]) -> Measurement:
        """Ends the step of `optimizer`; none if that has ended already, as where its class and a base have hooks."""
        step = self._steps.pop(optimizer, None)
        if step is None:
            return Measurement()
        for outer in self._steps.values():
            outer.drop(owned)
        if step.lengthens():
            restart(optimizer)
        return step.finish(optimizer, owned)

    def clear(self) -> None:
        """Forgets them all."""
        self._steps.clear()


def _measured_together(
    parameters: Iterable[nn.Parameter],
) -> Iterable[tuple[tuple[dist.ProcessGroup, ...], list[nn.Parameter]]]:
    """The parameters of each device, those of one dtype together; before them the ranks over which they are sharded.

    All ranks have them in the same order.
    """
    together: dict[tuple[torch.device, tuple[dist.ProcessGroup, ...]], list[nn.Parameter]] = {}
    for parameter in sorted(parameters, key=lambda p: str(p.dtype)):
        together.setdefault((parameter.device, shard_groups(parameter)), []).append(parameter)
    return [(groups, members) for (_, groups), members in together.items()]
