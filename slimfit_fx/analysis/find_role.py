"""Tells what a saved tensor is to the backward, from the operators that make and read it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator

import torch
from torch import fx

from slimfit_fx.graph.nodes import COPIES, SPLITS, VIEWS, aten, base_of, hint, is_pointwise, keep_of, readers
from slimfit_fx.roles import BORROWED

from .conditioning import operator_of

# The role of a saved tensor by the operator that reads it in the backward, as it was before decomposition. An operator
# of the forward is among them where the backward computes it again. The first match counts.
_BY_READER = {
    "native_layer_norm_backward": "norm input",
    "_fused_layer_norm_backward": "norm input",
    "native_group_norm_backward": "norm input",
    "native_batch_norm_backward": "norm input",
    "cudnn_batch_norm_backward": "norm input",
    "batch_norm_backward": "norm input",
    "_fused_rms_norm_backward": "norm input",
    "native_layer_norm": "norm input",
    "native_group_norm": "norm input",
    "_fused_rms_norm": "norm input",
    "gelu_backward": "activation input",
    "silu_backward": "activation input",
    "gelu": "activation input",
    "silu": "activation input",
    "hardswish_backward": "activation input",
    "mish_backward": "activation input",
    "elu_backward": "activation input",
    "leaky_relu_backward": "activation input",
    "softplus_backward": "activation input",
    "threshold_backward": "activation output",
    "tanh_backward": "activation output",
    "sigmoid_backward": "activation output",
    "_softmax_backward_data": "softmax output",
    "_softmax": "softmax output",
    "_safe_softmax": "softmax output",
    "_log_softmax_backward_data": "logits",
    "_log_softmax": "logits",
    "nll_loss_forward": "logits",
    "binary_cross_entropy_with_logits": "logits",
    "native_dropout_backward": "dropout mask",
    "_scaled_dot_product_flash_attention_for_cpu_backward": "attention operand",
    "_scaled_dot_product_flash_attention_backward": "attention operand",
    "_scaled_dot_product_efficient_attention_backward": "attention operand",
    "_scaled_dot_product_cudnn_attention_backward": "attention operand",
    "_scaled_dot_product_fused_attention_overrideable_backward": "attention operand",
    "_scaled_dot_product_attention_math": "attention operand",
    "convolution_backward": "convolution input",
    "mm": "linear input",
}
_ACTIVATIONS = frozenset({"gelu", "silu", "relu", "hardswish", "mish", "elu", "leaky_relu", "softplus", "sigmoid"})

_SQUARES = frozenset({aten.pow.Tensor_Scalar, aten.mul.Tensor, aten.square.default})
_PRODUCTS = frozenset({aten.bmm.default, aten.baddbmm.default})


def find_role(produced: fx.Node, taken: fx.Node) -> str:
    """The role of the tensor that the forward makes as `produced` and the backward takes as `taken`."""
    base, value = base_of(produced), produced.meta["val"]
    if base.op == "placeholder":
        return BORROWED
    if (kept := keep_of(produced)) is not None:
        return _linear_role(kept)
    if value.dtype is torch.bool:
        return "dropout mask"
    if not value.is_floating_point():
        return "indices"
    if _is_statistic(base):
        return "statistics"
    if _are_scores(base):
        return "softmax output"
    found = {operator_of(reader) for reader in readers_of_copies(taken)}
    role = next((role for name, role in _BY_READER.items() if name in found), None)
    original = _original_of(base)
    if role in (None, "convolution input", "linear input") and "bmm" in found and _is_attended(original):
        return "attention operand"
    return role or ("logits" if _are_logits(original) else "norm input" if _is_normalized(original) else "other")


def _original_of(node: fx.Node) -> fx.Node:
    """What was copied: under autocast the backward may have a copy of its own, which nothing in the forward reads."""
    while node.target in COPIES or node.target in VIEWS:
        node = node.all_input_nodes[0]
    return node


def readers_of_copies(node: fx.Node) -> Iterator[fx.Node]:
    """All nodes that read the values of `node`, also in another dtype, order or number."""
    for reader in readers(node):
        if reader.target in COPIES:
            yield from readers_of_copies(reader)
        else:
            yield reader


def _linear_role(kept: fx.Node) -> str:
    """Whether an activation function made a kept tensor: itself, as a gated product, or with dropout behind it."""
    node = base_of(kept.args[0])  # type: ignore[arg-type]
    for _ in range(3):
        # a quotient by softplus, say, is something else
        passed_on = node.target in COPIES or operator_of(node) in ("mul", "native_dropout", "dropout")
        makers = [node, *map(base_of, node.all_input_nodes)] if passed_on else [node]
        if any(operator_of(maker) in _ACTIVATIONS for maker in makers):
            return "feed-forward input"
        if not passed_on or not node.all_input_nodes:
            break
        node = base_of(node.all_input_nodes[-1])
    return "linear input"


def _are_scores(base: fx.Node) -> bool:
    """Whether a product of query and key goes into a softmax, by way of scaling and masks."""
    return base.target is aten.bmm.default and leads_to(base, is_softmax, is_pointwise)


def _is_attended(base: fx.Node) -> bool:
    """Whether a product of the tensor goes into a softmax, or is one with a softmax: not every batch of products is."""
    for product in readers_of_copies(base):
        if product.target not in _PRODUCTS:
            continue
        if leads_to(product, is_softmax, _is_score) or any(map(_is_softmaxed, product.all_input_nodes)):
            return True
    return False


def _is_softmaxed(node: fx.Node) -> bool:
    """Whether a softmax made the tensor, with dropout behind it, masks and scales."""
    pending = [node]
    for _ in range(16):
        if not pending:
            return False
        node = pending.pop(0)
        if is_softmax(node):
            return True
        if node.target in VIEWS or is_pointwise(node):
            pending.extend(node.all_input_nodes)
    return False


def _is_score(node: fx.Node) -> bool:
    return is_pointwise(node) or operator_of(node) in ("gather", "index", "constant_pad_nd", "cat")


def _are_logits(base: fx.Node) -> bool:
    """Whether a loss reads the tensor, by way of soft caps or conversions."""
    return leads_to(base, _is_loss, is_pointwise)


def _is_normalized(base: fx.Node) -> bool:
    """Whether a norm reads the tensor, or a sum with it: the residual stream, or what is added to it."""
    return leads_to(base, _is_norm, is_sum)


def is_softmax(node: fx.Node) -> bool:
    return operator_of(node) in ("_softmax", "_safe_softmax") or node.target is aten.amax.default


def _is_loss(node: fx.Node) -> bool:
    return _BY_READER.get(operator_of(node)) == "logits"


def _is_norm(node: fx.Node) -> bool:
    return _BY_READER.get(operator_of(node)) == "norm input" or _is_mean_square(node)


def is_sum(node: fx.Node) -> bool:
    scaled = node.target in (aten.mul.Tensor, aten.div.Tensor) and len(node.all_input_nodes) == 1
    return scaled or node.target in (aten.add.Tensor, aten.sub.Tensor)


def _is_mean_square(square: fx.Node) -> bool:
    """Whether this is a square of which the mean over the last dimension scales the rows: an RMS norm written out."""
    if square.target not in _SQUARES or len(square.all_input_nodes) != 1:
        return False
    means = [node for node in readers(square) if node.target is aten.mean.dim]
    roots = (root for mean in means for shifted in readers(mean) for root in readers(shifted))
    return any(root.target is aten.rsqrt.default for root in roots)


def leads_to(base: fx.Node, found: Callable[[fx.Node], bool], by_way_of: Callable[[fx.Node], bool]) -> bool:
    """Whether what is looked for reads a forward tensor, or one of the nearest 15 on the way from it."""
    pending = [base]
    for _ in range(16):
        if not pending:
            return False
        for node in readers_of_copies(pending.pop(0)):
            if found(node):
                return True
            if by_way_of(node):
                pending.append(node)
    return False


def _is_statistic(node: fx.Node) -> bool:
    """One number a row or a channel; of a kernel with several results, what is not the first."""
    if node.target is operator.getitem and node.args[0].target not in SPLITS:  # type: ignore[union-attr]
        return bool(node.args[1])
    shape = [hint(size, 2) for size in node.meta["val"].shape]
    return len(shape) < 2 or shape[-1] == 1
