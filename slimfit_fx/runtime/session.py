"""What belongs to one transformed model: its layers, gates, scheduler and captured graphs."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn

from slimfit_fx.compiler.backend import compile_capture
from slimfit_fx.compiler.capture import Capture
from slimfit_fx.compiler.compile_options import check_compile_options
from slimfit_fx.compiler.dynamo import own_code, own_error, retry_skipped_frames
from slimfit_fx.compiler.origin import origin_of
from slimfit_fx.compiler.pipeline import check_disabled
from slimfit_fx.config import Config
from slimfit_fx.errors import StateError
from slimfit_fx.graph.plan import Plan, merge_plans
from slimfit_fx.model.fsdp import Units, is_unit
from slimfit_fx.model.gate_table import Gates
from slimfit_fx.model.layers import Layer, check_known, check_modules, find_layers
from slimfit_fx.model.places import Places
from slimfit_fx.model.regions import Region
from slimfit_fx.presets import CodecRules
from slimfit_fx.scheduling import Scheduler
from slimfit_fx.scheduling.hooks import listen_to_optimizers

from .backward_guard import watch_backward
from .left_out import LeftOut
from .outside import OutsideGradients
from .parameter_hooks import spare_hooks
from .recompiles import Recompiles
from .run import Run
from .unfound_heads import UnfoundHeads


class Session:
    """The state behind `transform(model)`. It holds the model's parameters, but not the model.

    Attributes:
        layers: what each gate freezes, in the order of the gate table.
        captures: one for each graph that was compiled; several with regions, after a graph break or a recompile.
        active: what the forward under way, or else the last one, ran for a backward, in order.
        graph_calls: how often a graph was called.
        calls: the compiled calls that modules have; weak, for they hold the model.
        outside: what no graph computes.
        generate: what makes a callable of a graph, with mode="inductor"; None for Inductor's own.
    """

    def __init__(self, model: nn.Module, config: Config) -> None:
        self.config = config
        check_disabled(config.disable_passes)
        check_compile_options(config.compile_options)
        self._units = Units(model, config)
        check_modules(model, config)
        parameters = {name: self._units.original(parameter) for name, parameter in model.named_parameters()}
        self.layers: list[Layer] = find_layers(model, config)
        self.gates = Gates([layer.name for layer in self.layers])
        self.captures: list[Capture] = []
        self.active: list[Run] = []
        self.graph_calls = 0
        self.generate: Callable[..., Any] | None = None
        self.calls: WeakKeyDictionary[nn.Module, weakref.ref[Callable[..., Any]]] = WeakKeyDictionary()
        layer_of = {parameters[name]: index for index, layer in enumerate(self.layers) for name in layer.parameters}
        self.outside = OutsideGradients(model, self.gates, layer_of, _weak(self._why_outside))
        self.scheduler = Scheduler(self.gates, self.layers, parameters, config)
        self._layer_of = {id(parameter): layer for parameter, layer in layer_of.items()}
        self._known = set(map(id, parameters.values()))
        self._model = weakref.ref(model)
        self._finished: list[Run] = []  # what the last whole forward ran
        self._under_way = False
        self._left_out = LeftOut()
        self._unfound_heads = UnfoundHeads(config)
        self._recompiles = Recompiles()
        self._path = ""  # of the region that is being called
        self._places = Places(model, {n: parameters[n] for layer in self.layers for n in layer.parameters}, self._units)
        self._hooks = listen_to_optimizers(self.scheduler)

    @property
    def plan(self) -> Plan:
        """Of what the last forward ran."""
        return merge_plans(run.plan for run in self.active)

    @property
    def outside_layers(self) -> list[str]:
        """The layers that are known to train outside of the graphs, if only by a part of their gradient."""
        return [self.layers[layer].name for layer in sorted(self.outside.layers)]

    @property
    def uncovered_layers(self) -> list[str]:
        """The layers that no graph of the last forward has."""
        covered = {layer for run in self.active for layer in run.layers}
        return [layer.name for index, layer in enumerate(self.layers) if index not in covered]

    @property
    def left_out(self) -> list[str]:
        """Why torch.compile left code of the model out, in its own words."""
        return self._left_out.reasons

    def layer_shared_with(self, model: nn.Module) -> str | None:
        """The name in `model` of a parameter that has a gate here."""
        return next((name for name, parameter in model.named_parameters() if id(parameter) in self._layer_of), None)

    def close(self) -> None:
        """Stops listening to optimizers and to gradients, and opens all gates."""
        self._hooks()
        self.outside.close()
        self.gates.set(self.gates.names)

    @contextmanager
    def forward(self) -> Iterator[None]:
        """What runs inside is one forward of the model.

        One that ends in an exception leaves nothing behind: the last whole forward stays the last, and Dynamo tries
        the frames again that it gave up because of the exception.

        Raises:
            BackendError: no graph ran.
        """
        if self._under_way:  # the model calls itself
            yield
            return
        self.begin_forward()
        self._left_out.begin()
        self._under_way, before = True, self.graph_calls
        try:
            yield
            if self.graph_calls == before:
                raise self._left_out.error("the model")
            self._left_out.collect()
            self._finish_forward()
        except BaseException:
            self.active = self._finished
            retry_skipped_frames()
            raise
        finally:
            self._under_way = False

    def begin_forward(self) -> None:
        """The graphs that run from now on belong to another forward.

        Raises:
            StateError: gated parameters were replaced.
            BackwardError: it runs inside of a transform of torch.func.
            ModelError: `fully_shard` took parts of the model after it was transformed.
        """
        self._units.check()
        self._places.check()
        self.outside.follow_stream()
        self._finish_forward()
        self.active = []

    def _finish_forward(self) -> None:
        if self.active and self.active != self._finished:
            self._finished = self.active
            self.scheduler.plan = self.plan
            self._unfound_heads.check(self.plan)

    def region_left_out(self, path: str) -> None:
        """The region at `path` ran without a graph: the rest trains on. Raises `BackendError` if it was compiled too
        often."""
        self._left_out.check_limit(path or "the model")

    def compiled(self, regions: Sequence[Region]) -> list[Callable[..., Any]]:
        """For each region a function that calls its module with compiled graphs, which regions of a kind share.

        Dynamo keeps backends for ever, and compiled graphs for longer than the model; so ours do not hold the session.
        """
        backend = _weak(self.compile)
        kinds = {region.kind: type(region.module).__name__ for region in regions}
        bare = {region.kind for region in regions if is_unit(region.module)}
        functions = {k: torch.compile(own_code(name, k in bare), backend=backend) for k, name in kinds.items()}

        def compiled(region: Region) -> Callable[..., Any]:
            function = functions[region.kind]

            def call(*args: Any, **kwargs: Any) -> Any:
                outer, self._path = self._path, region.path
                try:
                    return function(region.module, *args, **kwargs)
                except Exception as error:
                    if (own := own_error(error)) is error:
                        raise
                    raise own from own.__cause__
                finally:
                    self._path = outer

            return call

        return [compiled(region) for region in regions]

    def compile(self, module: fx.GraphModule, inputs: Sequence[Any], *, delimits: bool = False) -> Callable[..., Any]:
        """The torch.compile backend: a graph from Dynamo to a callable on the graph's inputs.

        Args:
            module: the graph.
            inputs: what it is called with now. Later calls may bring other parameters: those of another block.
            delimits: whether a call that was there already begins another forward, for want of `forward`.
        """
        self._places.check()
        self._meet_whole()
        check_known(self._model(), inputs, self._known)
        self.outside.watch()
        capture = Capture(
            gated=tuple(position for position, tensor in enumerate(inputs) if id(tensor) in self._layer_of),
            origin=origin_of(module, self._path),
            activations=frozenset(i for i, x in enumerate(inputs) if isinstance(x, Tensor) and not x.is_leaf),
        )
        self._recompiles.saw(capture.origin, delimits or bool(self._finished))
        rules = CodecRules(self.config.preset, self.config.codecs, self._path)
        compiled = compile_capture(module, inputs, capture, rules, self.config, self.generate)
        self.captures.append(capture)
        return functools.partial(_weak(self._run), capture, compiled, delimits)

    def _run(self, capture: Capture, compiled: Callable[..., Any], delimits: bool, *arguments: Any) -> Any:
        """Calls a compiled graph with the gates of the moment."""
        self.graph_calls += 1
        gated = [arguments[position] for position in capture.gated]
        if delimits:
            self._places.check()
        run = Run(capture, self._layers(gated), self._path)
        if capture.split is None:  # no backward will follow
            return compiled(*arguments, self.gates.read(run.layers))
        if run in self.active and (delimits or (self._path and not self._under_way)):  # a block called by itself
            self.begin_forward()
        self.scheduler.begin_forward()
        if not self.active:
            self.scheduler.compare_ranks()
        self.active.append(run)
        if not capture.ran:
            self.scheduler.check_budget(self.plan)
            capture.ran = True
        flags = self.gates.read(run.layers)
        self.outside.graph_ran(run.layers, flags.tolist())
        spare_hooks(gated)
        outputs = compiled(*arguments, flags)
        watch_backward(outputs, capture, functools.partial(_begin_backward, gated, weakref.ref(self.scheduler)))
        return outputs

    def _layers(self, parameters: Sequence[Any]) -> tuple[int | None, ...]:
        """The layers of parameters; None for one without a gate, which another block had."""
        if any(id(parameter) not in self._layer_of for parameter in parameters):
            self._meet_whole()
            self._places.check()
        return tuple(self._layer_of.get(id(parameter)) for parameter in parameters)

    def _meet_whole(self) -> None:
        """FSDP2 makes whole parameters in the first run of a unit: they have the gates of the sharded ones."""
        for whole, sharded in self._units.take_new():
            self._known.add(id(whole))
            if (layer := self._layer_of.get(id(sharded))) is not None:
                self._layer_of[id(whole)] = layer
                self.outside.follow(whole, layer)

    def _why_outside(self) -> str:
        """Why gradients come from outside of the graphs, and the way out.

        Raises:
            StateError: the compiled calls of the model are no longer in their place.
        """
        if any(module._compiled_call_impl is not call() for module, call in self.calls.items()):
            raise StateError(
                "the model, or a block of it, was compiled after slimfit_fx.transform, which took the place of our "
                "call: gates have no effect. Leave model.compile() out, transform compiles the model itself; "
                "slimfit_fx.undo(model) gives the plain model back."
            )
        if not self.graph_calls:
            return (
                "No graph of the model ran: call it as model(...), in training mode. model.forward(...), a part of the "
                "model called by itself, and calls in eval mode are not compiled. If a part is what you train, "
                "transform that part."
            )
        return str(self._left_out)


def _weak(method: Callable[..., Any]) -> Callable[..., Any]:
    """`method` without a hold on its object."""
    reference = weakref.WeakMethod(method)

    def call(*args: Any, **kwargs: Any) -> Any:
        alive = reference()
        if alive is None:
            raise StateError("slimfit_fx.undo ended this: call the model that it returned, or torch.compile that again")
        return alive(*args, **kwargs)

    return call


def _begin_backward(gated: Sequence[Tensor], scheduler: weakref.ref[Scheduler]) -> None:
    """A backward is about to hand out the gradients of `gated`, None for closed ones."""
    spare_hooks(gated)  # what was registered since the forward
    if (target := scheduler()) is not None:
        target.backward_began()
