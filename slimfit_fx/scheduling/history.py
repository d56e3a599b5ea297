"""Which layers were open at which step, and why."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Sequence
from itertools import compress
from typing import NamedTuple

_LENGTH = 10_000


class Choice(NamedTuple):
    """The gates of one step: names of the open layers, and the priorities, one per layer, that they were chosen by.

    Gates that were set by hand are among them as they were set; with several forwards, what was open in any of them.
    """

    step: int
    open: tuple[str, ...]
    scores: Sequence[float]


class History(deque[Choice]):
    """The choices of the last 10,000 steps; the last one is that of the present step."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(maxlen=_LENGTH)
        self._names = names
        self._flags: list[bool] = []

    def begin(self, step: int, priority: Sequence[float], flags: list[bool]) -> None:
        """Another step, with these gates."""
        self._flags = flags
        self.append(Choice(step, self._open(flags), array("f", priority)))

    def correct(self, flags: list[bool]) -> None:
        """The present step's gates were set by hand since."""
        if flags != self._flags:
            self._flags = flags
            self[-1] = self[-1]._replace(open=self._open(flags))

    def _open(self, flags: Sequence[bool]) -> tuple[str, ...]:
        return tuple(compress(self._names, flags))
