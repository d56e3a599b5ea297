"""Why Dynamo made a graph: what changed since it made the one before, and what ended it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import fx

from slimfit_fx.torch_internals import CompileContext, get_metrics_context


@dataclass(frozen=True)
class Origin:
    """Where a captured graph comes from.

    Attributes:
        path: of the module that was called, `""` for the model itself.
        number: Dynamo's, such as `"0/1"`: the second graph of its first piece of code.
        changed: the guard of an earlier graph that failed, in Dynamo's words, where this one was made again; else `""`.
        broke: what Dynamo could not trace behind this graph, with its hints; `""` where the code simply ends.
        place: file and line of that.
    """

    path: str = ""
    number: str = ""
    changed: str = ""
    broke: str = ""
    place: str = ""


def origin_of(module: fx.GraphModule, path: str) -> Origin:
    """The origin of the graph that Dynamo is handing to its backend now."""
    reason = getattr(module, "compile_subgraph_reason", None)
    broke = reason is not None and reason.graph_break
    frames = reason.user_stack if broke else ()
    return Origin(
        path=path,
        number=str(CompileContext.current_compile_id() or ""),
        changed=_changed(get_metrics_context()._metrics.get("recompile_reason") or ""),
        broke=in_short(reason.reason) if broke else "",
        place=f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "",
    )


def in_short(reason: str) -> str:
    """What Dynamo met, its explanation, its hints: without what it adds for its developers."""
    for end in ("Developer debug context", "While executing"):
        reason = reason.partition(end)[0]
    lines = (line.strip().removeprefix("Explanation: ").removeprefix("Hint: ") for line in reason.splitlines())
    return " ".join(line.rstrip(".") + "." for line in lines if line)


def _changed(reason: str) -> str:
    """The guard without the number of its graph and the source line that Dynamo puts behind it."""
    guard = reason.partition("\n")[0]
    return re.sub(r"^\d+/\d+: ", "", guard).partition("  # ")[0].strip()
