"""The most memory that a training run takes, before it runs."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import Unpack

from slimfit_fx.config import Config, budget_bytes
from slimfit_fx.config_options import ConfigOptions
from slimfit_fx.errors import ConfigError, ModelError, StateError, choose
from slimfit_fx.model.layers import check_shapes
from slimfit_fx.runtime.registry import original, session_of
from slimfit_fx.sizes import size_text

from .text import fitted_table

if TYPE_CHECKING:
    from .fake_step import Step

_LARGEST = 1 << 20  # examples


def preview(
    model: nn.Module,
    batch: Any,
    optimizer: str | Optimizer | Callable[..., Optimizer] | None = "AdamW",
    loss: Callable[[Any], Tensor] | None = None,
    device: str | torch.device | None = None,
    config: Config | None = None,
    **overrides: Unpack[ConfigOptions],
) -> Preview:
    """The largest peak of training `model` transformed, before anything runs; print it.

    A copy of the model without weights runs one step: Inductor writes the code and nothing is compiled; what the code,
    autograd and the optimizer allocate and free is counted. `regions="blocks"` captures each kind of block once, and
    takes seconds. As many layers are open as open at most in the run. Each figure is the most over all sets of so many
    layers (or of what `memory_budget` holds): the few sets with the largest gradients and saved tensors, at the ends
    of forward and backward and in the midst of the backward, are counted. Another may take a little more. What
    libraries allocate by themselves is not counted, nor what an allocator cannot use because of fragmentation.

    The model, its modes and the random state stay as they are; it may be on the meta device.

    Example:
        >>> print(slimfit_fx.preview(model, batch, regions="blocks"))
        >>> slimfit_fx.preview(model, batch).largest_batch("24GiB")

    Args:
        model: not transformed.
        batch: a mapping of keyword arguments, a tuple of arguments, or what the model takes first; of any device.
        optimizer: a class of torch.optim or its name, anything that makes an optimizer of parameters, or an optimizer
            over the model's; None leaves its step out.
        loss: makes a scalar of the model's output; by default its `.loss`, or the output itself if it is a scalar.
        device: where it will train; by default where its parameters are, and the CPU for the meta device.
        config: all options of `transform`; `overrides` are its fields.

    Raises:
        StateError: the model is transformed or compiled already.
        ModelError: the batch gives no loss, the model cannot be copied, or nothing in it can be frozen.
        ConfigError: as `transform`; an unknown optimizer; or a device that this machine does not have.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"preview takes a torch.nn.Module, got {type(model).__name__}")
    if session_of(model) is not None or original(model) is not model:
        raise StateError(
            "the model is transformed or compiled already: preview the plain one, with the options meant for "
            "transform; slimfit_fx.undo(model) gives it back"
        )
    check_shapes(model)
    options = (config or Config()).replace(**overrides)
    from .fake_step import fake_step, same_optimizer  # with Dynamo and Inductor: `import slimfit_fx` stays cheap

    if device is None and next(model.parameters()).device.type == "meta":
        device = "cpu"
    where = None if device is None else _present(torch.device(device))
    if isinstance(optimizer, str):
        kinds = {k.lower(): kind for k, kind in vars(torch.optim).items() if isinstance(kind, type)}
        optimizer = kinds[choose("optimizer", optimizer.lower(), sorted(kinds))]

    def make(fake: nn.Module, twins: dict[int, nn.Parameter]) -> Optimizer | None:
        if isinstance(optimizer, Optimizer):
            return same_optimizer(optimizer, twins)
        return None if optimizer is None else optimizer([p for p in fake.parameters() if p.requires_grad])

    def capture(size: int | None) -> Step:
        sized = batch if size is None else _resized(batch, _batch_size(batch), size)
        return fake_step(model, sized, make, loss, options, where)

    return Preview(capture(None), capture, batch)


