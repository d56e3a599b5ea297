"""What to say of a graph that could not be compiled: the pass, the node, the module, the way out."""

from __future__ import annotations

from types import TracebackType

from torch import fx

from slimfit_fx.errors import BackendError
from slimfit_fx.graph.nodes import module_of

from .dynamo import may_run_eagerly


def explained(error: Exception, module: fx.GraphModule, mode: str, pass_name: str = "") -> BackendError:
    """The error for the user.

    Args:
        module: the graph that was to be compiled.
        pass_name: of the pass that failed; `""` for the tracing before the passes, or code generation behind them.
    """
    what = f"{type(error).__name__}: {error}"
    if may_run_eagerly(error) and not pass_name:
        return BackendError(
            f"an operator of a graph with layers depends on data, which cannot be compiled: {what}\n"
            "Move it out of the graph, with torch.compiler.disable on the function that calls it; or transform the "
            "parts of the model without it."
        )
    place = f" in the pass {pass_name}" if pass_name else ""
    if (node := _node(error.__traceback__)) is not None:
        path = module_of(node)
        place += f" at {node.format_node() or node.name}" + (f" of {path}" if path else "")
    try_eager = "Run with mode='eager' to see whether the code generator is at fault; " if mode != "eager" else ""
    return BackendError(
        f"slimfit_fx could not compile a graph of {len(module.graph.nodes)} nodes{place}: {what}\n"
        f"{try_eager}slimfit_fx.undo(model) gives the untouched model back."
    )


def _node(trace: TracebackType | None) -> fx.Node | None:
    """The node that the innermost function with one was at work on."""
    found = None
    while trace is not None:
        nodes = [value for value in trace.tb_frame.f_locals.values() if isinstance(value, fx.Node)]
        found = nodes[0] if nodes else found
        trace = trace.tb_next
    return found
