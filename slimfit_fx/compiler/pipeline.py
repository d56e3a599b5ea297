"""The passes, in order."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path

from slimfit_fx.graph.plan import Plan
from slimfit_fx.graph.split import SplitGraph
from slimfit_fx.passes import __path__ as passes_path
from slimfit_fx.passes import compress, keep_trained, rebuild, save_derivatives, separate_seeds

# What is done to a split graph and its plan, in order; to add a pass, add it here.
SPLIT_PASSES: list[Callable[[SplitGraph, Plan], None]] = [
    save_derivatives,
    rebuild,
    keep_trained,
    compress,
    separate_seeds,
]


@functools.cache
def source_hash() -> str:
    folders = (Path(__file__).parents[1], *map(Path, passes_path))
    digest = hashlib.sha256()
    for path in sorted(path for folder in folders for path in folder.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