@dataclass(frozen=True)
class Preview:
    """What a training step will take, at most; bytes.

    Attributes:
        step: what was counted.
        capture: counts for another batch size.
        batch: that it was counted for.
    """

    step: Step
    capture: Callable[[int | None], Step]
    batch: Any

    @property
    def peak(self) -> int:
        """The most that is alive at once: weights, optimizer states, the batch, and the largest phase."""
        return _peak(self.step)

    @property
    def phases(self) -> dict[str, int]:
        """The most that is alive in forward, backward and optimizer step, above weights, states and batch."""
        return dict(self.step.phases)

    @property
    def saved_bytes(self) -> int:
        """Bytes handed to the backward, at most."""
        return self.step.saved

    def saved_bytes_at(self, open_layers: Collection[str]) -> int:
        """Bytes handed to the backward while the layers of these names are open, as `report` counts them."""
        return self.step.plan.bytes_at([name in open_layers for name in self.step.layers])

    def fits(self, budget: int | str) -> bool:
        """Whether the peak is within `budget`: bytes, or a text such as `"8GiB"`."""
        return self.peak <= budget_bytes(budget, "budget")

    def largest_batch(self, budget: int | str) -> int:
        """The largest number of examples whose peak is within `budget`: bytes, or a text such as `"24GiB"`.

        Memory is close to affine in it: a few captures find it, of which the last two show that it fits and that one
        more does not. The first dimension of every tensor of the batch that has the batch's length is changed.

        Raises:
            ConfigError: one example does not fit; it says what that takes.
        """
        limit = budget_bytes(budget, "budget")
        here = _batch_size(self.batch)
        peaks = {here: self.peak}

        def peak(size: int) -> int:
            if size not in peaks:
                peaks[size] = _peak(self.capture(size))
            return peaks[size]

        peak(2 * here)
        while True:
            low = max((n for n, found in peaks.items() if found <= limit), default=0)
            high = min((n for n, found in peaks.items() if found > limit), default=_LARGEST)
            if high <= low + 1:
                break
            (a, at_a), (b, at_b) = sorted(peaks.items(), key=lambda item: abs(item[1] - limit))[:2]
            slope = (at_b - at_a) / (b - a)
            guess = a + int((limit - at_a) // slope) if slope > 0 else (low + high) // 2
            peak(min(max(guess, low + 1), high - 1))
        if low == 0:
            raise ConfigError(
                f"budget: {limit:,} bytes do not hold a step with one example, which takes {peaks[1]:,} bytes. Take a "
                "preset that stores less, a higher freeze_rate, shorter sequences, or another optimizer."
            )
        return low

    def table(self) -> str:
        """The parts and the phases, at most 100 columns wide."""
        step = self.step
        rows = [
            ("weights", step.weights),
            ("optimizer states", step.states),
            ("batch", step.inputs),
            ("gradients", step.gradients),
            ("saved tensors", self.saved_bytes),
            *((f"{name}, at most above weights, states and batch", nbytes) for name, nbytes in self.phases.items()),
            ("peak", self.peak),
        ]
        return fitted_table([[name, size_text(nbytes)] for name, nbytes in rows], ["what", "bytes"], words=1)

    def to_dict(self) -> dict[str, Any]:
        """All of it, in numbers and strings that JSON knows."""
        step = self.step
        opened = [name for name, is_open in zip(step.layers, step.open_gates, strict=True) if is_open]
        return {
            "weight_bytes": step.weights,
            "optimizer_bytes": step.states,
            "batch_bytes": step.inputs,
            "gradient_bytes": step.gradients,
            "saved_bytes": self.saved_bytes,
            "phases": self.phases,
            "peak_bytes": self.peak,
            "open_layers": opened,
        }

    def __str__(self) -> str:
        return f"{self.table()}\n\n{sum(self.step.open_gates)} of {len(self.step.layers)} layers open."


def _peak(step: Step) -> int:
    return step.weights + step.states + step.inputs + max(step.phases.values())


def _present(device: torch.device) -> torch.device:
    """`device`, which the code is written for."""
    module = getattr(torch, device.type, None)
    if device.type != "cpu" and not (module is not None and module.is_available()):
        raise ConfigError(
            f"device: this machine has no {device.type!r}, which torch asks for its properties when it writes code. "
            f"Preview where one is, or with device='cpu': that counts the tensors of code for a CPU."
        )
    return device


def _batch_size(batch: Any) -> int:
    """The first dimension of the batch's first tensor that has one."""
    from .sample import tensors  # with Dynamo, as above

    size = next((tensor.shape[0] for tensor in tensors(batch) if tensor.dim()), 0)
    if not size:
        raise ModelError("the batch has no tensor with examples along its first dimension: no other size can be tried")
    return size


def _resized(batch: Any, old: int, new: int) -> Any:
    """`batch` with `new` examples, whatever they are: nothing reads them."""
    from .sample import mapped

    def resize(x: Tensor) -> Tensor:
        changes = x.dim() > 0 and x.shape[0] == old
        return torch.empty((new, *x.shape[1:]), dtype=x.dtype, device=x.device) if changes else x

    return mapped(batch, resize)
