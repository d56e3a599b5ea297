"""Where a model's head is: what was freshly initialised on top of a pretrained body, whatever wraps them."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

# What a classifier is called in models that do not say themselves where their head is.
_HEAD_NAMES = r"^(classifier|head|fc|score|qa_outputs)\."


def find_head(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Those parameter names that belong to the model's head, which is always open by default.

    transformers: what is outside of the base model, less a language model's output embedding; timm: the classifier;
    a module around such models: what is outside of them, and their heads; a wrapper of a single module (PEFT,
    DistributedDataParallel): that module's; otherwise by name.
    """
    head = _head(model)
    by_name = dict(model.named_parameters())
    return [name for name in names if id(by_name[name]) in head]


def _head(module: nn.Module) -> set[int]:
    """Identities of the head's parameters."""
    base = _base_model(module)
    if base is not None:
        output = getattr(module, "get_output_embeddings", lambda: None)()
        return _parameters(module) - _parameters(base) - (set() if output is None else _parameters(output))
    if _says_its_classifier(module):
        classifier = module.get_classifier()  # type: ignore[operator]
        if isinstance(classifier, nn.Module):
            return _parameters(classifier)
    elif not _is_transformer(module):
        children = [child for child in module.children() if next(child.parameters(), None) is not None]
        bodies = [child for child in children if any(map(_is_pretrained, child.modules()))]
        if not bodies and len(children) == 1 and _parameters(children[0]) == _parameters(module):
            bodies = children
        if bodies:
            outside = _parameters(module).difference(*map(_parameters, bodies))
            return outside.union(*map(_head, bodies))
    return {id(parameter) for name, parameter in module.named_parameters() if re.search(_HEAD_NAMES, name)}


# Classes and children are asked, not attributes: PEFT's wrappers forward these to what they wrap.


def _base_model(module: nn.Module) -> nn.Module | None:
    """The base model inside of a transformers model with a head."""
    return module._modules.get(getattr(type(module), "base_model_prefix", "") or "")


def _is_transformer(module: nn.Module) -> bool:
    return hasattr(type(module), "base_model_prefix")


def _says_its_classifier(module: nn.Module) -> bool:
    return hasattr(type(module), "get_classifier")


def _is_pretrained(module: nn.Module) -> bool:
    return _is_transformer(module) or _says_its_classifier(module)


def _parameters(module: nn.Module) -> set[int]:
    return set(map(id, module.parameters()))
