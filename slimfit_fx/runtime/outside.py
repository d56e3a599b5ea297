"""Gradients of layers that no captured graph computed: dropped where the layer is closed, and named once."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.autograd.graph import Node, get_gradient_edge
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from slimfit_fx.errors import SlimFitWarning
from slimfit_fx.model.gate_table import Gates
from slimfit_fx.scheduling.listeners import listen

_EXAMPLES = 5
_watchers: WeakSet[OutsideGradients] = WeakSet()
_paused: list[bool] = []  # not by thread: a backward on a device has threads of its own


@contextmanager
def outside_allowed() -> Iterator[None]:
    """Inside, gradients may come from anywhere: the untransformed model runs, on purpose."""
    _paused.append(True)
    try:
        yield
    finally:
        _paused.pop()


class OutsideGradients:
    """Watches the gradients of gated parameters on their way to `.grad`.

    A graph computes nothing for a closed layer. So the gradient of a layer that was open in no graph since the last
    optimizer step comes from elsewhere: from code that torch.compile left out, from a part of the model that was
    called by itself, from a penalty on the weights. It does not reach `.grad` if the layer is closed at that moment.

    In eval mode the model is the untouched one: nothing is dropped there.

    Attributes:
        layers: those that such gradients came for, from the first graph that ran on.
    """

    def __init__(
        self, model: nn.Module, gates: Gates, layer_of: Mapping[nn.Parameter, int], explain: Callable[[], str]
    ) -> None:
        """
        Args:
            layer_of: the layers of the gated parameters.
            explain: says why there are such gradients, and the way out; may raise instead.
        """
        self.layers: set[int] = set()
        self._model = weakref.ref(model)
        self._gates = gates
        self._layer_of = dict(layer_of)
        self._explain = explain
        self._trained: set[int] = set()  # layers that were open in a graph since the last optimizer step
        self._stepped = False
        self._ran = False
        self._untold: set[int] = set()
        self._nodes: dict[nn.Parameter, Node] = {}  # autograd keeps a node and its hooks no longer than we do
        self._hooks: list[RemovableHandle] = []  # of the nodes
        self._stream = self._current_stream()  # in which the nodes were made
        self._age = max((watcher._age for watcher in _watchers), default=0) + 1
        _watchers.add(self)
        self.watch()
        self._deafen = listen(self, after=OutsideGradients.after_optimizer_step)

    def watch(self) -> None:
        """Also after parameters were moved to another device or dtype, for which autograd makes new nodes."""
        for parameter, layer in self._layer_of.items():
            if not parameter.requires_grad:
                continue
            node = get_gradient_edge(parameter).node
            if self._nodes.get(parameter) is not node:
                self._nodes[parameter] = node
                self._hooks.append(node.register_prehook(_arrival(weakref.ref(self), parameter, layer)))

    def follow(self, parameter: nn.Parameter, layer: int) -> None:
        """Also watches a parameter that stands for one of `layer`."""
        self._layer_of[parameter] = layer
        self.watch()

    def follow_stream(self) -> None:
        """Lets autograd make its nodes anew in the stream of the forward that begins.

        A node adds gradients up in the stream in which it was made: held past a change of streams it would make the two
        wait for each other, and torch warns of that.
        """
        if (stream := self._current_stream()) != self._stream:
            self._stream = stream
            self._let_go()
            self.watch()

    def close(self) -> None:
        """Watches no more."""
        _watchers.discard(self)
        self._deafen()
        self._let_go()

    def graph_ran(self, layers: Sequence[int | None], flags: Sequence[bool]) -> None:
        """A graph ran with these gates: what is open there gets its gradients from it."""
        if self._stepped:
            self._trained.clear()
            self._stepped = False
        if not self._ran:
            self._ran = True
            self.layers.clear()  # what was found before tells of training past the model, not of its graphs
        self._trained.update(
            layer for layer, is_open in zip(layers, flags, strict=True) if is_open and layer is not None
        )

    def arrived(self, parameter: nn.Parameter, layer: int) -> bool:
        """A gradient of `layer` arrived; whether it is to be dropped."""
        model = self._model()
        if model is None or not model.training or layer in self._trained:
            return False
        if _paused or self._overruled(parameter):
            return False
        if layer not in self.layers:
            self._explain()
            self.layers.add(layer)
            self._untold.add(layer)
            Variable._execution_engine.queue_callback(self._tell)  # all layers of a backward in one warning
        return not self._gates[self._gates.names[layer]]

    def after_optimizer_step(self, optimizer: Optimizer) -> None:
        """Gates may be others from now on. Notices training where no gradient was watched: in eval mode."""
        self._stepped = True
        if self._ran or self.layers:
            return
        owned = [p for group in optimizer.param_groups for p in group["params"] if p in self._layer_of]
        if any(parameter.grad is not None for parameter in owned):
            self.layers.update(self._layer_of[parameter] for parameter in owned)
            self._untold |= self.layers
            self._tell()

    def _current_stream(self) -> torch.Stream | None:
        """That of the parameters' device; None on a CPU."""
        if (accelerator := torch.accelerator.current_accelerator()) is None:
            return None
        devices = (parameter.device for parameter in self._layer_of if parameter.device.type == accelerator.type)
        device = next(devices, None)
        return None if device is None else torch.accelerator.current_stream(device)

    def _let_go(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._nodes.clear()

    def _overruled(self, parameter: nn.Parameter) -> bool:
        """Whether the parameter belongs to a session that began later, such as that of a probe."""
        return any(other._age > self._age and parameter in other._layer_of for other in _watchers)

    def _tell(self) -> None:
        names = [self._gates.names[layer] for layer in sorted(self._untold)]
        self._untold.clear()
        if names:
            more = f" and {len(names) - _EXAMPLES} more" if len(names) > _EXAMPLES else ""
            warnings.warn(
                f"slimfit_fx: {len(names)} of {len(self._gates)} layers have gradients that none of its graphs "
                f"computed ({', '.join(names[:_EXAMPLES])}{more}): what they need is saved as it is, and their "
                f"gradients are computed even when they are closed, then dropped. {self._explain()}",
                SlimFitWarning,
                stacklevel=2,
            )


def _arrival(
    watcher: weakref.ref[OutsideGradients], parameter: nn.Parameter, layer: int
) -> Callable[[tuple[Tensor | None, ...]], tuple[None, ...] | None]:
    """The hook of a parameter's node. It does not hold the watcher: no garbage collector sees what a node holds."""

    def hook(gradients: tuple[Tensor | None, ...]) -> tuple[None, ...] | None:
        outside = watcher()
        if outside is None or gradients[0] is None or not outside.arrived(parameter, layer):
            return None
        return (None,)

    return hook
