"""PyTorch's operators as models: each between linear layers, with the operands that torch's own tests give it."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.opinfo.core import OpInfo
from torch.utils._pytree import tree_flatten, tree_unflatten

# Small operands, so that a capture takes little more than the tracing.
_LARGEST = 4000


@dataclass(frozen=True)
class Case:
    """An operator and one set of operands."""

    name: str
    number: int
    operator: Callable[..., Any]
    leaves: tuple[Any, ...]
    structure: Any
    domain: tuple[float | None, float | None]

    def __str__(self) -> str:
        return self.name if not self.number else f"{self.name}-{self.number}"

    def model(self) -> Between:
        return Between(self)

    def operands(self) -> list[Tensor]:
        """Float operands, over three orders of magnitude, up to where an operator is singular."""
        generator = torch.Generator().manual_seed(0)
        return [_spread(leaf, self.domain, generator) for leaf in self.leaves if _is_operand(leaf)]

    def others(self) -> list[Tensor]:
        return [leaf.detach().clone() for leaf in self.leaves if isinstance(leaf, Tensor) and not _is_operand(leaf)]

    def results(self, operands: list[Tensor], others: list[Tensor]) -> list[Tensor]:
        """What the operator makes of them, as far as it is a float."""
        floats, rest = iter(operands), iter(others)
        leaves = [
            next(floats) if _is_operand(leaf) else next(rest) if isinstance(leaf, Tensor) else leaf
            for leaf in self.leaves
        ]
        arguments, options = tree_unflatten(leaves, self.structure)
        results = tree_flatten(self.operator(*arguments, **options))[0]
        return [x for x in results if isinstance(x, Tensor) and x.is_floating_point() and x.numel()]


class Between(nn.Module):
    """A linear layer that starts as the identity makes each operand, another one reads each result."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        widths = [_width(leaf) for leaf in case.leaves if _is_operand(leaf)]
        # without biases: their gradients may be differences of large numbers
        self.before = nn.ModuleList(nn.Linear(width, width, bias=False) for width in widths)
        for layer in self.before:
            nn.init.eye_(layer.weight)
        with torch.no_grad():
            results = case.results(case.operands(), case.others())
        torch.manual_seed(1)
        self.after = nn.ModuleList(nn.Linear(_width(result), 4) for result in results)

    def forward(self, operands: list[Tensor], others: list[Tensor]) -> Tensor:
        made = [layer(x.reshape(-1, _width(x))).view(x.shape) for layer, x in zip(self.before, operands, strict=True)]
        results = self.case.results(made, others)
        rows = [layer(x.reshape(-1, _width(x))).mean(0) for layer, x in zip(self.after, results, strict=True)]
        return torch.stack(rows)


def cases(wanted: Callable[[str], bool], samples: int = 1) -> Iterator[Case]:
    """Every differentiable operator that torch tests and whose name is wanted, with its largest small samples."""
    for operator in op_db:
        if not operator.supports_autograd or torch.float32 not in operator.supported_backward_dtypes("cpu"):
            continue
        variant = f".{operator.variant_test_name}" if operator.variant_test_name else ""
        if not wanted(operator.name + variant):
            continue
        domain = getattr(operator, "domain", (None, None))
        found = (
            Case(operator.name + variant, 0, operator.op, *sample, domain) for sample in _samples(operator, samples)
        )
        for number, case in enumerate(itertools.islice(filter(_has_results, found), samples)):
            yield dataclasses.replace(case, number=number)


def _samples(operator: OpInfo, count: int) -> list[tuple[tuple[Any, ...], Any]]:
    """The first sets of operands, the largest one first."""
    random.seed(0)
    torch.manual_seed(0)
    found = []
    for sample in itertools.islice(operator.sample_inputs("cpu", torch.float32, requires_grad=True), 12 * count):
        leaves, structure = tree_flatten(((sample.input, *sample.args), sample.kwargs))
        sizes = [leaf.numel() for leaf in leaves if _is_operand(leaf)]
        if sizes and 1 < max(sizes) <= _LARGEST and min(sizes) > 0:
            found.append((tuple(leaves), structure))
    return sorted(found, key=lambda sample: -sum(leaf.numel() for leaf in sample[0] if _is_operand(leaf)))


def _has_results(case: Case) -> bool:
    """Whether the operator is defined for the operands: some of torch's are there for its error messages."""
    results = case.results(case.operands(), case.others())
    return bool(results) and all(bool(result.isfinite().all()) for result in results)


def _is_operand(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.requires_grad and leaf.dtype is torch.float32


def _width(x: Tensor) -> int:
    return x.shape[-1] if x.dim() else 1


def _spread(x: Tensor, domain: tuple[float | None, float | None], generator: torch.Generator) -> Tensor:
    """Moves each element towards the end of the domain that is next to it, towards zero if there is no end."""
    x = x.detach().contiguous()
    nearness = 10 ** (-3 * torch.rand(x.shape, generator=generator))
    low, high = (math.inf if end is None else float(end) for end in domain)
    low = -low if math.isinf(low) else low
    end = torch.where(x - low < high - x, low, high) if math.isfinite(low) or math.isfinite(high) else torch.zeros(())
    return torch.where(torch.isfinite(end), end + (x - end) * nearness, x)
