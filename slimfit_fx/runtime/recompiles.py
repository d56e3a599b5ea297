"""What compiling again and again will cost, said when it begins and before torch.compile gives up."""

from __future__ import annotations

from slimfit_fx.compiler.origin import Origin
from slimfit_fx.hints import Hints
from slimfit_fx.torch_internals import dynamo_config

# Parts of Dynamo's guards on the sizes of inputs.
_SIZES = ("size mismatch", ".size()[", ".shape[")


class Recompiles:
    """Watches one model."""

    def __init__(self) -> None:
        self._hints = Hints()

    def saw(self, origin: Origin, trained: bool) -> None:
        """A graph is made; `trained` says whether a forward went before. Within one, blocks may differ in size."""
        if trained:
            self._hints.give("sizes", sizes_change, origin)
        self._hints.give("limit", limit_is_near, origin)


def sizes_change(origin: Origin) -> str | None:
    """A graph that is made again because an input has another size."""
    if not any(part in origin.changed for part in _SIZES):
        return None
    return (
        f"Inputs change in size, so {origin.path or 'the model'} is compiled again, for all sizes: slower code than "
        "for one. Pad all batches to one length and leave out an incomplete last one (drop_last=True) to be spared "
        "that; further sizes compile nothing."
    )


def limit_is_near(origin: Origin) -> str | None:
    """A graph behind which torch.compile makes one more of the same code, and then stops."""
    limit = dynamo_config.recompile_limit
    made = int(origin.number.rpartition("/")[2] or 0) + 1
    if not origin.changed or made < limit - 1:
        return None
    return (
        f"{origin.path or 'The model'} is compiled again, as graph {made} of at most {limit}: one that was made for "
        f"{origin.changed} does not fit. Behind the last, torch.compile gives up, which is a BackendError: keep that "
        "the same in all steps (slimfit_fx.explain(model) has the list), or raise the limit, "
        "torch._dynamo.config.recompile_limit."
    )
