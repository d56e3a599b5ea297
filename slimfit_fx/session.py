"""What belongs to one transformed model: its layers, gates, scheduler and captured graphs."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._C._autograd import _get_current_graph_task_keep_graph  # type: ignore[import-not-found]
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from .backend import Capture, compile_capture
from .config import Config
from .errors import BackwardError
from .gates import Gates
from .layers import Layer, check_modules, check_sharding, find_layers
from .plan import merge_plans
from .scheduler import Scheduler

_numbers = itertools.count()
# a compiled optimizer step calls the hooks, and does not look into them
_disable: Callable[[Any], Any] = torch.compiler.disable


class Session:
    """The state behind `transform(model)`. It holds the model's parameters, but not the model.

    Attributes:
        layers: what each gate freezes, in the order of the gate table.
        captures: one for each graph that was compiled; several after a graph break or a recompile.
        active: the captures that the last forward ran, in order.
    """

    def __init__(self, model: nn.Module, config: Config) -> None:
        parameters = dict(model.named_parameters())
        self.config = config
        check_sharding(model)
        check_modules(model, config)
        self.layers: list[Layer] = find_layers(model, config)
        self.gates = Gates([layer.name for layer in self.layers])
        self.captures: list[Capture] = []
        self.active: list[Capture] = []
        self._finished: list[Capture] = []
        self.scheduler = Scheduler(self.gates, self.layers, parameters, config)
        self._layer_of = {
            id(parameters[name]): index for index, layer in enumerate(self.layers) for name in layer.parameters
        }
        self._hooks = _listen_to_optimizers(self.scheduler)

    def close(self) -> None:
        """Stops listening to optimizers and opens all gates."""
        self._hooks()
        self.gates.set(self.gates.names)

    def begin_forward(self) -> None:
        """The captures that run from now on belong to another forward."""
        if self.active and self.active != self._finished:
            self._finished = self.active
            self.scheduler.plan = merge_plans(capture.plan for capture in self.active if capture.split is not None)
        self.active = []

    def compiled(self, model: nn.Module) -> Callable[..., Any]:
        """A function that runs `model` with compiled graphs."""
        return torch.compile(_own_code(model), backend=self.compile)

    def compile(self, module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """The torch.compile backend: a graph from Dynamo to a callable on the graph's inputs."""
        layers = {
            position: self._layer_of[id(tensor)]
            for position, tensor in enumerate(inputs)
            if id(tensor) in self._layer_of
        }
        activations = (i for i, tensor in enumerate(inputs) if isinstance(tensor, Tensor) and not tensor.is_leaf)
        capture = Capture(layers, frozenset(activations))
        compiled = compile_capture(module, inputs, capture, self.gates.table, self.config)
        self.captures.append(capture)
        new = True

        def run(*arguments: Any) -> Any:
            nonlocal new
            if capture in self.active:
                self.begin_forward()
            self.scheduler.step()
            if not self.active:
                self.scheduler.compare_ranks()
            self.active.append(capture)
            if new:
                self.scheduler.check_budget(merge_plans(active.plan for active in self.active))
                new = False
            outputs = compiled(*arguments, self.gates.table)
            _watch_backward(outputs, capture)
            return outputs

        return run


def _own_code(model: nn.Module) -> FunctionType:
    """A function that calls the model, with a code object of its own.

    Dynamo keeps compiled graphs, their recompile limit and what it learnt of dynamic shapes by code object. Under the
    model's own code, which all models of a class share, the ninth model of a sweep would run uncompiled.
    """

    def train(*args: Any, **kwargs: Any) -> Any:
        return model._call_impl(*args, **kwargs)

    code = train.__code__.replace(co_name=f"train_{type(model).__name__}_{next(_numbers)}")
    return FunctionType(code, train.__globals__, code.co_name, train.__defaults__, train.__closure__)


def _listen_to_optimizers(scheduler: Scheduler) -> Callable[[], None]:
    """Calls the scheduler around every optimizer step of the process; returns what ends that."""
    alive = weakref.ref(scheduler)

    @_disable
    def before(optimizer: Optimizer, *_: Any) -> None:
        if (target := alive()) is not None:
            target.before_optimizer_step(optimizer)

    @_disable
    def after(optimizer: Optimizer, *_: Any) -> None:
        if (target := alive()) is not None:
            target.after_optimizer_step(optimizer)

    handles = (register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after))

    def remove() -> None:
        for handle in handles:
            handle.remove()

    weakref.finalize(scheduler, remove)
    return remove


def _watch_backward(outputs: Iterable[Any], capture: Capture) -> None:
    """Makes the outputs' backward name what it cannot do; torch would fail later, or speak of its own internals."""

    def check(_: Any) -> None:
        if torch.is_grad_enabled():
            raise BackwardError(
                "backward(create_graph=True) needs a second backward, which compiled graphs do not have. "
                "Use slimfit_fx.undo(model) for the steps that differentiate gradients."
            )
        if _get_current_graph_task_keep_graph() and not capture.retainable:
            raise BackwardError(
                "backward(retain_graph=True): the compiled backward reuses the memory of saved tensors. Set "
                "torch._functorch.config.donated_buffer = False before the model's first training call to allow it."
            )

    for output in outputs:
        if isinstance(output, Tensor) and output.grad_fn is not None:
            output.grad_fn.register_prehook(check)
            return
