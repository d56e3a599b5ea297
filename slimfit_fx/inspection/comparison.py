"""What is held against a transformed model: its runs beside those of the untransformed one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from slimfit_fx.codecs import WhenFrozen
from slimfit_fx.model.layers import Layer

from .gradient_difference import (
    TOLERANCES,
    GradientDifference,
    Tolerance,
    gradient_errors,
    negligible,
    rounding,
    whole_norm,
)
from .runs import Run
from .verification import Verification


@dataclass(frozen=True)
class Comparison:
    """Four runs of one batch from one random state.

    Attributes:
        preset: whose tolerance is applied.
        rounding: the relative error that the model's precision explains.
        forward_rounding: the same of outputs beside those of the compiled model.
        layers: what the gates freeze.
        closed: names of the layers that were closed in `half`.
        eager: the untransformed model by eager PyTorch.
        plain: the same, compiled.
        opened: with slimfit_fx, all gates open.
        half: with slimfit_fx and the layers `closed`.
    """

    preset: str
    rounding: float
    forward_rounding: float
    layers: Sequence[Layer]
    closed: set[str]
    eager: Run
    plain: Run
    opened: Run
    half: Run

    def verification(self, mode: str) -> Verification:
        """The comparison's result."""
        notes = []
        if self.eager.random:
            notes.append("The forward draws random numbers, other ones in eager PyTorch: not compared with that.")
        if self._pruned:
            notes.append("A closed norm's input is pruned: gradients with half of the layers closed are not judged.")
        return Verification(
            preset=self.preset,
            mode=mode,
            tolerance=self.tolerance,
            forward_rounding=self.forward_rounding,
            rows=[self._row(name) for name in self.plain.gradients],
            whole=self._errors["all"],
            saved_bytes=dict(plain=self.plain.saved, open=self.opened.saved, half_closed=self.half.saved),
            faults=[*self._forward(), *self._gradients(), *self._closed(), *self._bytes()],
            notes=notes,
        )

    @property
    def tolerance(self) -> Tolerance:
        """The preset's, and rounding."""
        codecs = TOLERANCES[self.preset]
        return Tolerance(codecs.each + self.rounding, codecs.whole + self.rounding)

    @cached_property
    def _frozen(self) -> set[str]:
        """The parameters of closed layers."""
        return {name for layer in self.layers if layer.name in self.closed for name in layer.parameters}

    @cached_property
    def _layer_of(self) -> dict[str, int]:
        return {name: index for index, layer in enumerate(self.layers) for name in layer.parameters}

    @cached_property
    def _errors(self) -> dict[str, GradientDifference]:
        return _errors(self.opened.gradients, self.plain.gradients)

    @cached_property
    def _half_errors(self) -> dict[str, GradientDifference]:
        exact = {name: gradient for name, gradient in self.plain.gradients.items() if name not in self._frozen}
        return _errors(self.half.gradients, exact)

    def _row(self, name: str) -> dict[str, Any]:
        layer = self._layer_of.get(name)
        error, half = self._errors[name], self._half_errors.get(name)
        return {
            "parameter": name,
            "layer": None if layer is None else self.layers[layer].name,
            "cosine": error.cosine,
            "relative_error": error.relative,
            "relative_error_half_closed": None if half is None else half.relative,
            "negligible": self._negligible(name, self.opened),
            "stored_as": self._stored(layer),
        }

    def _stored(self, layer: int | None) -> str:
        """How the input of a layer is saved; nothing for what has no gate and needs no input (biases)."""
        if layer is None:
            return ""
        forms = [tensor.form or "as it is" for tensor in self.opened.plan.saved if layer in tensor.gates]
        return ", ".join(dict.fromkeys(forms)) or "static"

    def _negligible(self, name: str, run: Run) -> bool:
        found = run.gradients.get(name)
        return found is not None and negligible(found, self.plain.gradients[name], self._norm)

    @cached_property
    def _pruned(self) -> bool:
        """Whether what is saved of an open layer depends on the gates of another, a norm: it is kept whole beside."""
        saved = self.half.plan.saved
        return any(isinstance(row.choice, WhenFrozen) and row.dynamic and not row.choice.lossless for row in saved)

    @cached_property
    def _norm(self) -> float:
        return whole_norm(self.plain.gradients)

    def _forward(self) -> Iterator[str]:
        """Equal to the compiled model's but for `forward_rounding`, and to eager PyTorch's but for `rounding`."""
        for label, run in (("with all gates open", self.opened), ("with half of the layers closed", self.half)):
            if not _same(run.outputs, self.plain.outputs):
                error = _relative(run.outputs, self.plain.outputs)
                if error <= self.forward_rounding:
                    continue
                yield f"the outputs {label} are {error:.2g} off those of the model compiled without slimfit_fx"
        if not self.eager.random:
            error = _relative(self.plain.outputs, self.eager.outputs)
            if not error <= self.rounding:
                yield f"already without slimfit_fx the compiled model's outputs are {error:.2g} off eager PyTorch's"

    def _gradients(self) -> Iterator[str]:
        infinite = [name for name, gradient in self.plain.gradients.items() if not gradient.isfinite().all()]
        if infinite:
            yield f"the untransformed model's own gradients are not finite ({_some(infinite)}): nothing can be compared"
            return
        judged = [("all gates open", self.opened, self._errors)]
        if not self._pruned:
            judged.append(("half closed", self.half, self._half_errors))
        for label, run, errors in judged:
            for name, error in errors.items():
                allowed = self.tolerance.whole if name == "all" else self.tolerance.each
                if error.relative <= allowed or (name != "all" and self._negligible(name, run)):
                    continue
                what = "all gradients together are" if name == "all" else f"the gradient of {name} is"
                yield f"{what} off by {error.relative:.2g} ({label}; allowed: {allowed:.2g})"

    def _closed(self) -> Iterator[str]:
        """Closed layers have no gradient, the untransformed model's unused parameters neither, all others have one."""
        trained = set(self.plain.gradients)
        for label, run, frozen in (("all gates open", self.opened, set()), ("half closed", self.half, self._frozen)):
            found = set(run.gradients)
            if extra := sorted(found & frozen):
                yield f"closed layers have gradients ({_some(extra)})"
            if extra := sorted(found - trained):
                yield f"{label}: gradients that the untransformed model does not have ({_some(extra)})"
            if missing := sorted(trained - frozen - found):
                yield f"{label}: open layers have no gradient ({_some(missing)})"

    def _bytes(self) -> Iterator[str]:
        for label, run in (("all gates open", self.opened), ("half closed", self.half)):
            if run.saved != run.reported:
                yield f"{label}: {run.saved} bytes are handed to the backward, the report says {run.reported}"


