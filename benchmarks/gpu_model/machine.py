"""The machine that generated code runs on in the simulator: it counts, and keeps track of memory."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._C._dynamo import guards
from torch._inductor.async_compile import AsyncCompile
from torch._prims.rng_prims import run_and_save_rng_state, run_with_rng_state
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .trace import Op

aten = torch.ops.aten
_BLOCK = 512  # bytes: CUDACachingAllocator's kMinBlockSize


def nbytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


class Memory:
    """The storages on the device that are alive, without those of `held`."""

    def __init__(self, held: Sequence[Tensor]) -> None:
        self._held = {StorageWeakRef(x.untyped_storage()) for x in held}
        self._alive: dict[StorageWeakRef, int] = {}
        self._peak = 0

    def add(self, x: Tensor) -> None:
        reference = StorageWeakRef(x.untyped_storage())
        if x.device.type == "cuda" and reference not in self._held and reference not in self._alive:
            self._alive[reference] = math.ceil(x.untyped_storage().nbytes() / _BLOCK) * _BLOCK
        self.look()

    def look(self) -> int:
        """Bytes that are alive now."""
        for reference in [r for r in self._alive if r.expired()]:
            del self._alive[reference]
        now = sum(self._alive.values())
        self._peak = max(self._peak, now)
        return now

    def take_peak(self) -> int:
        """The most since it was last asked."""
        now = self.look()
        peak, self._peak = max(self._peak, now), now
        return peak


class Machine(TorchDispatchMode):
    """Writes down every operator and kernel.

    Args:
        fractions: for each gate of the graph, in which part of the steps it is open.
        held: weights and inputs, which are not counted.
    """

    supports_higher_order_operators = True

    def __init__(self, fractions: Sequence[float], held: Sequence[Tensor]) -> None:
        super().__init__()
        self.memory = Memory(held)
        self._fractions = fractions
        self._ops: list[Op] = []
        self._parts: dict[StorageWeakRef, float] = {}  # tensors that have rows in a part of the steps only

    def take(self) -> list[Op]:
        """What was written down since it was last asked."""
        ops, self._ops = self._ops, []
        return ops

    def note(
        self, kind: str, name: str, size: float = 0.0, flops: float = 0.0, half: bool = False, part: float = 1.0
    ) -> None:
        self._ops.append(Op(kind, name, size, flops, half, self.memory.take_peak(), part))

    def part_of(self, inputs: Sequence[Tensor], results: Sequence[Tensor]) -> float:
        """In which part of the steps a kernel has anything to do; that goes for its results as well."""
        parts = [part for x in inputs if (part := self._parts.get(StorageWeakRef(x.untyped_storage()))) is not None]
        if parts:
            self._give_part(results, min(parts))
        return min(parts, default=1.0)

    def _give_part(self, results: Sequence[Tensor], part: float) -> None:
        self._parts |= {StorageWeakRef(x.untyped_storage()): part for x in results}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if isinstance(func, torch._ops.HigherOrderOperator):
            return self._with_random_state(func, args, kwargs or {})
        if func.namespace == "slimfit_fx":
            result = self._gated(func, args)
            self._hold(result)
            return result
        result = func(*args, **(kwargs or {}))
        self._hold(result)
        self._count(func, args, kwargs or {}, result)
        return result

    def _hold(self, result: Any) -> None:
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.memory.add(leaf)

    def _with_random_state(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What checkpointing makes of random operators: they run with the state that they had in the forward."""
        if func is run_and_save_rng_state:
            return torch.empty(16, dtype=torch.uint8), self.__torch_dispatch__(args[0], (), args[1:], kwargs)
        if func is run_with_rng_state:
            return self.__torch_dispatch__(args[1], (), args[2:], kwargs)
        raise NotImplementedError(f"the simulator does not know {func}")

    def _open(self, gates: int | Sequence[int]) -> float:
        """In which part of the steps one of `gates` is open."""
        return 1.0 - math.prod(1.0 - self._fractions[g] for g in ([gates] if isinstance(gates, int) else gates))

    def _gated(self, func: Any, args: Any) -> Any:
        """An operator that reads gates, or tells by a tensor's rows whether one was open."""
        name = func.overloadpacket.__name__
        if name == "separate":
            self.note("gate", name)
            return func(*args)
        if name == "kept_or":
            _, otherwise = args
            result = torch.empty_like(otherwise, memory_format=torch.contiguous_format)
            self.note("copy", name, 2 * nbytes(result))
            return result
        if name == "weight_gradient":
            a, b, _, gate, dtype = args
            part = self._open(gate)
            result = b.new_empty((_rows(a.shape[0], part), b.shape[1]), dtype=dtype)
            shared = a.shape[1]
            operands = nbytes(a) + shared * b.shape[1] * b.element_size()
            flops = 2 * a.shape[0] * shared * b.shape[1]
            self._step(name, "mm", part, result, part * operands + nbytes(result), part * flops, a.dtype)
            return result
        if name == "embedding_gradient":
            rows, _, _, count, _, gate, dtype = args
            part = self._open(gate)
            result = rows.new_empty((_rows(count, part), rows.shape[-1]), dtype=dtype)
            self._step(name, "scatter", part, result, 4 * part * nbytes(rows) + 2 * nbytes(result))
            return result
        if name == "rows_if_open":
            tensors, times, _, gates = args
            part = self._open(gates)
            units = _rows(tensors[0].shape[0] // times[0], part)
            results = [x.new_empty((units * count, *x.shape[1:])) for x, count in zip(tensors, times, strict=True)]
            self.note("gate", name)
            self._give_part(results, part)
            for result in results:
                self.memory.add(result)
                if part:
                    self.note("copy", name, 2 * nbytes(result), part=part)
            return results
        if name in ("save_if_open", "pass_gradient"):
            x, _, gates = args
            part = self._open(gates)
            result = x.new_empty((_rows(x.shape[0], part), *x.shape[1:]))
            self._step(name, "copy", part, result, 2 * nbytes(result))
            return result
        raise NotImplementedError(f"the simulator does not know slimfit_fx::{name}")

    def _step(
        self, name: str, kind: str, part: float, result: Tensor, size: float, flops: float = 0.0, dtype: Any = None
    ) -> None:
        self.memory.add(result)
        self._give_part([result], part)
        self.note("gate", name)
        if part:
            self.note(kind, name, size, flops, dtype in (torch.bfloat16, torch.float16), part)

    def _count(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        name = str(func)
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        results = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        if "empty" in name or not results or _is_view(func, inputs, results):
            return
        size = sum(map(nbytes, {id(x): x for x in (*inputs, *results)}.values()))
        if func.overloadpacket in (aten.embedding, aten.index, aten.gather):
            size = 2 * sum(map(nbytes, results))
        flops, kind = _flops(func, args, kwargs, result)
        half = results[0].dtype in (torch.bfloat16, torch.float16)
        self.note(kind, name, size, flops, half)


def _rows(rows: int, part: float) -> int:
    return round(rows * part)


def _is_view(func: Any, inputs: Sequence[Tensor], results: Sequence[Tensor]) -> bool:
    if func._schema.is_mutable:
        return False
    known = {StorageWeakRef(x.untyped_storage()) for x in inputs}
    return all(StorageWeakRef(x.untyped_storage()) in known for x in results)


def _flops(func: Any, args: Any, kwargs: Any, result: Any) -> tuple[float, str]:
    """(FLOPs, kind) of an ATen operator."""
    packet, name = func.overloadpacket, str(func)
    if packet in (aten.mm, aten.bmm, aten.addmm, aten.baddbmm):
        a, b = args[:2] if packet in (aten.mm, aten.bmm) else args[1:3]
        return 2 * a.numel() * b.shape[-1], "mm"
    if "scaled_dot_product" in name:
        backward = "backward" in name
        q, k = args[1:3] if backward else args[:2]
        causal = any(v is True for v in _named(func, args, kwargs, "is_causal"))
        flops = 4 * q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] * q.shape[3]
        return flops * (2.5 if backward else 1) * (0.5 if causal else 1), "attention"
    if "convolution" in name:
        backward = "backward" in name
        weight = args[2] if backward else args[1]
        out = args[0] if backward else result
        products = sum(args[-1][:2]) if backward else 1  # those of the input and of the weight
        return 2 * products * out.numel() * weight.numel() / weight.shape[0], "convolution"
    return 0.0, "aten"


def _named(func: Any, args: Any, kwargs: Any, name: str) -> Iterator[Any]:
    for argument, value in zip(func._schema.arguments, args, strict=False):
        if argument.name == name:
            yield value
    if name in kwargs:
        yield kwargs[name]


class _Kernel:
    """A Triton kernel that only writes down what it would move."""

    def __init__(self, name: str, source: str, machine: Machine) -> None:
        self._name, self._machine = re.sub(r"_\d+$", "", name), machine
        (signature,) = re.findall(rf"def {name}\((.*?)\):", source)
        self._parameters = [parameter.split(":")[0].strip() for parameter in signature.split(",")]
        loads = re.findall(r"tl\.load\((\w+) \+ (.*)", source)
        self._loads = {pointer: sum(p == pointer for p, _ in loads) for pointer, _ in loads}
        self._tables = {pointer for pointer, index in loads if re.search(r"\btmp\d+", index.partition(", ")[0])}
        self._scattered = set(re.findall(r"tl\.atomic_add\((\w+)", source))

    def run(self, *args: Any, **_: Any) -> None:
        pairs = [(p, a) for p, a in zip(self._parameters, args, strict=False) if isinstance(a, Tensor)]
        # several kernels joined in one have their sizes in the code, and read whole tensors
        sizes = [a for a in args if isinstance(a, int)]
        elements = math.prod(sizes) if sizes else math.inf
        written = max((nbytes(a) for p, a in pairs if "out" in p and p not in self._scattered), default=0)
        read = max((nbytes(a) for p, a in pairs if p.startswith("in_ptr")), default=0)
        size = 0
        for pointer, argument in pairs:
            once = nbytes(argument)
            if pointer in self._scattered:
                once = min(once, 2 * read)
            elif pointer.startswith("in_ptr"):
                # a part of the tensor: as many elements as the kernel has, for each place that reads
                once = min(once, elements * max(self._loads.get(pointer, 1), 1) * argument.element_size())
                if pointer in self._tables:
                    once = min(once, written or once)
            # in place, but what stood there may have been read by an earlier part of the kernel, in registers
            size += once * (2 if pointer.startswith("in_out") and pointer in self._loads else 1)
        results = [a for p, a in pairs if not p.startswith("in_ptr")]
        part = self._machine.part_of([a for p, a in pairs if p.startswith("in_ptr")], results)
        self._machine.note("triton", self._name, size, part=part)


@contextlib.contextmanager
def sandbox(machine: Machine) -> Iterator[None]:
    """Inside, a generated module that is loaded calls the machine instead of a device."""

    def empty(size: Any, stride: Any, dtype: torch.dtype) -> Tensor:
        return torch.empty_strided(size, stride, dtype=dtype, device="cuda")

    def empty_cpu(size: Any, stride: Any, dtype: torch.dtype) -> Tensor:
        return torch.empty_strided(size, stride, dtype=dtype)

    def view(x: Tensor, size: Any, stride: Any, offset: int = 0) -> Tensor:
        return torch.as_strided(x, size, stride, x.storage_offset() + offset)

    with (
        mock.patch.object(AsyncCompile, "triton", lambda _, name, source, **__: _Kernel(name, source, machine)),
        mock.patch.object(AsyncCompile, "wait", lambda *_: None),
        mock.patch.object(guards, "_empty_strided_cuda", empty),
        mock.patch.object(guards, "_empty_strided_cpu", empty_cpu),
        mock.patch.object(guards, "_reinterpret_tensor", view),
        mock.patch.object(torch.cuda, "_DeviceGuard", lambda _: contextlib.nullcontext()),
    ):
        yield
