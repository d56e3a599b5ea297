"""A model untouched, through the passes in the interpreter, and compiled: what differs is a fault, in words."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from helpers import (
    gated_parameters,
    given_to_regions,
    handed_over,
    loss_of,
    no_recompile,
    reference,
    tensors,
    transformed,
)
from helpers import gradients as gradients_of
from torch import Tensor, nn

import slimfit_fx
from slimfit_fx.inspection.gradient_difference import NEGLIGIBLE, TOLERANCES, gradient_errors, whole_norm

PRESETS = tuple(TOLERANCES)
Gradients = Mapping[str, Tensor | None]

# two orders of the same float operations, each gradient by its norm
_ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 0.06}
# generated code and interpreter may round a value to different codes, where it lies between two
_TIES = {"exact": 0.0, "balanced": 0.02, "tight": 0.3, "paper": 0.3}
# a true gradient of less than this part of all together is zero but for rounding, as a key's bias is by symmetry;
# codecs may make this part of it
_ZERO, _NEARLY_ZERO = {torch.float32: 1e-5, torch.bfloat16: 2e-4}, 1e-3
# paper prunes the input of a closed norm to its tenth: the true gradient is not near
_CLOSED = {"paper": float("inf")}


@dataclass
class Subject:
    """A model, not transformed, in training mode, and what it is called with; `regions` as in `Config`.

    Attributes:
        random: whether the forward draws random numbers: generated code draws other ones than eager PyTorch.
    """

    model: nn.Module
    inputs: Sequence[dict[str, Any]]
    dtype: torch.dtype = torch.float32
    regions: str = "model"
    random: bool = False

    @cached_property
    def plain(self) -> nn.Module:
        """Compiled without the passes; its forward alone unless a gradient is asked for."""
        return reference(self.model, "inductor", self.regions)

    @cached_property
    def outputs(self) -> list[list[Tensor]]:
        """What generated code without the passes returns for each input."""
        with rounding_as_written():
            return self._outputs()

    def _outputs(self) -> list[list[Tensor]]:
        return [[tensor.detach() for tensor in tensors(forward(self.plain, self, turn))] for turn in self.turns]

    @cached_property
    def exact(self) -> list[Gradients]:
        """The true gradients of each input's loss."""
        return gradients(self.plain if self.random else copy.deepcopy(self.model), self)

    @property
    def turns(self) -> range:
        return range(len(self.inputs))


def forward(model: nn.Module, subject: Subject, turn: int) -> Any:
    """`model` on one of the inputs, each with random numbers of its own."""
    torch.manual_seed(turn)
    return model(**subject.inputs[turn])


def gradients(model: nn.Module, subject: Subject) -> list[Gradients]:
    """Of each input's loss by itself."""
    found = []
    for turn in subject.turns:
        model.zero_grad()
        loss_of(forward(model, subject, turn)).backward()
        found.append(gradients_of(model))
    return found


def rounding_as_written() -> Any:
    """Fused kernels keep more bits of a bfloat16 than they store, and what is fused depends on what else is computed.
    Inside, values are rounded where the program says so, as in eager PyTorch: outputs can be compared to the bit."""
    return torch._inductor.config.patch(emulate_precision_casts=True)


@rounding_as_written()
def faults(subject: Subject, preset: str, **config: Any) -> list[str]:
    """What is wrong with `subject` compiled under `preset`: outputs, bytes, gradients, closed layers, recompiles."""
    options: dict[str, Any] = dict(preset=preset, regions=subject.regions, freeze_rate=0.0, always_open=(), **config)
    slim = transformed(subject.model, mode="inductor", **options)
    codecs, rounding = TOLERANCES[preset], _ROUNDING[subject.dtype]
    found, opened = [], []
    for turn in subject.turns:
        slim.zero_grad()
        loss, wrong = checked_forward(slim, subject, turn)
        loss.backward()
        found += wrong
        opened.append(gradients_of(slim))
        exact = subject.exact[turn]
        each, whole = codecs.each + rounding, codecs.whole + rounding
        found += compared(f"true gradient {turn}", opened[turn], exact, exact, each, whole)
    with no_recompile():
        closed, expected, wrong = closed_layers(slim, subject)
    found += wrong
    found += compared("closed layers", closed, expected, expected, _CLOSED.get(preset, codecs.each + rounding))
    if not subject.random:
        slim, close = transformed(subject.model, **options), _TIES[preset] + rounding
        for turn, interpreted in enumerate(gradients(slim, subject)):
            found += compared(f"interpreter {turn}", opened[turn], interpreted, subject.exact[turn], close, close)
        interpreted, *_ = closed_layers(slim, subject)
        found += compared("interpreter, closed layers", closed, interpreted, expected, close, close)
    return [f"{preset}: {fault}" for fault in found]


