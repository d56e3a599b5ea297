"""The pipeline: every pass, in order. To add a pass, add it here.

Order, names, what may be switched off, the log, the key of the compile cache and the picture in docs/architecture.md
all follow from `PIPELINE`.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from slimfit_fx.errors import ConfigError, choose
from slimfit_fx.passes import __path__ as passes_path
from slimfit_fx.passes.choose_codecs import choose_codecs
from slimfit_fx.passes.chunk_loss import chunk_loss
from slimfit_fx.passes.compress import compress
from slimfit_fx.passes.expose_gates import expose_gates
from slimfit_fx.passes.gate_dynamic import gate_dynamic
from slimfit_fx.passes.keep_trained import keep_trained
from slimfit_fx.passes.make_plan import make_plan
from slimfit_fx.passes.mark_exact import mark_exact
from slimfit_fx.passes.partition import partition
from slimfit_fx.passes.rebuild import rebuild
from slimfit_fx.passes.rebuild_if_open import rebuild_if_open
from slimfit_fx.passes.redraw_masks import redraw_masks
from slimfit_fx.passes.save_derivatives import save_derivatives
from slimfit_fx.passes.save_old_values import save_old_values
from slimfit_fx.passes.separate_seeds import separate_seeds

Stage = Literal["captured", "joint", "cut", "split"]


@dataclass(frozen=True)
class Pass:
    """One pass of the pipeline.

    Attributes:
        function: what it does, in place. Its name is the pass's, the first sentence of its docstring the summary.
        on: what the function takes. `"captured"`: Dynamo's graph, its example inputs and a `Captured`; it returns
            a graph and inputs. `"joint"`: (JointGraph, Plan). `"cut"`: the JointGraph and what AOTAutograd
            hands to a partitioner; it returns the SplitGraph. `"split"`: (SplitGraph, Plan).
        optional: whether `Config.disable_passes` may name it: gradients stay right without it.
    """

    function: Callable[..., Any]
    on: Stage
    optional: bool = False

    @property
    def name(self) -> str:
        return self.function.__name__

    @property
    def summary(self) -> str:
        """One sentence."""
        paragraph = (self.function.__doc__ or "").strip().partition("\n\n")[0]
        return " ".join(paragraph.split()).partition(". ")[0].rstrip(".") + "."


PIPELINE: list[Pass] = [
    Pass(expose_gates, "captured"),
    Pass(chunk_loss, "captured", optional=True),
    # AOTAutograd traces the joint graph here
    Pass(gate_dynamic, "joint"),
    Pass(partition, "cut"),
    Pass(save_old_values, "split"),
    Pass(make_plan, "split"),
    Pass(mark_exact, "split"),
    Pass(choose_codecs, "split"),
    Pass(save_derivatives, "split", optional=True),
    Pass(rebuild, "split", optional=True),
    Pass(redraw_masks, "split", optional=True),
    Pass(keep_trained, "split", optional=True),
    Pass(compress, "split"),
    Pass(rebuild_if_open, "split", optional=True),
    Pass(separate_seeds, "split", optional=True),
    # Inductor, or the FX interpreter, compiles the pair here
]


def enabled(on: Stage, disabled: Collection[str]) -> Iterator[Pass]:
    """The passes of one stage, in order."""
    return (entry for entry in PIPELINE if entry.on == on and entry.name not in disabled)


def check_disabled(disabled: Collection[str]) -> None:
    """Raises `ConfigError` if a pass is to be switched off that is unknown, or needed."""
    for name in disabled:
        choose("pass in disable_passes", name, [entry.name for entry in PIPELINE])
        if not any(entry.optional for entry in PIPELINE if entry.name == name):
            others = ", ".join(repr(entry.name) for entry in PIPELINE if entry.optional)
            raise ConfigError(
                f"disable_passes: {name!r} is needed for right gradients and bytes; those that can be left out are "
                f"{others}. preset='exact' stores everything as it is."
            )


def pipeline_key(disabled: Collection[str]) -> str:
    """What generated code depends on: which passes run, in which order, and the library's sources."""
    names = [f"{entry.function.__module__}.{entry.name}" for entry in PIPELINE if entry.name not in disabled]
    return f"slimfit_fx {_source_hash()} {names}"


@functools.cache
def _source_hash() -> str:
    folders = (Path(__file__).parents[1], *map(Path, passes_path))
    digest = hashlib.sha256()
    for path in sorted(path for folder in folders for path in folder.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
