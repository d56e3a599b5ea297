"""Answers what torch, Inductor and Triton ask the driver with the figures of a device that is not there."""

# Triton is an extra
# pyright: reportMissingImports=false
from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch._inductor.constant_folding as constant_folding
import torch._inductor.output_code as output_code
from torch import fx
from torch._dynamo.device_interface import CudaInterface
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch._inductor.graph import GraphLowering
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver
from triton.runtime.driver import driver

from .devices import H100, Device


@dataclass(frozen=True)
class Code:
    """The Python module that Inductor writes for one graph, with its Triton kernels as strings."""

    source: str
    backward: bool
    graph: fx.GraphModule | None


@contextlib.contextmanager
def pretend(device: Device = H100) -> Iterator[None]:
    """Inside, CUDA code is generated as on `device`, both graphs of a pair at once, and without any cache.

    Many answers are cached by those who ask: enter it before anything asks for CUDA, one device a process.
    """
    with contextlib.ExitStack() as stack:
        for owner, name, answer in _answers(device):
            stack.enter_context(mock.patch.object(owner, name, answer))
        stack.enter_context(mock.patch.object(constant_folding.ConstantFolder, "run", _fold_on_cpu()))
        stack.enter_context(_active(_triton_driver(device)))
        stack.enter_context(
            inductor_config.patch(
                {
                    "compile_threads": 1,
                    "fx_graph_cache": False,
                    "shape_padding": False,  # it would run both products to see which is faster
                    "triton.autotune_at_compile_time": False,
                }
            )
        )
        stack.enter_context(
            functorch_config.patch(
                enable_autograd_cache=False,
                force_non_lazy_backward_lowering=True,
                # checkpointed dropout then saves random states as tensors; the generators of a device are not there
                graphsafe_rng_functionalization=False,
            )
        )
        yield


@contextlib.contextmanager
def generated() -> Iterator[list[Code]]:
    """Collects what Inductor writes inside. Nothing is loaded: what is compiled must not be called."""
    found: list[Code] = []

    def write_only(self: Any) -> Any:
        wrapper, _ = self.codegen()
        found.append(Code(wrapper.value, self.is_backward, getattr(self, "orig_gm", None)))
        module = types.ModuleType("never_called")
        module.__file__ = "never_called.py"
        module.call, module.source = _never, wrapper.value  # type: ignore[attr-defined]
        return module

    with mock.patch.object(GraphLowering, "_compile_to_module", write_only):
        yield found


def _never(*_: Any) -> Any:
    raise AssertionError("there is no device to run this on")


def _answers(device: Device) -> Iterator[tuple[Any, str, Any]]:
    """(owner, attribute, what stands there instead)."""
    answers: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "is_initialized": lambda: False,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda _: None,
        "get_device_properties": lambda *_: device.properties(),
        "get_device_capability": lambda *_: device.capability,
        "get_device_name": lambda *_: device.name,
        "is_bf16_supported": lambda *_, **__: True,
        "synchronize": lambda *_: None,
        "memory_allocated": lambda *_: 0,
        "_exchange_device": lambda _: 0,
        "_maybe_exchange_device": lambda _: 0,
        "_lazy_init": lambda: None,
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda *_: None,
        "is_current_stream_capturing": lambda: False,
    }
    for name, answer in answers.items():
        yield torch.cuda, name, answer
        if hasattr(CudaInterface, name.lstrip("_")):  # Dynamo's and Inductor's way to the same questions
            yield CudaInterface, name.lstrip("_"), staticmethod(answer)
    yield CudaInterface, "get_raw_stream", staticmethod(lambda _: 0)
    yield torch.accelerator, "is_available", lambda: False  # else Dynamo asks for the current stream
    yield output_code, "cudagraph_partition_post_compile", lambda *_: None  # it would wrap what is never called
    yield FakeTensorMode, "avoid_device_init", property(lambda _: True)


def _triton_driver(device: Device) -> CudaDriver:
    """A driver of Triton's that knows its target; its constructor, which asks libcuda, does not run."""
    fake: Any = object.__new__(CudaDriver)
    fake.get_current_target = lambda: GPUTarget("cuda", device.architecture, 32)
    fake.get_current_device = lambda: 0
    fake.get_current_stream = lambda _: 0
    fake.get_device_capability = lambda *_: device.capability
    properties = {
        "max_shared_mem": device.shared_memory[0],
        "multiprocessor_count": device.multiprocessors,
        "warpSize": 32,
        "max_num_regs": 65536,
        "mem_bus_width": 5120,
        "mem_clock_rate": 2619000,
        "sm_clock_rate": 1980000,
    }
    fake.utils = types.SimpleNamespace(
        get_device_properties=lambda _: properties, get_device_capability=lambda *_: device.capability
    )
    return fake


@contextlib.contextmanager
def _active(fake: CudaDriver) -> Iterator[None]:
    driver.set_active(fake)
    # a CPU build has no such functions, so there is nothing for mock to put back
    torch._C._cuda_getCurrentRawStream = lambda _: 0
    torch._C._cuda_cudaCachingAllocator_is_enabled = lambda: True
    try:
        yield
    finally:
        driver._active = None
        del torch._C._cuda_getCurrentRawStream, torch._C._cuda_cudaCachingAllocator_is_enabled


def _fold_on_cpu() -> Callable[[Any], Any]:
    """Inductor computes what depends on no input while it compiles, on the device that the code is for."""

    class OnCpu(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **{k: "cpu" if k == "device" else v for k, v in (kwargs or {}).items()})

    run = constant_folding.ConstantFolder.run

    def run_on_cpu(self: Any) -> Any:
        with OnCpu():
            return run(self)

    return run_on_cpu
