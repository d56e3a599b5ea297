"""What generated code calls of libraries: products, convolutions and attention, with the forms of their operands."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .generate import Pair
from .machine import Machine
from .simulate import examples, run

_LIBRARIES = ("mm", "convolution", "scaled_dot_product")


def library_calls(pair: Pair) -> list[list[Any]]:
    """The forward's, in order: the operator, and sizes, strides and dtype of each tensor that it reads or writes."""
    with FakeTensorMode(allow_non_fake_inputs=True), _Calls() as calls:
        arguments = examples(pair.forward.source)
        run(pair.forward.source, Machine([1.0] * len(pair.open), held=arguments), list(arguments))
    return calls.found


class _Calls(TorchDispatchMode):
    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.found: list[list[Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if name.startswith("aten.") and any(word in name for word in _LIBRARIES):
            tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            self.found.append([name, *([list(x.shape), list(x.stride()), str(x.dtype)] for x in tensors)])
        return func(*args, **(kwargs or {}))
