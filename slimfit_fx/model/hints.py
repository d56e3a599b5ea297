"""What a model's own settings will cost, known before the first step."""

from __future__ import annotations

import dis
import inspect
from collections.abc import Collection, Iterator
from typing import Any

from torch import Tensor, nn

from slimfit_fx.config import Config
from slimfit_fx.hints import Hints
from slimfit_fx.sizes import size_text

from .layers import Layer

# Of the elements that train: an embedding with a smaller part of them is not the first thing to look at.
_LARGE = 1 / 4


def hint_at_costs(model: nn.Module, layers: Collection[Layer], config: Config) -> None:
    """Says what will hurt in training `model`, once each."""
    hints = Hints()
    hints.give("problem type", unset_problem_type, model)
    hints.give("embedding", large_embedding, model, _never_trained(layers, config))


def unset_problem_type(model: nn.Module) -> str | None:
    """A classifier of transformers that sets its `config.problem_type` in the first forward: a changed guard."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if getattr(config, "problem_type", "") is None and _sets_problem_type(module):
            fitting = '"regression"' if config.num_labels == 1 else '"single_label_classification"'  # type: ignore[union-attr]
            return (
                f"Everything will be compiled twice: {type(module).__name__} sets its config.problem_type in the first "
                f"forward. Set it before that: model.config.problem_type = {fitting}, or what else the labels are."
            )
    return None


def large_embedding(model: nn.Module, never_trained: Collection[str] = ()) -> str | None:
    """A dense embedding that trains, and is a large part of what does: of a model of transformers that of its words.

    Args:
        never_trained: names of parameters that require gradients, and whose layers stay closed.
    """
    named = {n: p for n, p in model.named_parameters() if p.requires_grad and n not in never_trained}
    names = {id(parameter): name for name, parameter in named.items()}
    elements = sum(parameter.numel() for parameter in named.values())
    words = _word_embedding(model)
    for path, module in model.named_modules():
        if not isinstance(module, nn.Embedding) or module.sparse or id(module.weight) not in names:
            continue
        if words is not None and module is not words:
            continue
        weight = module.weight
        if weight.numel() > _LARGE * elements:
            shared = [name for name in _names_of(model, weight) if name != f"{path}.weight"]
            also = f" That freezes {' and '.join(shared)}, too, which it shares." if shared else ""
            way = "model.get_input_embeddings()" if module is words else _written(path)
            return (
                f"{path or 'The model'} has {weight.numel() / elements:.0%} of the elements that train: its dense "
                f"gradient and the two moments of AdamW take {size_text(3 * weight.numel() * weight.element_size())}. "
                f"To spare that, freeze it before transform: {way}.requires_grad_(False).{also}"
            )
    return None


def _never_trained(layers: Collection[Layer], config: Config) -> set[str]:
    """The parameters of layers that no step opens."""
    if config.policy != "static":
        return set()
    return {name for layer in layers if not layer.always_open for name in layer.parameters}


def _names_of(model: nn.Module, parameter: Tensor) -> Iterator[str]:
    named = model.named_parameters(remove_duplicate=False)
    return (name for name, other in named if other is parameter)


def _word_embedding(model: nn.Module) -> nn.Module | None:
    """What a model of transformers says that it is."""
    try:
        return model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):  # not a model of transformers, or one without
        return None


def _written(path: str) -> str:
    """How a user writes the module at `path`."""
    if not path:
        return "model"
    return f"model.{path}" if all(map(str.isidentifier, path.split("."))) else f"model.get_submodule({path!r})"


def _sets_problem_type(module: nn.Module) -> bool:
    """Whether the module's forward, or the loss function that it calls, assigns to it."""
    forward = _code_of(type(module).forward)
    if forward is None:
        return False
    if _assigns(forward):
        return True
    calls_loss = "loss_function" in forward.co_names
    loss = _code_of(getattr(module, "loss_function", None)) if calls_loss else None
    return loss is not None and _assigns(loss)


def _code_of(function: Any) -> Any:
    return getattr(inspect.unwrap(function), "__code__", None) if callable(function) else None


def _assigns(code: Any) -> bool:
    return any(step.opname == "STORE_ATTR" and step.argval == "problem_type" for step in dis.get_instructions(code))
