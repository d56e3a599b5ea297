"""What a role or a module can be given: options that print, compare, hash and are written as JSON."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

import torch

from slimfit_fx.errors import ConfigError, choose

# JSON's key for the name of the class
_KIND = "codec"


@dataclass(frozen=True)
class Format(ABC):
    """How a saved tensor is stored: by a `Codec`, or as a `Choice` finds out from the graph.

    Subclasses, users' as well, are frozen dataclasses: they print, compare and hash by their options. The name of the
    class stands for it in JSON.
    """

    @property
    def label(self) -> str:
        """A few words for tables."""
        return repr(self)

    @abstractmethod
    def accepts(self, dtype: torch.dtype) -> bool:
        """Whether tensors of this dtype can be stored so."""

    @property
    def lossless(self) -> bool:
        """Whether the backward reads the tensor as it was, to the last bit."""
        return False

    def to_dict(self) -> dict[str, Any]:
        """The class's name and the options, in what JSON knows."""
        options = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            _KIND: type(self).__name__,
            **{_key(name): value.to_dict() if isinstance(value, Format) else value for name, value in options.items()},
        }

    @staticmethod
    def from_dict(options: Mapping[str, Any]) -> Format:
        """The inverse of `to_dict`, for every class that is defined by now.

        Raises:
            ConfigError: there is no such class, several of this name, or no such option; or an option is missing.
        """
        if not isinstance(options, Mapping):
            raise ConfigError(f"a codec is written as {{'codec': 'Quantize', 'bits': 8}}, got {options!r}")
        kind = _named(options.get(_KIND))
        known = {_key(field.name): field for field in fields(kind) if field.init}
        values = {}
        for key, value in options.items():
            if key != _KIND:
                field = known[choose(f"option of {kind.__name__}", key, known)]
                values[field.name] = Format.from_dict(value) if isinstance(value, Mapping) else value
        for key, field in known.items():
            if key not in options and field.default is MISSING and field.default_factory is MISSING:
                raise ConfigError(f"{kind.__name__} needs the option {key!r}, got {dict(options)!r}")
        return kind(**values)


def _key(name: str) -> str:
    """What JSON calls an option: `codec` is the name of the class there."""
    return f"{name}_" if name == _KIND else name


def _named(name: object) -> type[Format]:
    """The class of this name. One that was defined anew in its module, as notebooks do, replaces the older one."""
    kinds: dict[str, dict[str, type[Format]]] = {}
    for kind in _subclasses(Format):
        if not inspect.isabstract(kind):
            kinds.setdefault(kind.__name__, {})[kind.__module__] = kind
    by_module = kinds[choose("codec", name, kinds)]
    if len(by_module) > 1:
        raise ConfigError(f"several codecs have the name {name!r}, in {', '.join(by_module)}: give one another name")
    return next(iter(by_module.values()))


def _subclasses(kind: type[Format]) -> Iterator[type[Format]]:
    """All of them, those of subclasses too; what was defined later comes later."""
    for subclass in kind.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)
