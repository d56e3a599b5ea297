"""Why torch.compile left code out of its graphs, in its own words."""

from __future__ import annotations

from slimfit_fx.compiler.origin import in_short
from slimfit_fx.errors import BackendError
from slimfit_fx.torch_internals import counters

# Categories of Dynamo's statistics: what made it skip a frame, and what it broke a graph at.
_CATEGORIES = ("unimplemented", "graph_break")
_LIMIT = "limit exceeded"


class LeftOut:
    """The reasons that Dynamo gave while a model ran; it keeps them in statistics of the whole process."""

    def __init__(self) -> None:
        self._reasons: dict[str, None] = {}  # the latest last
        self.begin()

    def __str__(self) -> str:
        """The latest reasons, with Dynamo's hints; without any, what else leaves code out."""
        if not self._reasons:
            return (
                "Such gradients come from calls of a part of the model by itself, a loss that reads the weights, or "
                "code that torch.compile leaves out (TORCH_LOGS=graph_breaks shows where): a custom autograd.Function."
            )
        return "torch.compile left code out, in its words: " + " ".join(map(in_short, list(self._reasons)[-2:]))

    @property
    def reasons(self) -> list[str]:
        """All of them, in short, the latest last."""
        return list(map(in_short, self._reasons))

    def begin(self) -> None:
        """What Dynamo counted up to now is of no interest."""
        self._before = _statistics()

    def collect(self) -> list[str]:
        """The reasons since `begin` or the last `collect`."""
        found = [text for text, count in _statistics().items() if count > self._before.get(text, 0)]
        self.begin()
        for text in found:
            self._reasons.pop(text, None)
            self._reasons[text] = None
        return found

    def check_limit(self, name: str) -> None:
        """Raises `BackendError` if Dynamo, since `begin`, compiled code of the module `name` too often, and stopped."""
        if any(_LIMIT in reason.partition("\n")[0] for reason in self.collect()):
            raise BackendError(
                f"{name} ran without its compiled graph, so nothing was saved. torch.compile gave up on it: its "
                "recompile limit was hit by inputs that change in more than size. Run with TORCH_LOGS=recompiles to "
                "see why, pad the inputs, or raise torch._dynamo.config.recompile_limit."
            )

    def error(self, name: str) -> BackendError:
        """What to raise if nothing of the module `name` was compiled."""
        self.check_limit(name)
        return BackendError(
            f"{name} ran without its compiled graph, so nothing was saved. {self} To train without that code, "
            "transform the parts of the model around it."
        )


def _statistics() -> dict[str, int]:
    return {text: count for category in _CATEGORIES for text, count in counters[category].items()}
