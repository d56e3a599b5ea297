"""Runs generated code on CPU tensors: its Triton kernels in Triton's interpreter, everything else as it is.

The process needs the environment variable TRITON_INTERPRET=1 before Triton is imported.
"""

# Triton is an extra
# pyright: reportMissingImports=false
from __future__ import annotations

import ast
import contextlib
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from torch._C._dynamo import guards
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.compile_fx import compile_fx
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.runtime.triton_heuristics import GridExpr
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from triton.runtime import interpreter

from .pretend import generated

_BLOCK, _ROWS = 64, 8  # elements of a program, in each direction; rows of a reduction, which is slow


def function_source(function: Callable[..., Any], inputs: Sequence[Tensor]) -> str:
    """The CUDA code of a function of tensors, traced with fake ones that are like `inputs`."""
    with FakeTensorMode():
        fakes = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda") for x in inputs]
        graph = make_fx(function, decomposition_table=select_decomp_table())(*fakes)
    with generated() as found, torch.no_grad():
        compile_fx(graph, fakes)
    (code,) = found
    return code.source


def execute(source: str, inputs: Sequence[Any]) -> list[Any]:
    """What a generated module returns for CPU tensors."""
    source = re.sub(r"^.*copy_if_misaligned.*$|^\s+assert_(size_stride|alignment)\(.*$", "", source, flags=re.M)
    source = re.sub(r"device='cuda(:0)?'|device\(type='cuda'(, index=0)?\)", "device='cpu'", source)

    def empty(size: Any, stride: Any, dtype: torch.dtype) -> Tensor:
        return torch.empty_strided(size, stride, dtype=dtype)

    def view(x: Tensor, size: Any, stride: Any, offset: int = 0) -> Tensor:
        return torch.as_strided(x, size, stride, x.storage_offset() + offset)

    with (
        mock.patch.object(AsyncCompile, "triton", lambda _, name, code, **__: _Kernel(name, code)),
        mock.patch.object(AsyncCompile, "wait", lambda *_: None),
        mock.patch.object(guards, "_empty_strided_cuda", empty),
        mock.patch.object(guards, "_reinterpret_tensor", view),
        mock.patch.object(interpreter, "_convert_float", _convert),
        mock.patch.object(torch.cuda, "_DeviceGuard", lambda _: contextlib.nullcontext()),
    ):
        scope: dict[str, Any] = {"__name__": "interpreted", "__file__": "interpreted.py"}
        exec(compile(source, "interpreted.py", "exec"), scope)
        return list(scope["call"](list(inputs)))


_TORCH = {
    tl.float64: torch.float64,
    tl.float32: torch.float32,
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
}
_BITS = {8: torch.uint8, 16: torch.int16, 32: torch.int32, 64: torch.int64}


def _convert(data: Any, source: Any, target: Any, _: Any) -> Any:
    """Bits of floats as those of another type, rounded to nearest as a GPU does.

    Triton's interpreter cuts off what bfloat16 has no place for, and where rounding to a float8 carries into the
    exponent it loses the carry.
    """
    bits = torch.from_numpy(np.ascontiguousarray(data).reshape(-1).view(f"i{source.primitive_bitwidth // 8}"))
    floats = bits.view(_TORCH[source]).to(_TORCH[target])
    width = target.primitive_bitwidth
    return floats.view(_BITS[width]).numpy().view(f"u{width // 8}").reshape(np.shape(data))


class _Kernel:
    def __init__(self, name: str, source: str) -> None:
        (about,) = re.findall(r"^    inductor_meta=(\{.*\}),?$", source, re.M)
        self._about = ast.literal_eval(about)
        source = re.sub(r"@triton_heuristics\.\w+\(.*?\n\)\n@triton\.jit", "@triton.jit", source, flags=re.S)
        (signature,) = re.findall(rf"def {name}\((.*?)\):", source)
        with tempfile.NamedTemporaryFile("w", suffix=".py", delete=False) as file:
            file.write(source)
        scope: dict[str, Any] = {"__name__": name, "__file__": file.name}
        exec(compile(source, file.name, "exec"), scope)
        scope["libdevice"] = _Libdevice()
        self._function = scope[name]
        self._function.fn  # noqa: B018
        self._parameters = [parameter.split(":")[0].strip() for parameter in signature.split(",")]
        self._file = Path(file.name)  # the interpreter reads it at the first run

    def run(self, *args: Any, stream: Any = None) -> None:
        given = dict(zip(self._parameters, args, strict=False))
        size = _ROWS if "r0_numel" in given else _BLOCK
        blocks = {name: size for name in self._parameters if name.endswith("BLOCK")}
        grid = GridExpr.from_meta(self._about, blocks).eval_slow({**given, **blocks})
        self._function[grid](*args, **blocks)
        self._file.unlink(missing_ok=True)


class _Libdevice:
    """The functions of CUDA's libdevice that generated code calls; the interpreter has none."""

    _FUNCTIONS: ClassVar[dict[str, Callable[[Any], Any]]] = {
        "nearbyint": np.rint,
        "floor": np.floor,
        "ceil": np.ceil,
        "trunc": np.trunc,
        "sqrt": np.sqrt,
        "rsqrt": lambda x: torch.rsqrt(torch.from_numpy(x)).numpy(),
        "erf": lambda x: torch.erf(torch.from_numpy(x)).numpy(),
        "tanh": lambda x: torch.tanh(torch.from_numpy(x)).numpy(),
        "exp": np.exp,
        "log": np.log,
        "isnan": np.isnan,
        "isinf": np.isinf,
    }

    def __getattr__(self, name: str) -> Callable[[Any], Any]:
        function = self._FUNCTIONS[name]

        def call(x: Any) -> Any:
            data = function(np.atleast_1d(x.handle.data))
            if name.startswith("is"):
                return tl.core.tensor(
                    interpreter.TensorHandle(data, tl.int1), tl.core.block_type(tl.int1, list(data.shape))
                )
            data = data.astype(x.handle.data.dtype).reshape(x.handle.data.shape)
            return tl.core.tensor(interpreter.TensorHandle(data, x.type.scalar), x.type)

        return call
