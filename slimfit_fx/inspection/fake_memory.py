"""Tensors without memory, and what they would take: every allocation of a run on them is counted."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from slimfit_fx.graph import gate_ops
from slimfit_fx.torch_internals import FakeTensorMode, tree_leaves

_BLOCK = 512  # bytes: what CUDA's caching allocator rounds up to


class FakeMemory(FakeTensorMode):
    """Makes fake tensors and counts the bytes of those that are alive.

    Operators that read gates do what they do, with the gates of the moment, which are real.

    Attributes:
        now: bytes that are alive.
        highest: the most that `now` was since `begin`.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.now = 0
        self.highest = 0
        self._alive: dict[StorageWeakRef, weakref.ref[Any]] = {}
        self._within = False  # an operator that torch makes of others

    def empty(self, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype, device: Any) -> Tensor:
        """A tensor that counts until it is gone."""
        with self:
            return torch.empty_strided(size, stride, dtype=dtype, device=device)

    def begin(self) -> None:
        """Forgets what was the most."""
        self.highest = self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "slimfit_fx":
            return getattr(gate_ops, func.overloadpacket.__name__)(*args, **(kwargs or {}))
        if self._within:
            return super().__torch_dispatch__(func, types, args, kwargs)
        self._within = True
        try:
            result = super().__torch_dispatch__(func, types, args, kwargs)
        finally:
            self._within = False
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._hold(leaf)
        return result

    def _hold(self, tensor: Tensor) -> None:
        if tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        key = StorageWeakRef(storage)
        if (known := self._alive.get(key)) is not None and known() is not None:
            return
        nbytes = storage.nbytes()
        if tensor.device.type != "cpu":
            nbytes = -(-nbytes // _BLOCK) * _BLOCK

        def gone(reference: Any) -> None:
            self.now -= nbytes
            if self._alive.get(key) is reference:
                del self._alive[key]

        self._alive[key] = weakref.ref(storage, gone)
        self.now += nbytes
        self.highest = max(self.highest, self.now)
