"""What belongs to one transformed model: its layers, gates, scheduler and captured graphs."""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, fx, nn
from torch._C._autograd import _get_current_graph_task_keep_graph  # type: ignore[import-not-found]
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from .backend import Capture, compile_capture
from .config import Config
from .errors import BackwardError, StateError
from .gates import Gates
from .layers import Layer, check_modules, check_sharding, find_layers
from .plan import Plan, merge_plans
from .presets import CodecRules
from .regions import Region
from .scheduler import Scheduler

_numbers = itertools.count()
# what a compiler of the user's, of the optimizer step or of the whole model, calls and does not look into
not_traced: Callable[[Any], Any] = torch.compiler.disable


@dataclass(frozen=True)
class Run:
    """One call of a captured graph.

    Attributes:
        layers: the layer behind each gate of the graph; None where there is none.
        path: of the module that was called.
    """

    capture: Capture
    layers: tuple[int | None, ...]
    path: str

    @property
    def plan(self) -> Plan:
        """What this call saves, in terms of the model."""
        return self.capture.plan.placed(self.layers, self.path)


class Session:
    """The state behind `transform(model)`. It holds the model's parameters, but not the model.

    Attributes:
        layers: what each gate freezes, in the order of the gate table.
        captures: one for each graph that was compiled; several with regions, after a graph break or a recompile.
        active: what the last forward ran, in order.
        compiled_modules: those whose calls are compiled ones.
    """

    def __init__(self, model: nn.Module, config: Config) -> None:
        parameters = dict(model.named_parameters())
        self.config = config
        check_sharding(model)
        check_modules(model, config)
        self.layers: list[Layer] = find_layers(model, config)
        self.gates = Gates([layer.name for layer in self.layers])
        self.captures: list[Capture] = []
        self.active: list[Run] = []
        self._finished: list[Run] = []
        self.scheduler = Scheduler(self.gates, self.layers, parameters, config)
        self._layer_of = {
            id(parameters[name]): index for index, layer in enumerate(self.layers) for name in layer.parameters
        }
        self._known = set(map(id, parameters.values()))
        self.compiled_modules: WeakSet[nn.Module] = WeakSet()
        self._path = ""  # of the region that is being called
        self._hooks = _listen_to_optimizers(self.scheduler)

    @property
    def plan(self) -> Plan:
        """Of what the last forward ran."""
        return merge_plans(run.plan for run in self.active if run.capture.split is not None)

    def close(self) -> None:
        """Stops listening to optimizers and opens all gates."""
        self._hooks()
        self.gates.set(self.gates.names)

    def begin_forward(self) -> None:
        """The graphs that run from now on belong to another forward."""
        if self.active and self.active != self._finished:
            self._finished = self.active
            self.scheduler.plan = self.plan
        self.active = []

    def compiled(self, regions: Sequence[Region]) -> list[Callable[..., Any]]:
        """For each region a function that calls its module with compiled graphs, which regions of a kind share.

        Dynamo keeps backends for ever, and compiled graphs for longer than the model; so ours do not hold the session.
        """
        backend = _weak(self.compile)
        kinds = {region.kind: type(region.module).__name__ for region in regions}
        functions = {kind: torch.compile(own_code(name), backend=backend) for kind, name in kinds.items()}

        def compiled(region: Region) -> Callable[..., Any]:
            function = functions[region.kind]

            def call(*args: Any, **kwargs: Any) -> Any:
                outer, self._path = self._path, region.path
                try:
                    return function(region.module, *args, **kwargs)
                finally:
                    self._path = outer

            return call

        return [compiled(region) for region in regions]

    def compile(self, module: fx.GraphModule, inputs: Sequence[Any], *, delimits: bool = False) -> Callable[..., Any]:
        """The torch.compile backend: a graph from Dynamo to a callable on the graph's inputs.

        Args:
            module: the graph.
            inputs: what it is called with now. Later calls may bring other parameters: those of another block.
            delimits: whether a call that was there already begins another forward, for want of `begin_forward`.
        """
        capture = Capture(
            gated=tuple(position for position, tensor in enumerate(inputs) if id(tensor) in self._layer_of),
            activations=frozenset(i for i, x in enumerate(inputs) if isinstance(x, Tensor) and not x.is_leaf),
        )
        rules = CodecRules(self.config.preset, self.config.codecs, self._path)
        compiled = compile_capture(module, inputs, capture, rules, self.config.mode)
        self.captures.append(capture)
        return functools.partial(_weak(self._run), capture, compiled, delimits)

    def _run(self, capture: Capture, compiled: Callable[..., Any], delimits: bool, *arguments: Any) -> Any:
        """Calls a compiled graph with the gates of the moment."""
        run = Run(capture, self._layers([arguments[position] for position in capture.gated]), self._path)
        if delimits and run in self.active:
            self.begin_forward()
        self.scheduler.step()
        if not self.active:
            self.scheduler.compare_ranks()
        self.active.append(run)
        if not capture.ran:
            self.scheduler.check_budget(self.plan)
            capture.ran = True
        outputs = compiled(*arguments, self.gates.read(run.layers))
        _watch_backward(outputs, capture)
        return outputs

    def _layers(self, parameters: Sequence[Any]) -> tuple[int | None, ...]:
        """The layers of parameters; None for one without a gate, which another block had."""
        layers = tuple(self._layer_of.get(id(parameter)) for parameter in parameters)
        if None in layers and not self._known.issuperset(map(id, parameters)):
            raise StateError(
                "parameters of the model were replaced after slimfit_fx.transform, for example by "
                "load_state_dict(assign=True), so the scheduler does not know them. Replace them first, or call "
                "slimfit_fx.undo(model) and transform it again."
            )
        return layers


def _weak(method: Callable[..., Any]) -> Callable[..., Any]:
    """`method` without a hold on its object."""
    reference = weakref.WeakMethod(method)

    def call(*args: Any, **kwargs: Any) -> Any:
        alive = reference()
        if alive is None:
            raise StateError("slimfit_fx.undo ended this: call the model that it returned, or torch.compile that again")
        return alive(*args, **kwargs)

    return call


def own_code(name: str) -> FunctionType:
    """A function that calls a module, with a code object of its own.

    Dynamo keeps compiled graphs, their recompile limit and what it learnt of dynamic shapes by code object. Under the
    module's own code, which all modules of a class share, the ninth model of a sweep would run uncompiled.
    """

    def train(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return module._call_impl(*args, **kwargs)

    code = train.__code__.replace(co_name=f"train_{name}_{next(_numbers)}")
    return FunctionType(code, train.__globals__, code.co_name)


def _listen_to_optimizers(scheduler: Scheduler) -> Callable[[], None]:
    """Calls the scheduler around every optimizer step of the process; returns what ends that."""
    alive = weakref.ref(scheduler)

    @not_traced
    def before(optimizer: Optimizer, *_: Any) -> None:
        if (target := alive()) is not None:
            target.before_optimizer_step(optimizer)

    @not_traced
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
