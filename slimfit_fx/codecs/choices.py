"""Choices that only a graph can decide: store nothing, something else, or one or the other as the gates are.

A pass decides each of them, in the order `Derivative`, `Recompute`, `WhenFrozen`. So what is left over to a choice that
is decided later may be one, and nothing else may.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import Any, ClassVar, get_args, get_type_hints

import torch

from slimfit_fx.errors import ConfigError
from slimfit_fx.roles import ROLES

from .codec import Codec
from .format import Format
from .prune import TopK
from .quantize import Quantize

# Only products read these: no pointwise function does, nor a norm.
_OPERANDS = {"linear input", "feed-forward input", "attention operand", "convolution input"}
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Choice(Format):
    """Decided for each saved tensor by a pass, which leaves a `Codec`, None (as it is) or a later choice.

    The types of its fields say what it can leave.

    Attributes:
        roles: those that it can be chosen for by name; a regular expression may cover others, where what is for all
            other tensors holds.

    Raises:
        ConfigError: a field is something else, or a codec that does not encode floats.
    """

    roles: ClassVar[Collection[str]] = ROLES

    def __post_init__(self) -> None:
        for name, allowed in _formats_of(type(self)).items():
            self._check(name, getattr(self, name), allowed)

    @property
    @abstractmethod
    def default(self) -> Format | None:
        """What it comes to where its pass does not run: right gradients, if not the fewest bytes."""

    @property
    def formats(self) -> list[Format]:
        """What it may come to, None left out."""
        found = (getattr(self, name) for name in _formats_of(type(self)))
        return [format for format in found if format is not None]

    def accepts(self, dtype: torch.dtype) -> bool:
        return dtype in _FLOATS and all(format.accepts(dtype) for format in self.formats)

    def check_role(self, role: str) -> None:
        """Raises `ConfigError` if tensors of this role never are what it, or a choice in it, is for."""
        if role not in self.roles:
            raise ConfigError(
                f"codecs[{role!r}]: {type(self).__name__} finds nothing to do there. Choose a codec by itself, for "
                f"example Quantize(8); roles that it is for are {', '.join(map(repr, self.roles))}."
            )
        for format in self.formats:
            if isinstance(format, Choice):
                format.check_role(role)

    def _check(self, name: str, value: Any, allowed: Any) -> None:
        if isinstance(value, allowed):
            if value is not None and not any(map(value.accepts, _FLOATS)):
                raise ConfigError(f"{type(self).__name__}.{name}: {value.label} does not encode floats")
            return
        kinds = [kind.__name__ for kind in _kinds(allowed) if kind is not type(None)]
        none = " or None" if isinstance(None, allowed) else ""
        raise ConfigError(
            f"{type(self).__name__}.{name} takes a {' or '.join(kinds)}{none}, for example "
            f"slimfit_fx.codecs.Quantize(8); got {value!r}. {self._way_out(value)}".rstrip()
        )

    def _way_out(self, value: Any) -> str:
        allowed = _formats_of(type(value)).get("otherwise") if isinstance(value, Choice) else None
        if allowed is None or not isinstance(self, allowed):
            return ""
        return f"{type(value).__name__} is decided earlier: give it the {type(self).__name__} as its otherwise."


def _formats_of(kind: type[Choice]) -> dict[str, Any]:
    """The types of those fields that hold formats."""
    hints = get_type_hints(kind)
    found = {field.name: hints[field.name] for field in fields(kind)}
    return {name: hint for name, hint in found.items() if any(map(_is_format, _kinds(hint)))}


def _kinds(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the one type."""
    return get_args(hint) or (hint,)


def _is_format(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Format)


@dataclass(frozen=True)
class WhenFrozen(Choice):
    """Another codec while the norm that reads the tensor is frozen; while it trains the tensor is stored as it is, too.

    Attributes:
        codec: for frozen steps, and where no gated norm reads the tensor; None stores it as it is.
    """

    codec: Codec | None = TopK(0.1)  # noqa: RUF009  (frozen)

    roles: ClassVar[Collection[str]] = tuple(
        role for role in ROLES if role not in {*_OPERANDS, "softmax output", "logits"}
    )

    @property
    def default(self) -> None:
        return None  # what the codec loses is missing in the gradient of a norm that trains

    @property
    def label(self) -> str:
        return f"{self.codec.label} when frozen" if self.codec else "as it is"

    @property
    def lossless(self) -> bool:
        return self.codec is None or self.codec.lossless


@dataclass(frozen=True)
class Recompute(Choice):
    """Nothing is stored: the backward computes the tensor again from other saved tensors, matrix products included.

    Attributes:
        otherwise: where the other saved tensors do not suffice; None saves the tensor as it is.
    """

    otherwise: Codec | WhenFrozen | None = Quantize(8)  # noqa: RUF009  (frozen)

    @property
    def default(self) -> Codec | WhenFrozen | None:
        return self.otherwise

    @property
    def label(self) -> str:
        return "recomputed"

    @property
    def lossless(self) -> bool:
        """Sources that are rounded are for `rebuild` to judge."""
        return self.otherwise is None or self.otherwise.lossless


@dataclass(frozen=True)
class Derivative(Choice):
    """An activation function's derivative instead of its input: fewer bits do, as it varies little
    (Approximate Backpropagation, Yang et al., ICML 2024).

    Attributes:
        codec: for the derivative; None saves it as it is.
        otherwise: for the tensor itself, where the backward reads it for anything else than the derivative too.
    """

    codec: Codec | None = Quantize(4)  # noqa: RUF009  (frozen)
    otherwise: Codec | Recompute | WhenFrozen | None = Quantize(8)  # noqa: RUF009  (frozen)

    roles: ClassVar[Collection[str]] = tuple(role for role in ROLES if role not in _OPERANDS)

    @property
    def default(self) -> Codec | Recompute | WhenFrozen | None:
        return self.otherwise

    @property
    def label(self) -> str:
        return f"derivative, {self.codec.label}" if self.codec else "derivative"
