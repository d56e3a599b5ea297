"""What CUDA graphs would hold of a model's generated code: partitions, and what the host calls between them.

Inductor may record each run of operators that can be captured as one CUDA graph, a partition. Operators that read gates
stand between partitions: a captured graph would freeze what they do. Nothing is recorded here; the code is counted.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import Any
from unittest import mock

from torch._inductor import config as inductor_config

from slimfit_fx.compiler import backend

from . import generate
from .generate import Pair
from .models import SMALL

_DEPTHS = (1, 2)
_BATCH = 8
_PARTITION = re.compile(r"partition_\d+")
_LIBRARIES = ("extern_kernels.", "torch.ops.", "aten.")


def partitions(name: str) -> Iterator[dict[str, Any]]:
    """For torch.compile and three presets, the counts of the small model `name` at a depth of one and of two layers.

    `partitions` are the graphs that would be recorded, `captured` the launches in them, `gated` and `outside` the
    operators of ours and the other launches that are called between them: one of each for the forward, the backward.
    """
    model = SMALL[name]
    for method in ("plain", "exact", "balanced", "tight"):
        for layers in _DEPTHS:
            built = model.build(_BATCH, layers)
            with inductor_config.patch({"triton.cudagraphs": True, "graph_partition": True}):
                made = generate.plain(*built) if method == "plain" else _slim(built, method)
            (pair,) = made.pairs
            yield {"method": method, "layers": layers} | _counts(pair)


def _slim(built: Any, preset: str) -> generate.Generated:
    """Past the check that refuses CUDA graphs."""
    with mock.patch.object(backend, "check_no_cuda_graphs", lambda *_: None):
        return generate.slim(*built, preset=preset, freeze_rate=0.9)


def _counts(pair: Pair) -> dict[str, list[int]]:
    found = [count(code.source) for code in (pair.forward, pair.backward)]
    return {name: [counts[name] for counts in found] for name in found[0]}


def count(source: str) -> dict[str, int]:
    """The counts of one generated module; see `partitions`."""
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    inside = [function for function in functions if _PARTITION.fullmatch(function.name)]
    (call,) = (function for function in functions if function.name == "call")
    between = list(_launches(call))
    gated = sum("slimfit_fx." in name for name in between)
    return {
        "partitions": len(inside),
        "captured": sum(len(list(_launches(function))) for function in inside),
        "gated": gated,
        "outside": len(between) - gated,
    }


def _launches(function: ast.FunctionDef) -> Iterator[str]:
    """What the function calls that works on the device, by name."""
    for node in ast.walk(function):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name.startswith(_LIBRARIES) or (name.startswith("triton_") and name.endswith(".run")):
                yield name
