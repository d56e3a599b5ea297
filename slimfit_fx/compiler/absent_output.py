"""What a graph returns in the place of an output that it does not compute."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from slimfit_fx.errors import OutputError

_TEXT = (
    "the logits were not computed as a whole: the model was transformed with outputs='loss', which leaves them out of "
    "what it returns in training. Use eval mode for a forward that returns them, or leave outputs='loss' out."
)


class AbsentOutput:
    """Stands for logits that were left out.

    It can be passed on, copied and printed; any other use raises `OutputError`, which is an AttributeError, too:
    `hasattr` finds nothing.
    """

    __slots__ = ()

    def __repr__(self) -> str:
        return "<logits, left out by outputs='loss'>"

    def __getattr__(self, name: str) -> Any:
        raise OutputError(_TEXT)

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise OutputError(_TEXT)

    @classmethod
    def __torch_function__(cls, *_: Any, **__: Any) -> Any:
        raise OutputError(_TEXT)

    __array__ = __bool__ = __contains__ = __float__ = __getitem__ = __int__ = __iter__ = __len__ = _refuse
    __eq__ = __ge__ = __gt__ = __le__ = __lt__ = __ne__ = _refuse
    __abs__ = __add__ = __invert__ = __matmul__ = __mul__ = __neg__ = __pow__ = __sub__ = __truediv__ = _refuse
    __radd__ = __rmatmul__ = __rmul__ = __rpow__ = __rsub__ = __rtruediv__ = _refuse
    __hash__ = object.__hash__


def with_absent(compiled: Callable[..., Any], places: Sequence[int]) -> Callable[..., Any]:
    """`compiled`, with an `AbsentOutput` at `places` among what it returns."""
    if not places:
        return compiled

    def run(*arguments: Any) -> list[Any]:
        outputs = list(compiled(*arguments))
        for place in sorted(places):
            outputs.insert(place, AbsentOutput())
        return outputs

    return run
