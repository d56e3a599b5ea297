"""What each pass did, for who wants to watch: a log, graphs for tlparse, files to read.

    TORCH_LOGS="+slimfit_fx"    a line for each pass, from the standard logger slimfit_fx.passes (level INFO)
    TORCH_TRACE=folder          the graphs before and after each pass, for `tlparse folder`
    SLIMFIT_DEBUG=folder        the same as readable files, and the plan

Off, all of it costs the looking up of two settings a pass.
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tabulate import tabulate
from torch import fx

from slimfit_fx.errors import ConfigError
from slimfit_fx.graph.plan import Plan
from slimfit_fx.sizes import size_text
from slimfit_fx.torch_internals import trace_log, trace_structured

_FOLDER = "SLIMFIT_DEBUG"
_logger = logging.getLogger("slimfit_fx.passes")
_numbers = itertools.count()


@dataclass(frozen=True)
class Moment:
    """What a captured graph has become.

    Attributes:
        graphs: by name: `"captured"`, or `"joint"`, or `"forward"` and `"backward"`.
        plan: of what the forward hands to the backward; empty before there is one.
    """

    graphs: Mapping[str, fx.GraphModule]
    plan: Plan

    def names(self) -> Counter[str]:
        """The nodes of all graphs, by their names."""
        return Counter(node.name for module in self.graphs.values() for node in module.graph.nodes)

    def saved(self) -> int | None:
        """Bytes saved with all gates open; None before there is a plan."""
        return sum(row.stored for row in self.plan.saved) if self.plan.saved else None


class PassLog:
    """Tells of the passes that run on one captured graph."""

    def __init__(self, path: str) -> None:
        """
        Args:
            path: of the module that the graph was captured in, `""` for the model itself.
        """
        self._path = path or "model"
        self._count = itertools.count()
        self._number = -1

    @contextmanager
    def watching(self, name: str, look: Callable[[], Moment]) -> Iterator[None]:
        """Runs the pass `name` inside; `look` says what the graph is before and after.

        Raises:
            ConfigError: the folder in SLIMFIT_DEBUG cannot be written to.
        """
        place = next(self._count)
        logged, traced, folder = _logger.isEnabledFor(logging.INFO), bool(trace_log.handlers), os.environ.get(_FOLDER)
        if not (logged or traced or folder):
            yield
            return
        if self._number < 0:
            self._number = next(_numbers)
        label = f"{place:02}_{name}"
        self._keep(look(), label, "before", traced, folder)
        names, saved = (look().names(), look().saved()) if logged else (Counter(), None)
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        after = look()
        if logged:
            added, removed = after.names() - names, names - after.names()
            _logger.info(
                "graph %d (%s) %s: %.1f ms, %d nodes added, %d removed, saved %s -> %s",
                *(self._number, self._path, name, seconds * 1e3, added.total(), removed.total()),
                *("-" if nbytes is None else size_text(nbytes) for nbytes in (saved, after.saved())),
            )
        self._keep(after, label, "after", traced, folder)

    def _keep(self, moment: Moment, label: str, when: str, traced: bool, folder: str | None) -> None:
        if not (traced or folder):
            return
        texts = {graph: module.print_readable(print_output=False) for graph, module in moment.graphs.items()}
        if traced:
            for graph, text in texts.items():
                artifact = {"name": f"slimfit_fx_{label}_{graph}_{when}", "encoding": "string"}
                trace_structured("artifact", functools.partial(dict, artifact), payload_fn=functools.partial(str, text))
        if folder:
            _write(self._folder(folder) / label, {f"{graph}.{when}.py": text for graph, text in texts.items()})
            if moment.plan.saved:
                _write(self._folder(folder) / label, {f"plan.{when}.txt": _plan_text(moment.plan)})

    def _folder(self, folder: str) -> Path:
        rank = os.environ.get("RANK")  # of torchrun's processes
        return Path(folder, *(["rank_" + rank] if rank else []), f"graph_{self._number:03}_{self._path}")


def _write(folder: Path, texts: Mapping[str, str]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (folder / name).write_text(text + "\n")
    except OSError as error:
        raise ConfigError(f"{_FOLDER}: cannot write {folder}: {error}. Name another folder, or unset it.") from error


def _plan_text(plan: Plan) -> str:
    """A line for each saved tensor."""
    headings = ["name", "module", "role", "shape", "dtype", "gates", "bytes", "stored", "how"]
    rows = []
    for row in plan.saved:
        how = row.form or (row.codec.label if row.codec else "")
        shape = "x".join(map(str, row.shape))
        rows.append([row.name, row.module, row.role, shape, row.dtype, row.gates, row.nbytes, row.stored, how])
    return tabulate(rows, headings)
