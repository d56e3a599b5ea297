"""What is measured of layers around an optimizer step: a few multi-tensor kernels, and no synchronisation.

Updates are measured on a sample of each tensor, so that nothing large is copied. The results are read one step later.
By then a copy to the host, started right away, has long arrived.
"""

# pyright: reportPrivateImportUsage=false
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor

# Added to squares of weights: an element that was zero, or nearly, counts as unmoved.
_TINY = 1e-30
# Elements of a tensor that stand for all of them.
_SAMPLE = 1 << 16
# Elements whose temporary copies are alive together.
_CHUNK = 1 << 24


def sample(tensor: Tensor) -> Tensor:
    """A view of at most 65,536 elements, evenly spread over rows and columns; all of them if there are no more.

    Of a larger tensor, 4,096 at least for rows of up to 30,000 elements: the stride and a row's length have no common
    divisor, or every row would be met at the same columns.
    """
    flat = tensor.detach().reshape(-1)
    stride = -(-flat.numel() // _SAMPLE)
    while stride > 1 and gcd(stride, tensor.shape[-1]) > 1:
        stride += 1
    return flat[::stride]


@torch.no_grad()
def relative_updates(old: Sequence[Tensor], new: Sequence[Tensor]) -> Tensor:
    """Sums over the elements of each tensor of |new - old| / |old| (paper, section 3), float32 [tensors]."""
    return torch.stack([total for start, end in _chunks(new) for total in _totals(old[start:end], new[start:end])])


def _totals(old: Sequence[Tensor], new: Sequence[Tensor]) -> Sequence[Tensor]:
    before, after = _wide(old), _wide(new)
    change = torch._foreach_sub(after, before)
    torch._foreach_abs_(change)
    magnitude = torch._foreach_abs(before)
    # |d| / m as |d| m / (m m + tiny), so that zeros need no mask
    torch._foreach_mul_(change, magnitude)
    torch._foreach_mul_(magnitude, magnitude)
    torch._foreach_add_(magnitude, _TINY)
    torch._foreach_div_(change, magnitude)
    return torch._foreach_norm(change, 1, dtype=torch.float32)


@torch.no_grad()
def squared_norms(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of the squares of each tensor, float32 [tensors]."""
    return torch.stack(list(torch._foreach_norm(list(tensors), 2, dtype=torch.float32))).square()


@dataclass(frozen=True)
class Part:
    """Statistics of some tensors of one device, on the host or on their way there.

    Attributes:
        layers: the layer of each tensor.
        numerators: float32 [tensors].
        denominators: float32 [tensors], or numbers that were known before.
    """

    layers: tuple[int, ...]
    numerators: Tensor
    denominators: Tensor | tuple[float, ...]


@dataclass(frozen=True)
class Measurement:
    """Statistics of the open layers at one step: a layer's value is the quotient of the sums over its tensors.

    Attributes:
        parts: of all devices and optimizers.
        skipped: a scalar for each optimizer that a gradient scaler may have told to skip its step; not zero if so.
        arrived: events to wait for before reading.
        root: whether the value is the square root of the quotient.
    """

    parts: tuple[Part, ...] = ()
    skipped: tuple[Tensor, ...] = ()
    arrived: tuple[torch.Event, ...] = ()
    root: bool = False

    def __add__(self, other: Measurement) -> Measurement:
        """Of several optimizers that stepped in turn."""
        return Measurement(
            self.parts + other.parts,
            self.skipped + other.skipped,
            self.arrived + other.arrived,
            self.root or other.root,
        )

    def read(self) -> Mapping[int, float]:
        """The value of each layer; none if a step was skipped."""
        for event in self.arrived:
            event.synchronize()
        if any(flag.item() for flag in self.skipped):
            return {}
        totals: dict[int, list[float]] = {}
        for part in self.parts:
            below = part.denominators
            below = below.tolist() if isinstance(below, Tensor) else below
            for layer, numerator, denominator in zip(part.layers, part.numerators.tolist(), below, strict=True):
                total = totals.setdefault(layer, [0.0, 0.0])
                total[0] += numerator
                total[1] += denominator
        power = 0.5 if self.root else 1.0
        return {layer: (top / bottom) ** power if bottom else 0.0 for layer, (top, bottom) in totals.items()}


def measure_updates(layers: Sequence[int], old: Sequence[Tensor], new: Sequence[Tensor]) -> Measurement:
    """The mean relative change of layers, whose tensors are of one device, from the same samples before and after."""
    sums, arrived = _to_host(relative_updates(old, new))
    return Measurement((Part(tuple(layers), sums, tuple(float(t.numel()) for t in new)),), arrived=arrived)


def measure_gradients(
    layers: Sequence[int], gradients: Sequence[Tensor], weights: Sequence[Tensor], scale: Tensor | None
) -> Measurement:
    """Gradient norms relative to weight norms; `scale` is a gradient scaler's, if the gradients still have it."""
    squares = squared_norms(gradients)
    gradient, arrived = _to_host(squares if scale is None else squares / scale.square())
    weight, later = _to_host(squared_norms(weights))
    return Measurement((Part(tuple(layers), gradient, weight),), arrived=arrived + later, root=True)


@torch.no_grad()
def measure_gains(
    layers: Sequence[int],
    old: Sequence[Tensor],
    parameters: Sequence[Tensor],
    scale: Tensor | None,
    gradients: Sequence[Tensor] | None = None,
) -> Measurement:
    """By how much the updates of layers lowered the loss, to first order: the sum of gradient * (old - new).

    An update against the gradient, of momentum or weight decay, counts as none. `old` and `gradients` are samples from
    before the step, by default of the gradients that are there; `scale` is a gradient scaler's, if they still have it.
    """
    if gradients is None:
        gradients = [sample(parameter.grad) for parameter in parameters if parameter.grad is not None]
    gains = []
    for before, gradient, parameter in zip(old, gradients, parameters, strict=True):
        moved = (before - sample(parameter)).float()  # fp16 products would vanish
        gains.append((moved * gradient).sum() * (parameter.numel() / before.numel()))
    total, arrived = _to_host(torch.stack(gains).clamp(min=0) / (1.0 if scale is None else scale))
    once = tuple(float(layer not in layers[:place]) for place, layer in enumerate(layers))
    return Measurement((Part(tuple(layers), total, once),), arrived=arrived)


def may_skip(found_inf: Tensor) -> Measurement:
    """Of a step that a gradient scaler leaves to the optimizer: nothing counts if the flag is not zero."""
    flag, arrived = _to_host(found_inf.detach().reshape(()))
    return Measurement(skipped=(flag,), arrived=arrived)


def _to_host(value: Tensor) -> tuple[Tensor, tuple[torch.Event, ...]]:
    if value.device.type == "cpu":
        return value.clone(), ()
    copy = torch.empty(value.shape, dtype=value.dtype, device="cpu", pin_memory=True)
    copy.copy_(value, non_blocking=True)
    event = torch.Event(value.device)
    event.record(torch.accelerator.current_stream(value.device))  # by default of the current device, another's perhaps
    return copy, (event,)


def _chunks(tensors: Sequence[Tensor]) -> Iterator[tuple[int, int]]:
    """Ranges of neighbours of one device and dtype, of bounded size together."""
    start, size = 0, 0
    for place, tensor in enumerate(tensors):
        first = tensors[start]
        differs = tensor.device != first.device or tensor.dtype != first.dtype
        if place > start and (differs or size + tensor.numel() > _CHUNK):
            yield start, place
            start, size = place, 0
        size += tensor.numel()
    if tensors:
        yield start, len(tensors)


def _wide(tensors: Sequence[Tensor]) -> list[Tensor]:
    """As they are, but fp16 in float32: its squares would vanish."""
    return [tensor.float() if tensor.dtype is torch.float16 else tensor for tensor in tensors]
