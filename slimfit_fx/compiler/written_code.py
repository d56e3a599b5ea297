"""Inductor's code for a graph, written and not compiled: its allocations happen, its kernels do nothing."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from slimfit_fx.torch_internals import GraphLowering, compile_fx_inner, inductor_config

from .inductor_fixes.replaced import replaced

_COMPILES = "async_compile = AsyncCompile()"


def written(
    allocate: Callable[..., Tensor], gm: fx.GraphModule, inputs: Sequence[Any], **options: Any
) -> Callable[[list[Any]], Any]:
    """Takes the place of Inductor's `compile_fx_inner`; the result runs on fake tensors.

    Args:
        allocate: makes a fake tensor, as `torch.empty_strided`.
        gm, inputs, options: as for Inductor.
    """
    found: list[tuple[str, dict[str, Any]]] = []

    def write_only(graph: Any) -> Any:
        wrapper, _ = graph.codegen()
        found.append((wrapper.value, dict(graph.constants)))
        module: Any = types.ModuleType("written_only")
        module.__file__, module.call, module.source = "written_only.py", _never, wrapper.value
        return module

    with (
        inductor_config.patch(fx_graph_cache=False, fx_graph_remote_cache=False),
        replaced(GraphLowering, "_compile_to_module", write_only),
    ):
        compile_fx_inner(gm, inputs, **options)
    source, constants = found[-1]
    return _loaded(source, constants, allocate)


def _loaded(source: str, constants: dict[str, Any], allocate: Callable[..., Tensor]) -> Callable[[list[Any]], Any]:
    """The code's function."""
    scope: dict[str, Any] = {"__name__": "written_only", "__file__": "written_only.py", "_Kernels": _Kernels}
    exec(compile(source.replace(_COMPILES, "async_compile = _Kernels()"), "written_only.py", "exec"), scope)
    scope.update(constants)
    for name in [name for name in scope if name.startswith("empty_strided_")]:
        kind = name.removeprefix("empty_strided_").removesuffix("_pinned")
        scope[name] = _allocation(allocate, "cpu" if kind == "p2p" else kind)
    scope.update(reinterpret_tensor=_view, assert_size_stride=_nothing, assert_alignment=_nothing)
    call = scope["call"]

    def run(arguments: list[Any]) -> Any:
        return call(arguments)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def _allocation(allocate: Callable[..., Tensor], device: str) -> Callable[..., Tensor]:
    return lambda size, stride, dtype: allocate(size, stride, dtype=dtype, device=device)


def _view(x: Tensor, size: Sequence[int], stride: Sequence[int], offset: int = 0) -> Tensor:
    return torch.as_strided(x, size, stride, int(x.storage_offset()) + offset)


class _Kernel:
    """Writes nothing, however it is called."""

    def __call__(self, *_: Any, **__: Any) -> None: ...

    def run(self, *_: Any, **__: Any) -> None: ...


class _Kernels:
    """Stands where generated code has its kernels compiled."""

    def __getattr__(self, name: str) -> Callable[..., _Kernel]:
        return lambda *_, **__: _Kernel()


def _nothing(*_: Any, **__: Any) -> None: ...


def _never(*_: Any) -> Any:
    raise AssertionError("this code was written to be read")
