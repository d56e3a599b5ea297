"""How an error in a saved tensor grows on its way through a graph.

A codec's error is small beside the largest elements of its group. Sums and products keep it so: a gradient that is
linear in the tensor errs as little as the tensor. Others do not: beside a denominator, or an argument of a logarithm,
that is nearly zero, the same error is as large as the value itself, and a comparison turns it into another branch.
What is not known to keep errors small is taken not to.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Mapping

import torch
from torch import fx

from slimfit_fx.graph.nodes import COPIES, VIEWS, aten, hint, is_tensor


class Error(enum.IntEnum):
    """An error's bound: none, small beside each element, small beside the largest elements of a group, or unknown."""

    NONE = 0
    RELATIVE = 1
    SCALED = 2
    UNBOUNDED = 3


# Operators as they were before decomposition, with derivatives that vary slowly: whatever they are made of.
_SLOW = frozenset(
    {
        *("gelu", "silu", "mish", "softplus", "log_sigmoid_forward", "log_sigmoid"),
        *("gelu_backward", "silu_backward", "mish_backward", "softplus_backward"),
        *("log_sigmoid_backward", "tanh", "tanh_backward", "sigmoid", "sigmoid_backward"),
        *("_softmax", "_safe_softmax", "_softmax_backward_data", "_log_softmax", "_log_softmax_backward_data"),
        *("binary_cross_entropy_with_logits", "nll_loss_forward", "native_dropout_backward"),
        *("native_layer_norm", "native_group_norm", "_fused_rms_norm", "native_batch_norm", "_native_batch_norm_legit"),
        *("_native_batch_norm_legit_functional", "_batch_norm_with_update", "_batch_norm_with_update_functional"),
        *("native_layer_norm_backward", "_fused_layer_norm_backward", "native_group_norm_backward"),
        *("native_batch_norm_backward", "cudnn_batch_norm_backward", "batch_norm_backward", "_fused_rms_norm_backward"),
    }
)
# Operators that are linear in each of their arguments, or nearly so, and continuous.
_LINEAR = frozenset(
    {
        *("add", "mul", "neg", "sum", "mean", "mm", "bmm", "addmm", "baddbmm"),
        *("_grouped_mm", "grouped_mm_fallback", "grouped_mm_fallback_backward", "dot", "mv", "abs", "relu", "square"),
        *("convolution", "convolution_backward", "cat", "stack", "where", "clamp", "clamp_min", "clamp_max"),
        *("maximum", "minimum", "amax", "amin", "cumsum", "gather", "index", "index_select", "embedding"),
        *("flip", "rev"),
        *("index_put", "_unsafe_index", "_unsafe_index_put", "_unsafe_masked_index", "scatter", "scatter_add"),
        *("_unsafe_masked_index_put_accumulate", "masked_fill", "select_scatter", "slice_scatter", "index_add"),
        *("constant_pad_nd", "repeat", "roll", "tril", "triu", "as_strided", "diagonal", "diag_embed", "unfold"),
        *("split", "split_with_sizes", "unbind", "getitem", "copy", "lift_fresh_copy", "real", "imag"),
        *("avg_pool2d", "avg_pool2d_backward", "avg_pool3d_backward", "_adaptive_avg_pool2d_backward"),
        *("max_pool2d_with_indices_backward", "max_pool3d_with_indices_backward", "upsample_bicubic2d"),
        *("_scaled_dot_product_flash_attention_for_cpu_backward", "_scaled_dot_product_flash_attention_backward"),
        *("_scaled_dot_product_efficient_attention_backward", "_scaled_dot_product_cudnn_attention_backward"),
        *("_scaled_dot_product_fused_attention_overrideable_backward", "_scaled_dot_product_attention_math"),
        *("save_if_open", "kept_or", "weight_gradient", "embedding_gradient", "pass_gradient"),
    }
)
# Of these only the shape of an argument is read.
_SHAPED = frozenset(
    {
        *("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "new_zeros", "new_ones"),
        *("new_full", "new_empty", "new_empty_strided", "sym_size", "sym_stride", "sym_numel", "bernoulli_like"),
    }
)
# Arguments that no error must reach, by their names in the schemas of linear operators: masks that hold infinities.
_MASKS = frozenset({"attn_mask", "attn_bias"})
_POSITIVE_MAPS = frozenset({"mul", "div", "sqrt", "rsqrt", "reciprocal", "pow", "square", "clamp_min", "abs"})
_SMALL_POWERS = (1, 2, 3, 4)


def operator_of(node: fx.Node) -> str:
    """The name of the operator that a node computes, or is a part of the decomposition of."""
    return _name(node.meta.get("original_aten", node.target))


def error_of(node: fx.Node, errors: Mapping[fx.Node, Error], linear: bool = False) -> Error:
    """The error of a node's result, from those of its arguments; arguments that are absent have none.

    Args:
        node: of a forward or a backward graph.
        errors: of the nodes before it.
        linear: whether the result is a gradient.
    """
    wrong = {argument: errors[argument] for argument in node.all_input_nodes if errors.get(argument, Error.NONE)}
    name = _name(node.target)
    if not wrong or name in _SHAPED:
        return Error.NONE
    worst = max(wrong.values())
    if worst is Error.UNBOUNDED or reads_as_mask(node, wrong):
        return Error.UNBOUNDED
    if node.target in VIEWS or (node.target in COPIES and _is_float(node)):
        return worst
    if operator_of(node) in _SLOW:
        return Error.SCALED
    if not _is_float(node):
        return Error.UNBOUNDED  # an error decides on a branch, or on an index
    if worst is Error.RELATIVE and (name in _POSITIVE_MAPS or (name == "add" and len(node.all_input_nodes) == 1)):
        return Error.RELATIVE
    if _sums_squares(node):
        return Error.RELATIVE
    return Error.SCALED if _keeps_scale(node, name, wrong, linear) else Error.UNBOUNDED


def gradient_error_of(node: fx.Node, errors: Mapping[fx.Node, Error], gradients: Collection[fx.Node]) -> Error:
    """The same for a node of the backward that depends on an output's gradient, as those in `gradients` do.

    A product that is divided by one of its factors again, as a cumulative product's backward does, errs where the
    factor is small.
    """
    wrong = any(argument in gradients and errors.get(argument) for argument in node.all_input_nodes)
    if wrong and node.target is aten.div.Tensor and is_tensor(node.args[1]):
        divisor = node.args[1].meta["val"]  # type: ignore[union-attr]
        if divisor.dim() and hint(divisor.shape[-1]) != 1:
            return Error.UNBOUNDED
    return error_of(node, errors, linear=True)


def _keeps_scale(node: fx.Node, name: str, wrong: Mapping[fx.Node, Error], linear: bool) -> bool:
    if name == "div":
        return "rounding_mode" not in node.kwargs and wrong.get(node.args[1], Error.NONE) <= Error.RELATIVE  # type: ignore[arg-type, call-overload]
    if name == "sub":  # the difference of two large numbers may be small
        return linear or not all(map(is_tensor, node.args[:2]))
    if name == "pow":
        return node.target is aten.pow.Tensor_Scalar and node.args[1] in _SMALL_POWERS
    return name in _LINEAR


def _sums_squares(node: fx.Node) -> bool:
    """Whether the result is a sum or mean of squares over rows of memory, which groups are parts of.

    Its error is small beside itself: what is rounded to zero beside a row's largest element is so small that its square
    does not count. (Magnitudes would count if there are many.)
    """
    if _name(node.target) not in ("sum", "mean") or len(node.args) < 2:
        return False
    square, dims = node.all_input_nodes[0], node.args[1]
    rank, name = int(square.meta["val"].dim()), _name(square.target)
    itself = name == "mul" and square.args[0] is square.args[1]
    squared = name == "square" or itself or (name == "pow" and square.args[1] in (2, 2.0))
    return squared and isinstance(dims, (list, tuple)) and any(dim % rank == rank - 1 for dim in dims)  # type: ignore[operator]


def reads_as_mask(node: fx.Node, tensors: Collection[fx.Node]) -> bool:
    """Whether one of the tensors is the mask of the attention that `node` computes, or computes the gradients of."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return False
    given = {parameter.name: value for parameter, value in zip(schema.arguments, node.args, strict=False)}
    return any(value in tensors for name, value in {**given, **node.kwargs}.items() if name in _MASKS)


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    values = value if isinstance(value, (tuple, list)) else [value]
    return all(part.is_floating_point() for part in values if isinstance(part, torch.Tensor))


def _name(target: object) -> str:
    return getattr(target, "__name__", str(target)).partition(".")[0]
