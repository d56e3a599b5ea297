"""Hints: what will cost time or memory that a user can do something about, said in one sentence, before it costs.

They go to the logger `slimfit_fx` as warnings, so that they are seen without any set-up;
`logging.getLogger("slimfit_fx").setLevel(logging.ERROR)` turns them off.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

_logger = logging.getLogger("slimfit_fx")


class Hints:
    """What was said of one model: nothing twice."""

    def __init__(self) -> None:
        self._given: set[str] = set()

    def give(self, kind: str, find: Callable[..., str | None], *arguments: object) -> None:
        """Logs what `find(*arguments)` has to say, unless there was a hint of this kind. A fault of `find`, which reads
        what is the user's, stops nothing.
        """
        if kind in self._given:
            return
        try:
            text = find(*arguments)
        except Exception:
            _logger.debug("no hint could be made: %s", kind, exc_info=True)
            return
        if text:
            self._given.add(kind)
            _logger.warning(text)
