"""Optional companions of other libraries: nothing here is needed to train, and nothing is imported by the package."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .ddp import open_layers_hook as open_layers_hook
    from .trainer import SlimFitCallback as SlimFitCallback


def __getattr__(name: str) -> Any:
    """What is asked for: `SlimFitCallback` needs transformers, `open_layers_hook` a torch with torch.distributed."""
    if name == "SlimFitCallback":
        from .trainer import SlimFitCallback

        return SlimFitCallback
    if name == "open_layers_hook":
        from .ddp import open_layers_hook

        return open_layers_hook
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
