"""Every private name of torch that the library uses, one line each: what for. No other file of the library reads one.

All lines were run on torch 2.13.0 and looked up in the sources of 2.11.0 and 2.12.0; a line says where that is not so.
This module imports Dynamo and Inductor. It is imported with the compiler, by the first `transform`, not by
`import slimfit_fx`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from .errors import VersionError

_ADVICE = "Install a version that it was tested with, such as torch 2.13; a newer slimfit_fx may know this one."

try:
    import torch._C._autograd as autograd  # type: ignore[import-not-found]
    import torch._C._dynamo.eval_frame as eval_frame
    import torch._C._functorch as functorch  # type: ignore[import-not-found]
    import torch._dynamo.backends.common
    import torch._dynamo.config
    import torch._dynamo.convert_frame
    import torch._dynamo.exc
    import torch._dynamo.source
    import torch._dynamo.utils
    import torch._functorch._aot_autograd.descriptors as descriptors
    import torch._functorch.compile_utils
    import torch._functorch.config
    import torch._functorch.partitioners
    import torch._guards
    import torch._inductor.codegen.cpp
    import torch._inductor.compile_fx
    import torch._inductor.config
    import torch._inductor.custom_graph_pass
    import torch._inductor.decomposition
    import torch._inductor.fx_passes.post_grad
    import torch._inductor.graph
    import torch._inductor.memory
    import torch._inductor.scheduler
    import torch._inductor.virtualized
    import torch._logging._internal
    import torch._subclasses
    import torch.utils._foreach_utils
    import torch.utils._pytree
    import torch.utils._sympy.functions

    # Dynamo, the front end
    aot_autograd = torch._dynamo.backends.common.aot_autograd  # a backend that runs our graphs operator by operator
    input_codes = torch._dynamo.convert_frame.input_codes  # the code objects that it has seen, to let it try them again
    FrameAction = eval_frame._FrameAction  # the same
    FrameExecStrategy = eval_frame._FrameExecStrategy  # the same
    set_code_exec_strategy = eval_frame.set_code_exec_strategy  # the same
    BackendCompilerFailed = torch._dynamo.exc.BackendCompilerFailed  # what it wraps a backend's errors into
    ShortenTraceback = torch._dynamo.exc.ShortenTraceback  # the one class of errors that it lets through as they are
    TorchDynamoException = torch._dynamo.exc.TorchDynamoException  # its own control flow
    exceptions_allowed_to_be_fallback = torch._dynamo.exc.exceptions_allowed_to_be_fallback  # answered by eager runs
    ConstantSource = torch._dynamo.source.ConstantSource  # an input that makes no guard: the gates
    counters = torch._dynamo.utils.counters  # its reasons for leaving code out
    get_metrics_context = torch._dynamo.utils.get_metrics_context  # the guard that failed, where a graph is made again
    CompileContext = torch._guards.CompileContext  # the number of the compilation under way

    # AOTAutograd, joint graphs and partitioners
    functorch_config = torch._functorch.config  # its cache, donated buffers, a rule of min-cut
    AOTInput = descriptors.AOTInput  # what an input of a graph is
    PlainAOTInput = descriptors.PlainAOTInput  # an input as it was captured
    GradAOTOutput = descriptors.GradAOTOutput  # the gradient of an input
    InputMutationAOTOutput = descriptors.InputMutationAOTOutput  # the new value of an input that changes in place
    SavedForBackwardsAOTOutput = descriptors.SavedForBackwardsAOTOutput  # what is handed to the backward
    fx_graph_cse = torch._functorch.compile_utils.fx_graph_cse  # makes equal computations one node
    min_cut_rematerialization_partition = torch._functorch.partitioners.min_cut_rematerialization_partition  # the cut
    must_recompute = torch._functorch.partitioners.must_recompute  # whether a node is checkpointed
    TracingContext = torch._guards.TracingContext  # the fake tensors of the compilation under way
    detect_fake_mode = torch._guards.detect_fake_mode  # the same, from tensors
    FakeTensor = torch._subclasses.FakeTensor  # a preview takes a model of such tensors
    FakeTensorMode = torch._subclasses.FakeTensorMode  # the gates as an example input; a preview's tensors

    # Inductor, the code generator
    compile_fx = torch._inductor.compile_fx.compile_fx  # from a captured graph to code
    compile_fx_inner = torch._inductor.compile_fx.compile_fx_inner  # from one graph of the pair to code
    inductor_config = torch._inductor.config  # the options that a user may set
    CustomPartitionerFn = torch._inductor.custom_graph_pass.CustomPartitionerFn  # where our passes run
    select_decomp_table = torch._inductor.decomposition.select_decomp_table  # codecs are traced as Inductor would
    CppScheduling = torch._inductor.codegen.cpp.CppScheduling  # its splits of loops, corrected in inductor_fixes
    SchedulerBuffer = torch._inductor.scheduler.SchedulerBuffer  # when it frees a tensor, corrected there
    OutputNode = torch._inductor.scheduler.OutputNode  # what uses the results of a graph, for that
    inductor_memory = torch._inductor.memory  # its estimate of the peak, corrected there
    FloorDiv = torch.utils._sympy.functions.FloorDiv  # a quotient in an index, for the same
    V = torch._inductor.virtualized.V  # the graph that is being compiled, for that
    post_grad = torch._inductor.fx_passes.post_grad  # which calls of libraries a graph makes, as inductor_fixes asks
    GraphLowering = torch._inductor.graph.GraphLowering  # whether convolutions take channels last, the same

    # Structured logs
    trace_structured = torch._logging._internal.trace_structured  # graphs for tlparse
    trace_log = torch._logging._internal.trace_log  # whether anybody reads them

    # Autograd and torch.func
    current_graph_task_id = torch._C._current_graph_task_id  # the backward that is under way, -1 for none
    backward_keeps_graph = autograd._get_current_graph_task_keep_graph  # whether that one has retain_graph=True
    peek_interpreter_stack = functorch.peek_interpreter_stack  # whether a transform of torch.func is under way
    tree_leaves = torch.utils._pytree.tree_leaves  # what is in a nest of containers

    # Hints
    dynamo_config = torch._dynamo.config  # how often it compiles the same code
    fused_devices = torch.utils._foreach_utils._get_fused_kernels_supported_devices  # of optimizers
except (ImportError, AttributeError) as error:
    raise VersionError(f"torch {torch.__version__} lacks what slimfit_fx builds on: {error}. {_ADVICE}") from error

# What is read or set by name: (owner, attribute).
_ATTRIBUTES = (
    (nn.Module, "_compiled_call_impl"),  # where nn.Module.compile puts the call that takes a module's place
    (nn.Module, "_call_impl"),  # a module's own call
    (torch.Tensor, "_backward_hooks"),  # hooks on parameters, which shall run for gradients only
    (torch.Tensor, "_post_accumulate_grad_hooks"),  # the same
    (torch.Tensor, "_version"),  # whether weights changed though no optimizer stepped
    (nn.parallel.DistributedDataParallel, "_get_active_ddp_module"),  # whose ranks must choose alike
    (CppScheduling, "try_loop_split"),  # corrected in inductor_fixes/loop_split.py
    (SchedulerBuffer, "can_free"),  # corrected in inductor_fixes/dead_tensors.py
    (inductor_memory, "get_freeable_input_buf"),  # corrected in inductor_fixes/peak_estimate.py
    (post_grad, "should_prefer_unfused_addmm"),  # answered in inductor_fixes/library_calls.py
    (post_grad, "pass_patterns"),  # where that is asked
    (GraphLowering, "decide_layout_opt"),  # answered there, too
    (GraphLowering, "_compile_to_module"),  # where code is compiled, which a preview only reads
)
for _owner, _name in _ATTRIBUTES:
    if not hasattr(_owner, _name):
        raise VersionError(
            f"torch {torch.__version__} lacks what slimfit_fx builds on: {_owner.__name__}.{_name}. {_ADVICE}"
        )

# Marks what a compiler of the user's (of the optimizer's step, of the whole model) calls and does not look into.
not_traced = torch.compiler.disable


class FsdpParameter(NamedTuple):
    """A parameter that `fully_shard` (FSDP2) shares out over the ranks.

    Attributes:
        sharded: the DTensor that optimizers have.
        whole: what takes its place while its module runs; None before the first run.
        after_forward: what may take its place between forward and backward (`reshard_after_forward` as a number).
        tensor_parallel: whether it was a DTensor before.
    """

    sharded: nn.Parameter
    whole: nn.Parameter | None
    after_forward: nn.Parameter | None
    tensor_parallel: bool


def fsdp_parameters(unit: nn.Module) -> list[FsdpParameter]:
    """The parameters of a module that `fully_shard` took, without those of units inside."""
    return [
        FsdpParameter(
            each.sharded_param,
            getattr(each, "_unsharded_param", None),
            getattr(each, "_sharded_post_forward_param", None),
            bool(each.is_dtensor),
        )
        for group in _fsdp_groups(unit)
        for each in group.fsdp_params
    ]


def fsdp_sends_zeros(unit: nn.Module) -> bool:
    """Whether gradients that are missing are reduced as zeros (torch 2.13 and newer have the option)."""
    return any(getattr(group, "reduce_scatter_unused_params", False) for group in _fsdp_groups(unit))


def _fsdp_groups(unit: Any) -> list[Any]:
    """What FSDP2 reduces together: a list where parameters may have several meshes, else one or None."""
    try:
        state = unit._get_fsdp_state()
        if hasattr(state, "_fsdp_param_groups"):
            return list(state._fsdp_param_groups)
        return [group for group in [state._fsdp_param_group] if group is not None]
    except AttributeError as error:
        raise VersionError(f"torch {torch.__version__} lacks what FSDP2 needs here: {error}. {_ADVICE}") from error
