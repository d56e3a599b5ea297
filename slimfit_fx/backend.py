"""From the graph that Dynamo captured to the compiled pair: the passes, in order.

expose_gates     the gates become an input
AOTAutograd      traces the joint graph
gate_dynamic     conditional activations and weight gradients
partition        min-cut into forward and backward
make_plan        label every saved tensor: role, gates, codec
save_derivatives instead of an activation function's input, where the codec says so
rebuild          do not save what can be computed from what is saved
keep_trained     a pruned norm input whole, at steps at which the norm trains
compress         encode behind the producer, decode before the reader
separate_seeds   equal layers become equal code
Inductor, or the FX interpreter
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._functorch import config as functorch_config
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.custom_graph_pass import CustomPartitionerFn
from torch._inductor.decomposition import select_decomp_table

from slimfit_fx.passes import __path__ as passes_path
from slimfit_fx.passes import (
    compress,
    expose_gates,
    gate_dynamic,
    keep_trained,
    make_plan,
    partition,
    rebuild,
    save_derivatives,
    separate_seeds,
)

from . import ops as ops
from .errors import BackendError, SlimFitError
from .graph import JointGraph
from .loop_split import exact_loop_splits
from .peak_estimate import true_input_sizes
from .plan import Plan
from .presets import CodecRules
from .saved_inputs import save_inputs_unchanged
from .split_graph import SplitGraph

# What is done to a split graph and its plan, in order; to add a pass, add it here.
SPLIT_PASSES: list[Callable[[SplitGraph, Plan], None]] = [
    save_derivatives,
    rebuild,
    keep_trained,
    compress,
    separate_seeds,
]


@dataclass(eq=False)
class Capture:
    """One captured graph: what is gated in it, and what the passes made of it.

    Attributes:
        gated: positions of the gated parameters among the inputs of the captured graph, each with a gate of its own.
        activations: positions of inputs that an earlier graph of the same forward made (after a graph break).
        retainable: whether `backward(retain_graph=True)` works; otherwise the backward reuses the memory of saved
            tensors ("donated buffers").
        ran: whether it was called.
        split: the rewritten pair; None until the first training call compiled it.
        plan: of `split`.
    """

    gated: tuple[int, ...]
    activations: frozenset[int] = frozenset()
    retainable: bool = False
    ran: bool = False
    split: SplitGraph | None = None
    plan: Plan = field(default_factory=Plan)


def compile_capture(
    module: fx.GraphModule, inputs: Sequence[Any], capture: Capture, rules: CodecRules, mode: str
) -> Callable[..., Any]:
    """Compiles a graph from Dynamo; the result takes the graph's inputs and, behind them, its gates.

    Raises:
        BackendError: whatever went wrong, as its cause. Dynamo would answer some exceptions with an eager run.
    """
    try:
        exposed, example_inputs = expose_gates(module, inputs, len(capture.gated))
        partitioner = _Partitioner(capture, rules)
        capture.retainable = mode == "eager" or not functorch_config.donated_buffer
        compiler = _interpret if mode == "eager" else _inductor
        # AOTAutograd's own cache would skip the passes, and with them plan and report. Inductor's cache of generated
        # code stays on: its key is the rewritten graph itself.
        with functorch_config.patch(enable_autograd_cache=False, donated_buffer=not capture.retainable):
            return compiler(exposed, example_inputs, partitioner)
    except SlimFitError:
        raise
    except Exception as error:
        raise _explained(error, module) from error


class _Partitioner(CustomPartitionerFn):
    """The passes from the joint graph to the plan, in the form that both compilers call."""

    def __init__(self, capture: Capture, rules: CodecRules) -> None:
        self.capture = capture
        self.rules = rules

    def __call__(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], **options: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        joint = JointGraph.copy_of(gm, options.pop("num_fwd_outputs"), self.capture.activations)
        gradients = gate_dynamic(joint, self.capture.gated)
        split = partition(joint, joint_inputs, **options)
        plan = make_plan(split, gradients, self.rules)
        for split_pass in SPLIT_PASSES:
            split_pass(split, plan)
        split.finish()
        self.capture.plan = plan
        self.capture.split = split
        return split.forward, split.backward

    def __deepcopy__(self, memo: dict[int, Any]) -> _Partitioner:
        """Itself: Inductor copies and pickles its whole configuration to make a cache key."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Our part of that key; graphs are none."""
        return str, (self.uuid(),)

    def uuid(self) -> str:
        """What the code depends on: the passes and their sources, the gated inputs, the codecs."""
        names = [f"{split_pass.__module__}.{split_pass.__qualname__}" for split_pass in SPLIT_PASSES]
        return f"slimfit_fx {_source_hash()} {names} {self.capture.gated} {self.rules}"


def _inductor(module: fx.GraphModule, inputs: Sequence[Any], partitioner: _Partitioner) -> Callable[..., Any]:
    compiled = compile_fx(
        module,
        inputs,
        inner_compile=functools.partial(_compile_inner, partitioner.capture),
        config_patches={"custom_partitioner_fn": partitioner},
    )
    return cast("Callable[..., Any]", compiled)


def _compile_inner(capture: Capture, gm: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Any:
    if not options.get("is_backward"):
        save_inputs_unchanged(gm)
        with exact_loop_splits():
            return compile_fx_inner(gm, inputs, **options)
    try:
        with exact_loop_splits(), true_input_sizes():
            return _drop_closed(compile_fx_inner(gm, inputs, **options), capture)
    except Exception as error:  # the first backward compiles the backward graph, long after `compile_capture`
        raise _explained(error, gm) from error


def _interpret(module: fx.GraphModule, inputs: Sequence[Any], partitioner: _Partitioner) -> Callable[..., Any]:
    def run(gm: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        return _boxed(lambda arguments: gm(*arguments))

    def run_backward(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        return _drop_closed(run(gm, example_inputs), partitioner.capture)

    compiler = aot_autograd(
        fw_compiler=run,
        bw_compiler=run_backward,
        inference_compiler=run,
        partition_fn=partitioner,
        decompositions=select_decomp_table(),
    )
    return compiler(module, inputs)


def _drop_closed(backward: Callable[..., Any], capture: Capture) -> Callable[..., Any]:
    """Hands None instead of an empty gradient to autograd, so that a frozen parameter's `.grad` stays None."""
    gated = [gradient.output for gradient in capture.plan.gradients]

    def run(arguments: list[Any]) -> list[Any]:
        gradients = list(backward(arguments))
        for place in gated:
            if gradients[place].numel() == 0:
                gradients[place] = None
        return gradients

    return _boxed(run)


def _explained(error: Exception, module: fx.GraphModule) -> BackendError:
    return BackendError(
        f"slimfit_fx could not compile a graph of {len(module.graph.nodes)} nodes: {type(error).__name__}: {error}\n"
        "Run with mode='eager' to see whether a pass or the code generator is at fault; slimfit_fx.undo(model) "
        "gives the untouched model back."
    )


def _boxed(function: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
    """Marks a function as taking one list of arguments, which it may clear: AOTAutograd's boxed convention."""
    function._boxed_call = True  # type: ignore[attr-defined]
    return function


@functools.cache
def _source_hash() -> str:
    folders = (Path(__file__).parent, *map(Path, passes_path))
    digest = hashlib.sha256()
    for path in sorted(path for folder in folders for path in folder.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
