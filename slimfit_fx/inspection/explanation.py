"""Why a model has the graphs that it has: a table for a person, lists for a program."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slimfit_fx.compiler.origin import Origin

_WIDTH = 100
_SHOWN = 5  # layers that are named


@dataclass(frozen=True)
class Explanation:
    """Which graphs torch.compile made of a model's training calls, and why these.

    Attributes:
        graphs: one for each captured graph, in the order of compilation: `.path` of the module that was called,
            Dynamo's `.number`, what `.changed` since an earlier graph, what `.broke` the code behind it, at which
            `.place`.
        layers: the names of all layers.
        uncovered: layers that no graph of the last forward has: they train, but save what they always do.
        outside: layers that got gradients from code that is in no graph.
        left_out: why Dynamo left code out, in its own words.
    """

    graphs: Sequence[Origin]
    layers: Sequence[str]
    uncovered: Sequence[str]
    outside: Sequence[str]
    left_out: Sequence[str]

    @property
    def recompiles(self) -> list[Origin]:
        """The graphs that were made because an input changed: `.changed` says which."""
        return [origin for origin in self.graphs if origin.changed]

    @property
    def breaks(self) -> list[Origin]:
        """One graph for each place where Dynamo broke the code: `.place` and `.broke` say where and why."""
        return list({(origin.place, origin.broke): origin for origin in self.graphs if origin.broke}.values())

    def __str__(self) -> str:
        covered = len(self.layers) - len(self.uncovered)
        head = f"{_count(len(self.graphs), 'graph')}; {covered} of {_count(len(self.layers), 'layer')} in them."
        lines = [head, *self._recompiles(), *self._breaks(), *self._uncovered()]
        if len(lines) == 1:
            lines.append("No recompile, no graph break.")
        return "\n".join(lines)

    def _recompiles(self) -> Iterator[str]:
        if self.recompiles:
            yield f"\nCompiled again ({len(self.recompiles)}), because an input was another:"
        for origin in self.recompiles:
            yield _item(f"graph {origin.number} of {_module(origin.path)}: {origin.changed}")

    def _breaks(self) -> Iterator[str]:
        if self.breaks:
            yield f"\nGraph breaks ({len(self.breaks)}):"
        for origin in self.breaks:
            yield _item(f"{origin.place or _module(origin.path)}: {origin.broke}")

    def _uncovered(self) -> Iterator[str]:
        partly = [name for name in self.outside if name not in self.uncovered]
        for what, names in (("In no graph", self.uncovered), ("Partly outside of the graphs", partly)):
            if names:
                more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
                yield f"\n{what}, so saved as without slimfit_fx ({len(names)}):"
                yield _item(", ".join(names[:_SHOWN]) + more)
        if self.uncovered or self.outside:
            broken = {origin.broke for origin in self.breaks}
            yield from map(_item, (reason for reason in self.left_out if reason not in broken))


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _module(path: str) -> str:
    return path or "the model"


def _item(text: str) -> str:
    return textwrap.fill(text, _WIDTH, initial_indent="- ", subsequent_indent="  ", break_long_words=False)
