"""What a report says beside its tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .text import few, wrapped


@dataclass(frozen=True)
class Note:
    """A sentence, or the beginning of one that ends in the names of layers."""

    text: str
    names: Sequence[str] = ()

    def full(self) -> str:
        """With every name, on one line."""
        return self._with(", ".join(self.names))

    def short(self) -> str:
        """With a few names, wrapped to the width of a screen."""
        return wrapped(self._with(few(self.names)))

    def _with(self, names: str) -> str:
        return f"{self.text} ({len(self.names)}): {names}." if self.names else self.text
