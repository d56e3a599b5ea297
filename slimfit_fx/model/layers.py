"""Which parameters of a model can be frozen, and which of them share a gate."""

from __future__ import annotations

import re
import warnings
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from slimfit_fx.config import Config
from slimfit_fx.errors import ConfigError, ModelError, SlimFitWarning, StateError
from slimfit_fx.module_paths import matches
from slimfit_fx.roles import ROLES

from .head import find_head as find_head
from .regions import captured_modules


@dataclass(frozen=True)
class Layer:
    """What one gate freezes: `parameters` are names as in `model.named_parameters()`."""

    name: str
    parameters: tuple[str, ...]
    always_open: bool = False


def find_layers(model: nn.Module, config: Config) -> list[Layer]:
    """The layers of `model` in the order of its parameters (paper, section 3: weights and norm weights).

    Biases and other vectors have no gate: their gradients need no saved activation. Nor has an embedding with sparse
    gradients, a parameter without elements, or what lies outside of all regions and so is in no graph, such as a class
    token with `regions="blocks"`.

    Raises:
        ModelError: nothing in the model can be frozen.
        ConfigError: a pattern matches no parameter.
    """
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    norms = _norm_weights(model)
    captured = {id(parameter) for module in captured_modules(model, config) for parameter in module.parameters()}
    excluded = set(_match("never_gate", config.never_gate, trained))
    excluded |= {name for name, parameter in model.named_parameters() if id(parameter) not in captured}
    excluded |= _sparse_weights(model)
    gated = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.numel() and name not in excluded
        if parameter.dim() > 1 or name in norms
    ]
    if not gated:
        reason = "no parameter requires a gradient" if not trained else f"{len(trained)} trained parameters, none gated"
        raise ModelError(
            f"{type(model).__name__} has no layer to freeze ({reason}): a layer is a parameter that requires a "
            "gradient and is a matrix or a norm's weight. Unfreeze the model, or relax never_gate."
        )
    if config.always_open is None:
        head = set(find_head(model, gated))
    else:
        head = set(_match("always_open", config.always_open, trained))

    groups: dict[str, list[str]] = {}
    for name in gated:
        groups.setdefault(_group(name, config.granularity), []).append(name)
    return [Layer(name, tuple(members), not head.isdisjoint(members)) for name, members in groups.items()]


def warn_if_all_open(model: nn.Module, layers: Sequence[Layer], config: Config) -> None:
    """Warns where a freezing rate or budget freezes nothing although nobody said that all layers stay open."""
    freezes = config.freeze_rate > 0 or config.budget is not None
    if config.always_open is None and freezes and all(layer.always_open for layer in layers):
        names = ", ".join(layer.name for layer in layers[:3])
        warnings.warn(
            f"slimfit_fx: every layer of {type(model).__name__} counts as its head ({len(layers)}, such as {names}), "
            "and is always open: none is frozen. Name in always_open what has to train at every step, () for nothing; "
            "or set freeze_rate=0.",
            SlimFitWarning,
            stacklevel=2,
        )


def check_modules(model: nn.Module, config: Config) -> None:
    """Raises `ConfigError` if a codec is meant for modules that are not there."""
    paths = [name for name, _ in model.named_modules()]
    found = {pattern for path in paths for pattern in matches(config.codecs, path)}
    for pattern in config.codecs:
        if pattern not in ROLES and pattern not in found:
            raise ConfigError(
                f"codecs: {pattern!r} is no role ({', '.join(ROLES)}) and matches no module; "
                f"modules are called {', '.join(paths[1:4])}"
            )


def check_known(model: nn.Module | None, inputs: Iterable[Any], known: Container[int]) -> None:
    """Raises `StateError` if a graph trains matrices of the model that it did not have when it was transformed.

    A new bias has no gate in any case, and does no harm.

    Args:
        inputs: of the graph.
        known: identities of the parameters that the model had.
    """
    matrices = (p for p in inputs if isinstance(p, nn.Parameter) and p.requires_grad and p.dim() > 1)
    added = {id(matrix) for matrix in matrices if id(matrix) not in known}
    if not added or model is None:
        return
    names = [name for name, parameter in model.named_parameters() if id(parameter) in added]
    if names:
        raise StateError(
            f"parameters of the model were added or replaced after slimfit_fx.transform, for example {names[0]}: by a "
            "new head, an adapter, or load_state_dict(assign=True). The scheduler does not know them. Do that first, "
            "or call slimfit_fx.undo(model) and transform it again."
        )


def check_shapes(model: nn.Module) -> None:
    """Raises `ModelError` if a module was not called yet, and has parameters without a shape."""
    lazy = [name for name, parameter in model.named_parameters() if is_lazy(parameter)]
    if lazy:
        raise ModelError(f"{lazy[0]} has no shape yet: call the model on a batch first, then transform it")


def _sparse_weights(model: nn.Module) -> set[str]:
    """Weights of embeddings whose gradients are sparse: they cannot be computed under a condition."""
    return {
        f"{prefix}.weight" if prefix else "weight"
        for prefix, module in model.named_modules()
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse
    }


def _norm_weights(model: nn.Module) -> set[str]:
    """Weights of normalisation modules of any library, found by the name of their class."""
    return {
        f"{prefix}.weight" if prefix else "weight"
        for prefix, module in model.named_modules()
        if "norm" in type(module).__name__.lower() and isinstance(getattr(module, "weight", None), nn.Parameter)
    }


def _group(name: str, granularity: str) -> str:
    """The name of the layer that the parameter `name` belongs to."""
    if granularity == "module":
        return name.rpartition(".")[0] or name
    if granularity == "block":
        block = re.match(r".*?\.\d+(?=\.)", name)
        return block.group() if block else name.rpartition(".")[0] or name
    return name


def _match(field: str, patterns: Iterable[str], names: Iterable[str]) -> list[str]:
    """The names in which one of `patterns` is found; a pattern that is found in none raises `ConfigError`."""
    names = list(names)
    matches = {pattern: [name for name in names if re.search(pattern, name)] for pattern in patterns}
    for pattern, found in matches.items():
        if not found:
            raise ConfigError(
                f"{field}: {pattern!r} matches no trained parameter; names look like {', '.join(names[:3])}"
            )
    return [name for name in names if any(name in found for found in matches.values())]
