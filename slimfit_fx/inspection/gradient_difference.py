"""How far gradients are from the exact ones, and how far each preset lets them be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

# A gradient whose norm is less than this part of all gradients' together is held against nobody: the key's bias of an
# attention, for example, is zero by symmetry, so what is left of it is rounding.
NEGLIGIBLE = 1e-4


@dataclass(frozen=True)
class GradientDifference:
    """A gradient g against the exact one, e.

    Attributes:
        cosine: of the angle between them; 1 is the same direction.
        relative: |g - e| / |e|, Euclidean norms.
    """

    cosine: float
    relative: float


@dataclass(frozen=True)
class Tolerance:
    """Relative errors |g - e| / |e| that are to be expected.

    Attributes:
        each: of one gradient. It bounds the angle, too: 0.2 is a cosine of 0.98 or more.
        whole: of all gradients together.
    """

    each: float
    whole: float


# Of the codecs, by preset; rounding comes on top. About three times what docs/codecs.md measured.
TOLERANCES: Mapping[str, Tolerance] = {
    "exact": Tolerance(each=0.0, whole=0.0),
    "balanced": Tolerance(each=0.2, whole=0.07),
    "tight": Tolerance(each=0.5, whole=0.2),
    "paper": Tolerance(each=0.9, whole=0.5),
}


def rounding(dtype: torch.dtype) -> float:
    """The relative error that two orders of the same computation in `dtype` may differ by."""
    return max(1e-4, 8 * torch.finfo(dtype).eps)


def gradient_errors(found: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> dict[str, GradientDifference]:
    """The error of every gradient, by parameter name; of all together under `"all"`. Computed in float64."""
    moments = {name: _moments(found[name].double(), exact[name].double()) for name in exact}
    moments["all"] = tuple(map(sum, zip(*moments.values(), strict=True)))
    return {name: _error(*values) for name, values in moments.items()}


def negligible(found: Tensor, exact: Tensor, whole: float) -> bool:
    """Whether both are too small, beside `whole`, the norm of all gradients together, to be compared."""
    return max(found.double().norm().item(), exact.double().norm().item()) < NEGLIGIBLE * whole


def whole_norm(gradients: Mapping[str, Tensor]) -> float:
    """The Euclidean norm of all gradients together."""
    return sum(gradient.double().square().sum().item() for gradient in gradients.values()) ** 0.5


def _moments(found: Tensor, exact: Tensor) -> tuple[float, ...]:
    """The sums over all elements that an error is made of: g e, g g, e e, (g - e)(g - e)."""
    products = (found * exact, found * found, exact * exact, (found - exact).square())
    return tuple(product.sum().item() for product in products)


def _error(dot: float, found: float, exact: float, difference: float) -> GradientDifference:
    if not exact:
        return GradientDifference(float(not found), float("inf") if found else 0.0)
    return GradientDifference(dot / (found * exact) ** 0.5 if found else 0.0, (difference / exact) ** 0.5)
