"""Optional companions of other libraries: nothing here is needed to train, and nothing is imported by the package."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .trainer import SlimFitCallback as SlimFitCallback


def __getattr__(name: str) -> Any:
    """`SlimFitCallback` when it is asked for: it needs transformers."""
    if name == "SlimFitCallback":
        from .trainer import SlimFitCallback

        return SlimFitCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
