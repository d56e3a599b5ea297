"""Modules that torch's `fully_shard` (FSDP2) took, and the parameters that it puts in place of the sharded ones."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from weakref import WeakSet, ref

import torch.distributed as dist
from torch import nn

from slimfit_fx.config import Config
from slimfit_fx.errors import ConfigError, ModelError, StateError
from slimfit_fx.torch_internals import FsdpParameter, fsdp_parameters, fsdp_sends_zeros

from .regions import captured_modules


class Units:
    """The units of FSDP2 in a model, as they were when it was transformed. It does not hold the model.

    While a unit runs, FSDP2 puts whole parameters in the place of the sharded ones: graphs get those, and optimizers
    have the others. They stay the same objects from the first run of the unit on.

    Raises:
        ModelError: a unit is inside of what is captured as one graph, parameters are on the host or tensor parallel.
        ConfigError: `closed_state="host"` of a model with units.
    """

    def __init__(self, model: nn.Module, config: Config) -> None:
        self._model = ref(model)
        self._units: WeakSet[nn.Module] = WeakSet(module for _, module in find_units(model))
        self._checked = False  # that nothing was sharded later
        self._whole: dict[nn.Parameter, nn.Parameter] = {}  # whole parameter to sharded one
        self._new: list[tuple[nn.Parameter, nn.Parameter]] = []  # of these, what nobody took yet
        if self:
            _check_regions(model, config)
            _check_parameters(self._parameters())
            if config.closed_state == "host":
                raise ConfigError(
                    "closed_state='host' moves the states of whole tensors, and fully_shard (FSDP2) shares them out "
                    "over the ranks. Take closed_state='none', or 'device'."
                )

    def __bool__(self) -> bool:
        return len(self._units) > 0

    def check(self) -> None:
        """Call when a training forward begins.

        Raises:
            ModelError: parts of the model were sharded after it was transformed.
            StateError: FSDP2 is told to reduce zeros for frozen layers.
        """
        if not self._checked:
            self.check_order()
            self._checked = True
        for unit in self._units:
            if fsdp_sends_zeros(unit):
                raise StateError(
                    "set_reduce_scatter_unused_params(True): FSDP2 would send zeros for frozen layers, and optimizers "
                    "would move them. Set it to False: all ranks freeze the same layers, and what is frozen is not "
                    "reduced."
                )

    def check_order(self) -> None:
        """Raises `ModelError` if parts of the model were sharded after it was transformed."""
        model = self._model()
        assert model is not None, "a model that is being called is alive"
        for path, module in find_units(model):
            if module not in self._units:
                raise ModelError(
                    f"{path or 'the model'} was sharded by fully_shard (FSDP2) after slimfit_fx.transform, so the "
                    "scheduler does not know its parameters. Shard first: fully_shard, then transform(model, "
                    "regions='blocks'), then the optimizer. slimfit_fx.undo(model) ends the transformation."
                )

    def original(self, parameter: nn.Parameter) -> nn.Parameter:
        """The sharded parameter that `parameter` stands for now; itself if it stands for none."""
        if not self._units:
            return parameter
        if parameter not in self._whole:
            self._look()
        if parameter in self._whole:
            return self._whole[parameter]
        return next((p.sharded for p in self._parameters() if p.after_forward is parameter), parameter)

    def take_new(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """The whole parameters that were made since the last call, each with the sharded one that it stands for."""
        self._look()
        new, self._new = self._new, []
        return new

    def _look(self) -> None:
        for each in self._parameters():
            if each.whole is not None and self._whole.get(each.whole) is not each.sharded:
                self._whole[each.whole] = each.sharded
                self._new.append((each.whole, each.sharded))

    def _parameters(self) -> Iterator[FsdpParameter]:
        for unit in self._units:
            yield from fsdp_parameters(unit)


def find_units(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules of `model` that `fully_shard` took, with their paths. Cheap where FSDP2 was never imported."""
    if not dist.is_available() or "torch.distributed.fsdp" not in sys.modules:
        return []
    from torch.distributed.fsdp import FSDPModule

    named = list(model.named_modules())
    return [(path, module) for path, module in named if issubclass(type(module), FSDPModule)]


def is_unit(module: nn.Module) -> bool:
    """Whether `fully_shard` took this very module: its calls run hooks of FSDP2."""
    return any(path == "" for path, _ in find_units(module))


def check_one_graph(model: nn.Module) -> None:
    """Raises `ModelError` if `fully_shard` holds a part of a model whose calls, hooks and all, become one graph."""
    for path, _ in find_units(model):
        raise ModelError(
            f"{path or 'the model'} is sharded by fully_shard (FSDP2), whose hooks have to run outside of the graphs. "
            "Call slimfit_fx.transform(model, regions='blocks') instead of torch.compile."
        )


def _check_regions(model: nn.Module, config: Config) -> None:
    """Hooks of a unit inside of a region would be traced into its graph."""
    paths = {module: path for path, module in model.named_modules()}
    for region in captured_modules(model, config):
        for path, unit in find_units(region):
            if unit is not region:
                where = paths[region] or "the model"
                advice = (
                    "Shard its repeated blocks and the model around them, and call transform(model, regions='blocks')."
                    if config.regions == "model"
                    else f"Shard {where} itself instead."
                )
                raise ModelError(
                    f"{path} in {where} is sharded by fully_shard (FSDP2), and {where} is captured as one graph: "
                    f"FSDP2's hooks have to run outside of the graphs. {advice}"
                )


def _check_parameters(parameters: Iterator[FsdpParameter]) -> None:
    for each in parameters:
        if each.tensor_parallel:
            raise ModelError(
                "the model is tensor parallel besides being sharded by fully_shard (FSDP2): gates of parameters that "
                "graphs get in parts are not supported. Shard with fully_shard alone."
            )
        mesh = each.sharded.device_mesh  # type: ignore[attr-defined]
        if each.sharded.device.type not in (mesh.device_type, "meta"):
            raise ModelError(
                f"parameters stay on {each.sharded.device.type} while the ranks compute on {mesh.device_type} "
                "(CPUOffloadPolicy of fully_shard): statistics of layers would wait for copies. Leave the policy out."
            )
