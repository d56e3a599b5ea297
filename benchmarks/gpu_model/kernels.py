"""Compiles the Triton kernels of a generated module to machine code and reads off what they take."""

# Triton is an extra
# pyright: reportMissingImports=false
from __future__ import annotations

import functools
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import ASTSource

_KERNEL = re.compile(r"^(\w+) = async_compile\.triton\('(\w+)', '''(.*?)''', device_str='cuda'\)", re.S | re.M)


@dataclass(frozen=True)
class Kernel:
    """One Triton kernel in a generated module.

    Attributes:
        name: that the module calls it by.
        source: a module of its own with Inductor's heuristics; equal for equal kernels, whatever their names.
    """

    name: str
    source: str


@dataclass(frozen=True)
class Compiled:
    """What ptxas made of a kernel in the first configuration that the autotuner would try.

    Attributes:
        registers: of a thread.
        spilled: bytes of a thread's registers that did not fit and are stored in memory.
        shared: bytes of a block.
        error: why it does not compile, `""` if it does.
    """

    registers: int = 0
    spilled: int = 0
    shared: int = 0
    error: str = ""


def kernels(source: str) -> Iterator[Kernel]:
    """The Triton kernels of a generated module, in order."""
    for called, name, text in _KERNEL.findall(source):
        yield Kernel(called, re.sub(rf"\b{name}\b", "kernel", text))


def load(kernel: Kernel) -> Any:
    """Inductor's autotuner around the kernel. Triton reads the source from a file, which has to stay."""
    with tempfile.NamedTemporaryFile("w", suffix=".py", delete=False) as file:
        file.write(kernel.source)
    scope: dict[str, Any] = {"__name__": "kernel", "__file__": file.name}
    try:
        exec(compile(kernel.source, file.name, "exec"), scope)
        scope["kernel"].fn.src  # noqa: B018  (read now)
    finally:
        Path(file.name).unlink()
    return scope["kernel"]


@functools.cache  # by source: layers of a model share kernels, and so do models
def compile_kernel(source: str, architecture: int) -> Compiled:
    """Machine code of a kernel for an architecture, 90 for sm_90. Triton keeps it in its own cache on disk."""
    tuner = load(Kernel("kernel", source))
    config = tuner.configs[0]
    try:
        meta = tuner._create_compile_meta(config)
        meta["cc"] = architecture
        ast = ASTSource(tuner.fn, meta["signature"], meta["constants"], meta["configs"][0])
        target = GPUTarget("cuda", architecture, 32)
        binary = triton.compile(ast, target=target, options=tuner._create_compile_options(config, meta))
    except Exception as error:  # whatever it is, it is what the user would meet
        return Compiled(error=f"{type(error).__name__}: {error}"[:2000])
    return _resources(binary.asm["cubin"], binary.asm["ptx"])


def _resources(cubin: bytes, ptx: str) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = _run(knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}
    # the stack also holds tables of libdevice's sine and cosine, so ptxas is asked only then
    spilled = _spilled(ptx) if used["STACK"] + used["LOCAL"] else 0
    return Compiled(used["REG"], spilled, used["SHARED"])


def _spilled(ptx: str) -> int:
    (target,) = re.findall(r"^\.target (\w+)", ptx, re.M)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = (knobs.nvidia.ptxas.path, "-v", f"--gpu-name={target}", "-o", os.devnull, file.name)
        text = _run(*command)
    return sum(map(int, re.findall(r"(\d+) bytes spill stores", text)))


def _run(*command: str) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True)
    return done.stdout
