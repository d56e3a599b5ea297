"""Drives a policy from `torch.optim` step hooks, so that a training loop needs no new line."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ..config import Config
from ..errors import StateError
from ..gates import Gates
from ..layers import Layer
from .policy import POLICIES, State
from .statistics import relative_update

_STATE_VERSION = 1
_HISTORY = 10_000


class Scheduler:
    """Chooses the open layers of each step.

    Around an optimizer step it measures how far the open layers' weights moved; the gates change when the next
    training forward begins. So micro-batches of one step share their gates, several optimizers may step in turn, and
    a step that a gradient scaler skips changes nothing.

    Attributes:
        gates: the gates that it sets.
        history: (step, names of the open layers) of the last 10,000 steps.
    """

    def __init__(
        self, gates: Gates, layers: Sequence[Layer], parameters: Mapping[str, nn.Parameter], config: Config
    ) -> None:
        self.gates = gates
        self.history: deque[tuple[int, tuple[str, ...]]] = deque(maxlen=_HISTORY)
        self._config = config
        self._policy = POLICIES[config.policy]
        self._closable = [not layer.always_open for layer in layers]
        # int(F * n), as the paper's code counts; policy "static" freezes all
        rate = 1.0 if config.policy == "static" else config.freeze_rate
        self._closed = int(rate * sum(self._closable))
        self._members = [[parameters[name] for name in layer.parameters] for layer in layers]
        self._layer_of = {id(p): index for index, members in enumerate(self._members) for p in members}
        self._state = self._policy.init(len(layers), config.seed)
        self._before: dict[int, list[tuple[nn.Parameter, Tensor]]] = {}
        self._measured: dict[int, list[tuple[int, Tensor]]] = {}
        self._stepped = False
        self._select()

    @property
    def state(self) -> State:
        """What the policy remembers, all pending optimizer steps included."""
        self.step()
        return self._state

    def step(self) -> None:
        """Turns what was measured around the last optimizer steps into the next gates; nothing pending, no change.

        Called when a training forward begins. Reads the measured scalars, one device synchronisation.
        """
        if not self._stepped:
            return
        flags = self.gates.table.tolist()
        measured = {
            layer: sum(size * float(value) for size, value in parts) / sum(size for size, _ in parts)
            for layer, parts in self._measured.items()
        }
        self._state = self._policy.update(self._state, flags, measured)
        self._measured.clear()
        self._stepped = False
        self._select()

    def before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Makes sure that a closed layer does not move, and remembers the weights of the open ones."""
        self._before.clear()
        flags = self.gates.table.tolist()
        for parameter in self._owned(optimizer):
            layer = self._layer_of[id(parameter)]
            if not flags[layer]:
                # zero_grad(set_to_none=False) leaves zeros, which momentum and weight decay would act on
                parameter.grad = None
            elif parameter.grad is not None and self._policy.measures and self._closed:
                self._before.setdefault(layer, []).append((parameter, parameter.detach().clone()))

    def after_optimizer_step(self, optimizer: Optimizer) -> None:
        """Measures how far the open layers moved; the copies of their weights end here."""
        owned = self._owned(optimizer)
        for layer, pairs in self._before.items():
            size = sum(parameter.numel() for parameter, _ in pairs)
            moved = relative_update([old for _, old in pairs], [parameter for parameter, _ in pairs])
            self._measured.setdefault(layer, []).append((size, moved))
        self._before.clear()
        self._stepped |= bool(owned)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs to choose the same layers; plain numbers and strings."""
        state = self.state
        return {
            "version": _STATE_VERSION,
            "policy": self._config.policy,
            "layers": list(self.gates.names),
            **asdict(state),
            "open": self.gates.table.tolist(),
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continues from a `state_dict`.

        Raises:
            StateError: it was saved by another version, policy or model; nothing is changed then.
        """
        if saved.get("version") != _STATE_VERSION:
            raise StateError(
                f"scheduler state of version {saved.get('version')!r}, this library reads {_STATE_VERSION}"
            )
        if saved["policy"] != self._config.policy:
            raise StateError(f"scheduler state of policy {saved['policy']!r}, the model has {self._config.policy!r}")
        if saved["layers"] != list(self.gates.names):
            different = set(saved["layers"]) ^ set(self.gates.names)
            example = f", for example {min(different)!r}" if different else " in their order"
            raise StateError(f"scheduler state of another model: layers differ{example}")
        self._state = State(int(saved["step"]), int(saved["seed"]), tuple(map(float, saved["score"])))
        self.gates.set_flags(saved["open"])
        self._measured.clear()
        self._stepped = False

    def _select(self) -> None:
        flags = self._policy.select(self._state, self._closable, self._closed)
        self.gates.set_flags(flags)
        self.history.append((self._state.step, tuple(self.gates.open)))

    def _owned(self, optimizer: Optimizer) -> list[nn.Parameter]:
        """The gated parameters that the optimizer updates."""
        return [p for group in optimizer.param_groups for p in group["params"] if id(p) in self._layer_of]