def checked_forward(slim: nn.Module, subject: Subject, turn: int) -> tuple[Tensor, list[str]]:
    """The loss of one input, and whether its outputs and what it saves are right."""
    with given_to_regions(slim) as given:
        outputs, found = forward(slim, subject, turn), []
    if not all(map(torch.equal, tensors(outputs), subject.outputs[turn])):
        found.append(f"outputs of input {turn} are not bit-equal to generated code without the passes")
    nbytes = handed_over(outputs, slim, {**subject.inputs[turn], **dict(enumerate(given))})
    reported = slimfit_fx.report(slim).saved_bytes_after
    if nbytes != reported:
        found.append(f"input {turn}: {nbytes} bytes are handed over, {reported} reported")
    return loss_of(outputs), found


def closed_layers(slim: nn.Module, subject: Subject) -> tuple[Gradients, Gradients, list[str]]:
    """Each forward has gates of its own, which the one backward uses, whatever the gates are by then.

    Returns:
        the gradients, the true ones, and what is wrong with outputs and bytes in generated code.
    """
    gates, layer_of = slimfit_fx.gates(slim), gated_parameters(slim)
    slim.zero_grad()
    losses, found = [], []
    expected: dict[str, Tensor | None] = dict.fromkeys([*layer_of, *subject.exact[0]])
    for turn in subject.turns:
        closed = set(gates.names[turn :: turn + 2])
        gates.set(set(gates.names) - closed)
        loss, wrong = checked_forward(slim, subject, turn)
        losses.append(loss)
        found += wrong
        for name, gradient in subject.exact[turn].items():
            if gradient is not None and layer_of.get(name) not in closed:
                before = expected[name]
                expected[name] = gradient if before is None else before + gradient
    gates.set(gates.names)
    torch.stack(losses).sum().backward()
    return gradients_of(slim), expected, found


def compared(
    label: str, found: Gradients, expected: Gradients, exact: Gradients, each: float, whole: float | None = None
) -> list[str]:
    """Gradients one by one by |found - expected| / |expected|, and all together, against what is allowed.

    What is zero in `exact` but for rounding may be anything small.
    """
    norm = whole_norm({name: gradient for name, gradient in expected.items() if gradient is not None})
    if not norm > 0 and any(gradient is not None for gradient in expected.values()):
        return [f"{label}: nothing to compare, the gradients are {norm}"]
    wrong, pairs = [], {}
    for name, gradient in expected.items():
        if (found[name] is None) != (gradient is None):
            wrong.append(f"{label}: {name} {'misses a' if found[name] is None else 'has an unexpected'} gradient")
        elif gradient is not None:
            # what codecs round is judged as verify does
            zero = max(_ZERO[gradient.dtype], NEGLIGIBLE if each > _ROUNDING[torch.bfloat16] else 0.0)
            if (exact[name] if exact[name] is not None else gradient).double().norm() < zero * norm:
                gradient = torch.zeros_like(gradient)
            pairs[name] = (found[name].double(), gradient.double())
            difference, size = (found[name].double() - gradient.double()).norm().item(), gradient.double().norm().item()
            if not difference <= (each * size if size else _NEARLY_ZERO * norm):
                wrong.append(f"{label}: {name} of norm {size:.2g} is off by {difference:.2g}, allowed {each:.2g} of it")
    if whole is None:
        return wrong
    error = gradient_errors({n: f for n, (f, _) in pairs.items()}, {n: e for n, (_, e) in pairs.items()})["all"]
    if not error.relative <= whole:
        wrong.append(f"{label}: all together are off by {error.relative:.2g}, allowed {whole:.2g}")
    return wrong
