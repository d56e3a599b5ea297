"""From the graph that Dynamo captured to compiled code: the pipeline's passes, then Inductor or the interpreter."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from torch import fx

from slimfit_fx.config import Config
from slimfit_fx.errors import SlimFitError
from slimfit_fx.presets import CodecRules
from slimfit_fx.torch_internals import (
    CustomPartitionerFn,
    aot_autograd,
    compile_fx,
    compile_fx_inner,
    functorch_config,
    select_decomp_table,
)

from .absent_output import with_absent
from .capture import Capture
from .compile_options import check_no_cuda_graphs, compile_options_for
from .dynamo import may_run_eagerly, steers_dynamo
from .failures import explained
from .inductor_fixes.dead_tensors import sizes_hold_nothing
from .inductor_fixes.library_calls import as_decided, decided_without_passes
from .inductor_fixes.loop_split import exact_loop_splits
from .inductor_fixes.peak_estimate import true_input_sizes
from .inductor_fixes.saved_inputs import save_inputs_unchanged
from .pass_run import PassRun


def compile_capture(
    module: fx.GraphModule,
    inputs: Sequence[Any],
    capture: Capture,
    rules: CodecRules,
    config: Config,
    generate: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Compiles a graph from Dynamo; the result takes the graph's inputs and, behind them, its gates.

    Where no layer is in the graph, Dynamo may answer an operator that depends on data with an eager run, as it does
    for other backends.

    Args:
        module, inputs: from Dynamo.
        capture: gets the split graph and its plan, when the backward is first asked for.
        rules: which codec a saved tensor gets.
        config: the passes that do not run, the compiler and its options, and what of the outputs is wanted.
        generate: makes a callable of one graph of the pair, in the place of Inductor.

    Raises:
        BackendError: a pass or code generation failed, or an operator of a graph with layers depends on data.
        ConfigError: CUDA graphs are switched on.
        Exception: torch's own, for a graph that AOTAutograd cannot trace for any backend.
    """
    mode = config.mode
    passes = PassRun(capture, rules, config.disable_passes, config.outputs == "loss")
    try:
        exposed, example_inputs = passes.on_captured(module, inputs)
        capture.retainable = mode == "eager" or not functorch_config.donated_buffer
        inductor = functools.partial(_inductor, options=config.compile_options, generate=generate or compile_fx_inner)
        compiler = _interpret if mode == "eager" else inductor
        # AOTAutograd's own cache would skip the passes, and with them plan and report. Inductor's cache of generated
        # code stays on: its key is the rewritten graph itself.
        with functorch_config.patch(enable_autograd_cache=False, donated_buffer=not capture.retainable):
            compiled = compiler(exposed, example_inputs, _Partitioner(passes, mode))
        return with_absent(compiled, passes.captured.left_out)
    except SlimFitError:
        raise
    except Exception as error:
        falls_back, in_passes = may_run_eagerly(error), passes.traced or passes.current
        if steers_dynamo(error) or (not in_passes and not (falls_back and capture.gated)):
            raise
        raise explained(error, module, mode, passes.current) from error


class _Partitioner(CustomPartitionerFn):
    """The passes from the joint graph on, in the form that both compilers call."""

    def __init__(self, passes: PassRun, mode: str) -> None:
        self.passes, self._mode = passes, mode

    def __call__(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], **options: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        if self._mode == "inductor":
            self.passes.capture.library_calls = decided_without_passes(gm, joint_inputs, **options)
        split = self.passes.on_joint(gm, joint_inputs, **options)
        return split.forward, split.backward

    def __deepcopy__(self, memo: dict[int, Any]) -> _Partitioner:
        """Itself: Inductor copies and pickles its whole configuration to make a cache key."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Our part of that key; graphs are none."""
        return str, (self.uuid(),)

    def uuid(self) -> str:
        """What the code depends on."""
        return f"{self.passes.key()} {self.passes.capture.library_calls}"


def _inductor(
    module: fx.GraphModule,
    inputs: Sequence[Any],
    partitioner: _Partitioner,
    options: Mapping[str, Any],
    generate: Callable[..., Any],
) -> Callable[..., Any]:
    check_no_cuda_graphs(options)
    compiled = compile_fx(
        module,
        inputs,
        inner_compile=functools.partial(_compile_inner, partitioner.passes.capture, generate),
        config_patches={**compile_options_for(inputs, options), "custom_partitioner_fn": partitioner},
    )
    return cast("Callable[..., Any]", compiled)


def _compile_inner(
    capture: Capture, generate: Callable[..., Any], gm: fx.GraphModule, inputs: Sequence[Any], **options: Any
) -> Any:
    if not options.get("is_backward"):
        save_inputs_unchanged(gm)
        with exact_loop_splits(), sizes_hold_nothing(), as_decided(capture.library_calls):
            return generate(gm, inputs, **options)
    try:
        with exact_loop_splits(), sizes_hold_nothing(), true_input_sizes():
            return _drop_closed(generate(gm, inputs, **options), capture)
    except SlimFitError:
        raise
    except Exception as error:  # the first backward compiles the backward graph, long after `compile_capture`
        raise explained(error, gm, "inductor") from error


def _interpret(module: fx.GraphModule, inputs: Sequence[Any], partitioner: _Partitioner) -> Callable[..., Any]:
    def run_backward(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        return _drop_closed(interpreted(gm, example_inputs), partitioner.passes.capture)

    compiler = aot_autograd(
        fw_compiler=interpreted,
        bw_compiler=run_backward,
        inference_compiler=interpreted,
        partition_fn=partitioner,
        decompositions=select_decomp_table(),
    )
    return compiler(module, inputs)


def interpreted(gm: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
    """The compiler of one graph that runs it operator by operator."""
    return _boxed(lambda arguments: gm(*arguments))


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


def _boxed(function: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
    """Marks a function as taking one list of arguments, which it may clear: AOTAutograd's boxed convention."""
    function._boxed_call = True  # type: ignore[attr-defined]
    return function
