"""The bytes that compiled forwards really keep for their backward, read from autograd's own nodes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .sample import tensors


def handed_over(outputs: Any, held: Iterable[Tensor]) -> int:
    """Bytes that the compiled graphs behind `outputs` keep for their backward; storages of `held` are left out."""
    known = set(map(storage, held))
    total = 0
    for node in compiled_functions(outputs):
        # torch >= 2.13 keeps what needs no version check apart
        saved = [*node.saved_tensors, *getattr(node, "_tensors_no_vc_check", [])]
        total += sum({storage(t): t.untyped_storage().nbytes() for t in saved if storage(t) not in known}.values())
    return total


def compiled_functions(outputs: Any) -> set[Any]:
    """The autograd nodes of all compiled graphs that `outputs` were computed with."""
    pending: list[Any] = [tensor.grad_fn for tensor in tensors(outputs)]
    seen = set()
    while pending:
        node = pending.pop()
        if node is not None and node not in seen:
            seen.add(node)
            pending.extend(following for following, _ in node.next_functions)
    return {node for node in seen if "CompiledFunction" in type(node).__name__}


def storage(tensor: Tensor) -> StorageWeakRef:
    """The identity of the memory behind `tensor`."""
    return StorageWeakRef(tensor.untyped_storage())
