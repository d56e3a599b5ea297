"""The operators that read the gate table while a compiled graph runs.

They are opaque to the code generator on purpose: what they return depends on the gates, which are data. A tensor
that is not needed has no rows, so one graph serves every set of frozen layers, and neither a recompile nor a device
synchronisation follows when the set changes. The gates, one for each gated input of the graph, live on the CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import Library, get_ctx, register_fake

_library = Library("slimfit_fx", "DEF")
ops = torch.ops.slimfit_fx
# Inductor may not put them into a CUDA graph: what they do depends on the gates, which a captured graph would freeze.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout, torch.Tag.cudagraph_unsafe)


def _define(schema: str):
    """Registers the decorated function as the kernel of `schema` on every device."""
    name = schema.partition("(")[0]

    def register(kernel):
        _library.define(schema, tags=_TAGS)
        _library.impl(name, kernel, "CompositeExplicitAutograd")
        return kernel

    return register


# The gates that were read last, with their version: each call of a graph has a tensor of its own, which all of its
# operators read.
_last: tuple[Tensor | None, int, list[bool]] = (None, 0, [])


def _flags(gates: Tensor) -> list[bool]:
    """The gates as a list, which the first operator of a call makes for all: reading one gate takes longer."""
    global _last
    tensor, version, flags = _last
    if tensor is not gates or version != gates._version:
        flags = gates.tolist()
        _last = gates, gates._version, flags
    return flags


def _fake(name: str):
    return register_fake(f"slimfit_fx::{name}", lib=_library)


def _unknown_size() -> torch.SymInt:
    """A size that is known at run time only. Dynamo allows user code none (DynamicOutputShapeException), so the
    context's `new_dynamic_size` refuses; torch's own `_runtime_compute_coordinate_on_dim` goes the same way."""
    size = get_ctx()._shape_env.create_unbacked_symint()
    torch._check(size >= 0)
    return size


@_define("save_if_open(Tensor x, Tensor gates, int[] needed_by) -> Tensor")
def save_if_open(x: Tensor, gates: Tensor, needed_by: list[int]) -> Tensor:
    """A copy of x [n, ...] for the backward if a gate of `needed_by` is open, else [0, ...] of x's dtype and device."""
    (kept,) = rows_if_open([x], [1], gates, needed_by)
    return kept


@_fake("save_if_open")
def _(x: Tensor, gates: Tensor, needed_by: list[int]) -> Tensor:
    return x.new_empty((_unknown_size(), *x.shape[1:]))


@_define("rows_if_open(Tensor[] xs, SymInt[] times, Tensor gates, int[] needed_by) -> Tensor[]")
def rows_if_open(xs: list[Tensor], times: list[int], gates: Tensor, needed_by: list[int]) -> list[Tensor]:
    """Copies of xs, [times[i] n, ...] with one n for all, if a gate of `needed_by` is open, else [0, ...] each."""
    flags = _flags(gates)
    if any(flags[gate] for gate in needed_by):
        return [x.clone(memory_format=torch.contiguous_format) for x in xs]
    return [x.new_empty((0, *x.shape[1:])) for x in xs]


@_fake("rows_if_open")
def _(xs: list[Tensor], times: list[int], gates: Tensor, needed_by: list[int]) -> list[Tensor]:
    rows = _unknown_size()
    return [x.new_empty((rows * count, *x.shape[1:])) for x, count in zip(xs, times, strict=True)]


@_define("kept_or(Tensor kept, Tensor otherwise) -> Tensor")
def kept_or(kept: Tensor, otherwise: Tensor) -> Tensor:
    """A copy of kept [n, ...] if a gate was open and it has rows, else of otherwise [n, ...], contiguous."""
    return (kept if kept.shape[0] else otherwise).clone(memory_format=torch.contiguous_format)


@_fake("kept_or")
def _(kept: Tensor, otherwise: Tensor) -> Tensor:
    return torch.empty_like(otherwise, memory_format=torch.contiguous_format)


@_define("weight_gradient(Tensor a, Tensor b, Tensor gates, int gate, ScalarType dtype) -> Tensor")
def weight_gradient(a: Tensor, b: Tensor, gates: Tensor, gate: int, dtype: torch.dtype) -> Tensor:
    """a [m, n] @ b [n, k] in `dtype` if `gate` is open, else [0, k] and no multiplication."""
    if _flags(gates)[gate]:
        return torch.mm(a, b).to(dtype)
    return b.new_empty((0, b.shape[1]), dtype=dtype)


@_fake("weight_gradient")
def _(a: Tensor, b: Tensor, gates: Tensor, gate: int, dtype: torch.dtype) -> Tensor:
    return b.new_empty((_unknown_size(), b.shape[1]), dtype=dtype)


@_define(
    "embedding_gradient(Tensor rows, Tensor indices, Tensor mask, SymInt count, Tensor gates, int gate, "
    "ScalarType dtype) -> Tensor"
)
def embedding_gradient(
    rows: Tensor, indices: Tensor, mask: Tensor, count: int, gates: Tensor, gate: int, dtype: torch.dtype
) -> Tensor:
    """The sums [count, d] in `dtype` of `rows` [..., d] by `indices` [...] where `mask` [..., 1], if `gate` is open,
    else [0, d]."""
    if _flags(gates)[gate]:
        sums = rows.new_zeros((count, rows.shape[-1]))
        indices = indices.masked_fill(~mask.squeeze(-1), 0)  # what is masked may be out of range: it adds zeros
        return sums.index_put_((indices,), rows.masked_fill(~mask, 0), accumulate=True).to(dtype)
    return rows.new_empty((0, rows.shape[-1]), dtype=dtype)


@_fake("embedding_gradient")
def _(rows: Tensor, indices: Tensor, mask: Tensor, count: int, gates: Tensor, gate: int, dtype: torch.dtype) -> Tensor:
    return rows.new_empty((_unknown_size(), rows.shape[-1]), dtype=dtype)


@_define("pass_gradient(Tensor gradient, Tensor gates, int gate) -> Tensor")
def pass_gradient(gradient: Tensor, gates: Tensor, gate: int) -> Tensor:
    """A copy of a gradient [n, ...] that was computed whatever the gates say if `gate` is open, else [0, ...]."""
    return save_if_open(gradient, gates, [gate])


@_fake("pass_gradient")
def _(gradient: Tensor, gates: Tensor, gate: int) -> Tensor:
    return gradient.new_empty((_unknown_size(), *gradient.shape[1:]))


@_define("separate(Tensor values) -> Tensor[]")
def separate(values: Tensor) -> list[Tensor]:
    """The elements of values [n] as n tensors [] with storages of their own."""
    return [value.clone() for value in values]


@_fake("separate")
def _(values: Tensor) -> list[Tensor]:
    return [values.new_empty(()) for _ in range(values.shape[0])]
