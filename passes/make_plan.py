"""Writes the plan: labels every saved tensor of a split graph."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

import torch
from torch import fx
from torch.multiprocessing.reductions import StorageWeakRef

from slimfit_fx.graph import SplitGraph, base_of, readers, storage_of
from slimfit_fx.plan import GatedGradient, Plan, SavedTensor

_ops = torch.ops.slimfit_fx

# The role of a saved tensor by the operator that reads it in the backward, as it was before decomposition. An operator
# of the forward is among them where the backward computes it again. The first match counts.
_ROLE_BY_READER = {
    "native_layer_norm_backward": "norm input",
    "native_group_norm_backward": "norm input",
    "native_batch_norm_backward": "norm input",
    "_fused_rms_norm_backward": "norm input",
    "native_layer_norm": "norm input",
    "native_group_norm": "norm input",
    "_fused_rms_norm": "norm input",
    "gelu_backward": "activation input",
    "silu_backward": "activation input",
    "gelu": "activation input",
    "silu": "activation input",
    "threshold_backward": "activation output",
    "tanh_backward": "activation output",
    "sigmoid_backward": "activation output",
    "_softmax_backward_data": "softmax output",
    "_log_softmax_backward_data": "logits",
    "_log_softmax": "logits",
    "native_dropout_backward": "dropout mask",
    "embedding_dense_backward": "indices",
    "bmm": "attention operand",
    "_scaled_dot_product_attention_math": "attention operand",
    "_scaled_dot_product_flash_attention_for_cpu_backward": "attention operand",
    "_scaled_dot_product_flash_attention_backward": "attention operand",
    "_scaled_dot_product_efficient_attention_backward": "attention operand",
    "_scaled_dot_product_cudnn_attention_backward": "attention operand",
    "convolution_backward": "convolution input",
    "mm": "linear input",
}


def make_plan(
    split: SplitGraph, gradients: Sequence[GatedGradient], activations: Collection[int] = frozenset()
) -> Plan:
    """The plan of `split`. Bytes are counted once a storage, and not at all where the caller holds it anyway.

    Args:
        split: with the passes' operators in it.
        gradients: what `gate_dynamic` returned.
        activations: positions of inputs that only the saved tensors of this graph hold: they count.
    """
    counted: set[StorageWeakRef] = {
        storage_of(node)
        for position, node in split.inputs().items()
        if isinstance(node.meta.get("val"), torch.Tensor) and position not in activations
    }
    plan = Plan(gradients=list(gradients))
    for produced, taken in split.saved():
        storage = storage_of(produced)
        nbytes = 0 if storage in counted else _storage_bytes(produced)
        counted.add(storage)
        kept = _kept(produced)
        value = (kept.args[0] if kept else produced).meta["val"]  # type: ignore[union-attr]
        plan.saved.append(
            SavedTensor(
                name=produced.name,
                module=_module_of(produced),
                role=_role(produced, taken),
                shape=tuple(int(size) if str(size).isdigit() else str(size) for size in value.shape),
                dtype=str(value.dtype).removeprefix("torch."),
                layers=tuple(kept.args[2]) if kept else (),  # type: ignore[arg-type]
                nbytes=nbytes,
            )
        )
    return plan


def _kept(produced: fx.Node) -> fx.Node | None:
    """The `keep` behind a saved tensor; the partitioner may hand over a view of it."""
    base = base_of(produced)
    return base if base.target is _ops.keep.default else None


def _storage_bytes(node: fx.Node) -> int:
    """Bytes of the storage behind a node; of a kept tensor, those of its open form."""
    kept = _kept(node)
    if kept is not None:
        value = kept.args[0].meta["val"]  # type: ignore[union-attr]
        return _hint(value.numel()) * value.element_size()
    return _hint(node.meta["val"].untyped_storage().nbytes())


def _hint(size: int | torch.SymInt) -> int:
    """A size as the capture saw it."""
    return size if isinstance(size, int) else int(size.node.hint)


def _role(produced: fx.Node, taken: fx.Node) -> str:
    if base_of(produced).op == "placeholder":
        return "input or parameter"
    if produced.target is _ops.snapshot.default:
        return "gates"
    if _kept(produced) is not None:
        return "linear input"
    if produced.meta["val"].dtype is torch.bool:
        return "dropout mask"
    found = {_operator(reader) for reader in readers(taken)}
    for operator, role in _ROLE_BY_READER.items():
        if operator in found:
            return role
    return "other"


def _operator(node: fx.Node) -> str:
    """The name of the operator that a node computes, or is a part of the decomposition of."""
    original = node.meta.get("original_aten", node.target)
    return getattr(original, "__name__", str(original)).partition(".")[0]


def _module_of(node: fx.Node) -> str:
    """The path of the innermost module that ran when the node was traced."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack")
    if not stack:
        return ""
    path, _ = list(stack.values())[-1]
    path = re.sub(r"_modules\['([^']+)'\]", r"\1", path)
    path = re.sub(r"\[['\"]?([^'\"\]]+)['\"]?\]", r".\1", path)
    return re.sub(r"^(L\.)?(self|model)\b", "", path).strip(".")