def rounding_of(model: nn.Module) -> float:
    """The relative error that the lowest precision of `model`'s parameters, or of autocast, explains."""
    parameters = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    dtypes = {parameter.dtype for parameter in parameters}
    for kind in {parameter.device.type for parameter in parameters}:
        if torch.is_autocast_enabled(kind):
            dtypes.add(torch.get_autocast_dtype(kind))
    return max(map(rounding, dtypes))


def forward_rounding_of(model: nn.Module, in_parts: bool = False) -> float:
    """By how much outputs may be off those of the compiled model: not at all in float32 on a CPU.

    A loss that is made `in_parts` is added up in another order.

    Below float32 fused kernels keep more bits than they store. On a GPU, what a codec reads decides whether a bias is
    added by cuBLAS or by a kernel behind it, and how a reduction is divided among threads.
    """
    exact = rounding_of(model) <= rounding(torch.float32) and all(p.device.type == "cpu" for p in model.parameters())
    return 0.0 if exact and not in_parts else rounding_of(model)


def _errors(found: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> dict[str, GradientDifference]:
    """Errors of `found`; what is missing there counts as zeros."""
    return gradient_errors({name: found.get(name, torch.zeros(())) for name in exact}, exact)


def _same(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Equal to the last bit, NaN included."""
    if len(found) != len(expected):
        return False
    return all(torch.equal(f, e) or _equal_but_nan(f, e) for f, e in zip(found, expected, strict=True))


def _equal_but_nan(found: Tensor, expected: Tensor) -> bool:
    return (
        found.dtype == expected.dtype
        and torch.equal(found.isnan(), expected.isnan())
        and torch.equal(found.nan_to_num(), expected.nan_to_num())
    )


def _relative(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The relative error of all float outputs together."""
    if [f.shape for f in found] != [e.shape for e in expected]:
        return float("inf")
    pairs = {str(i): (f, e) for i, (f, e) in enumerate(zip(found, expected, strict=True)) if e.is_floating_point()}
    errors = gradient_errors({k: f for k, (f, _) in pairs.items()}, {k: e for k, (_, e) in pairs.items()})
    return errors["all"].relative


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
