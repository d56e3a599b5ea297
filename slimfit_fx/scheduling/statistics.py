"""What is measured of layers around an optimizer step: a few multi-tensor kernels, and no synchronisation.

Updates are measured on a sample of each tensor, so that nothing large is copied. The results are read one step later.
By then a copy to the host, started right away, has long arrived.

Of tensors that are shared out over ranks each rank measures its own elements, and the sums are added up.
"""

# pyright: reportPrivateImportUsage=false
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import gcd

import torch
import torch.distributed as dist
from torch import Tensor

from slimfit_fx.model.shards import local, sum_over

Groups = Sequence[dist.ProcessGroup]

# Added to squares of weights: an element that was zero, or nearly, counts as unmoved.
_TINY = 1e-30
# Elements of a tensor that stand for all of them.
_SAMPLE = 1 << 16
# Elements whose temporary copies are alive together.
_CHUNK = 1 << 24


def sample(tensor: Tensor) -> Tensor:
    """A view of at most 65,536 elements, evenly spread over rows and columns; all of them if there are no more.

    Of a larger tensor, 4,096 at least for rows of up to 30,000 elements: the stride and a row's length have no common
    divisor, or every row would be met at the same columns. Of a tensor that is shared out over ranks, the elements that
    are here, as densely on each rank.
    """
    flat = local(tensor).detach().reshape(-1)
    stride = max(1, -(-tensor.numel() // _SAMPLE))
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
    return _norms(change, 1)


@torch.no_grad()
def squared_norms(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of the squares of each tensor, float32 [tensors]."""
    return torch.stack([norm for start, end in _chunks(tensors) for norm in _norms(tensors[start:end], 2)]).square()


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


def measure_updates(
    layers: Sequence[int], old: Sequence[Tensor], new: Sequence[Tensor], groups: Groups = ()
) -> Measurement:
    """The mean relative change of layers, whose tensors are of one device, from the same samples before and after.

    Args:
        groups: of ranks over which all of the tensors are shared out.
    """
    counts = tuple(float(tensor.numel()) for tensor in new)
    sums = relative_updates(old, new)
    if not groups:
        on_host, arrived = _to_host(sums)
        return Measurement((Part(tuple(layers), on_host, counts),), arrived=arrived)
    # filled on the device: a copy of numbers to it would wait
    return _quotients(layers, sums, torch.stack([sums.new_full((), count) for count in counts]), groups)


def measure_gradients(
    layers: Sequence[int],
    gradients: Sequence[Tensor],
    weights: Sequence[Tensor],
    scale: Tensor | None,
    groups: Groups = (),
) -> Measurement:
    """Gradient norms relative to weight norms; `scale` is a gradient scaler's, if the gradients still have it."""
    squares = squared_norms(list(map(local, gradients)))
    below = squared_norms(list(map(local, weights)))
    return _quotients(layers, squares if scale is None else squares / scale.square(), below, groups, root=True)


@torch.no_grad()
def measure_gains(
    layers: Sequence[int],
    old: Sequence[Tensor],
    parameters: Sequence[Tensor],
    scale: Tensor | None,
    gradients: Sequence[Tensor] | None = None,
    groups: Groups = (),
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
        gains.append((moved * gradient).sum() * (local(parameter).numel() / max(1, before.numel())))
    sums = sum_over(groups, torch.stack(gains))
    total, arrived = _to_host(sums.clamp(min=0) / (1.0 if scale is None else scale))
    once = tuple(float(layer not in layers[:place]) for place, layer in enumerate(layers))
    return Measurement((Part(tuple(layers), total, once),), arrived=arrived)


def _quotients(layers: Sequence[int], above: Tensor, below: Tensor, groups: Groups, root: bool = False) -> Measurement:
    """Of the sums `above` and `below` of tensors, after all ranks' were added up at once."""
    both, arrived = _to_host(sum_over(groups, torch.stack([above, below])))
    return Measurement((Part(tuple(layers), both[0], both[1]),), arrived=arrived, root=root)


def may_skip(found_inf: Tensor) -> Measurement:
    """Of a step that a gradient scaler leaves to the optimizer: nothing counts if the flag is not zero."""
    flag, arrived = _to_host(found_inf.detach().reshape(()))
    return Measurement(skipped=(flag,), arrived=arrived)


def _norms(tensors: Sequence[Tensor], order: int) -> Sequence[Tensor]:
    """Of tensors of one dtype, float32 each."""
    if tensors[0].dtype is torch.float64:
        return [norm.float() for norm in torch._foreach_norm(list(tensors), order)]
    return torch._foreach_norm(list(tensors), order, dtype=torch.float32)


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
