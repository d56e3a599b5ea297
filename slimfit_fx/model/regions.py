"""What is captured on its own: the whole model, or its repeated blocks, where each kind of block is compiled once."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from slimfit_fx.config import Config
from slimfit_fx.errors import StateError
from slimfit_fx.module_paths import joined, matches


@dataclass(frozen=True)
class Region:
    """A module that is captured by itself.

    Attributes:
        path: of the module in the model, `""` for the model itself.
        module: whose training calls are compiled.
        kind: equal for regions that can share graphs. What it leaves out, Dynamo guards.
    """

    path: str
    module: nn.Module
    kind: Hashable


@dataclass(frozen=True)
class Place:
    """That `module` is the child `name` of `parent`, on the way to the region at `path`."""

    parent: nn.Module
    name: str
    module: nn.Module
    path: str


def find_regions(model: nn.Module, config: Config) -> list[Region]:
    """`model` itself, or, with `regions="blocks"`, its repeated blocks and the modules beside them.

    Repeated blocks are the members of a list or sequence of which two at least have the same structure. Of nested
    ones the outermost count: a layer, not the experts in it. A model without any is one region.
    """
    paths = {module: path for path, module in model.named_modules()}

    def kind(module: nn.Module) -> Hashable:
        inside = (joined(paths[module], name) for name, _ in module.named_modules())
        return _structure(module), tuple(tuple(matches(config.codecs, path)) for path in inside)

    return [Region(paths[module], module, kind(module)) for module in captured_modules(model, config)]


def places_of(model: nn.Module, regions: Sequence[Region]) -> list[Place]:
    """Where the regions and the modules around them hang."""
    places: dict[tuple[nn.Module, str], Place] = {}
    for region in regions:
        parent = model
        for name in region.path.split(".") if region.path else ():
            child = parent._modules[name]
            assert child is not None
            places[parent, name] = Place(parent, name, child, region.path)
            parent = child
    return list(places.values())


def check_places(places: Iterable[Place]) -> None:
    """Raises `StateError` if a module was replaced: the new one would run uncompiled, and train at every step."""
    for place in places:
        if place.parent._modules.get(place.name) is not place.module:
            raise StateError(
                f"{place.path}, or a module around it, was replaced after slimfit_fx.transform. Do that first, or call "
                "slimfit_fx.undo(model) and transform it again."
            )


def captured_modules(model: nn.Module, config: Config) -> list[nn.Module]:
    """The modules of the regions, each once."""
    return list(dict.fromkeys(_split(model))) if config.regions == "blocks" else [model]


def _split(module: nn.Module) -> Iterator[nn.Module]:
    """Its repeated blocks and the largest modules that have none inside; no module without parameters."""
    if next(module.parameters(), None) is None:
        return
    if not any(map(_repeats, module.modules())):
        yield module
    elif _repeats(module):
        yield from (block for block in module.children() if next(block.parameters(), None) is not None)
    else:
        for child in module.children():
            yield from _split(child)


def _repeats(module: nn.Module) -> bool:
    """Whether `module` is a list or sequence with two blocks, which are no mere layers, of the same structure."""
    if not isinstance(module, (nn.ModuleList, nn.Sequential)):
        return False
    blocks = [_structure(child) for child in module if next(child.children(), None) is not None]
    return len(set(blocks)) < len(blocks)


def _structure(module: nn.Module) -> str:
    """The modules inside with their options, and what trains."""
    parameters = [(name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in module.named_parameters()]
    return f"{module!r} {parameters}"
