"""How far gradients are from the exact ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class GradientError:
    """A gradient g against the exact one, e.

    Attributes:
        cosine: of the angle between them; 1 is the same direction.
        relative: |g - e| / |e|, Euclidean norms.
    """

    cosine: float
    relative: float


def gradient_errors(found: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> dict[str, GradientError]:
    """The error of every gradient, by parameter name; of all together under `"all"`. Computed in float64."""
    moments = {name: _moments(found[name].double(), exact[name].double()) for name in exact}
    moments["all"] = tuple(map(sum, zip(*moments.values(), strict=True)))
    return {name: _error(*values) for name, values in moments.items()}


def _moments(found: Tensor, exact: Tensor) -> tuple[float, ...]:
    """The sums over all elements that an error is made of: g e, g g, e e, (g - e)(g - e)."""
    products = (found * exact, found * found, exact * exact, (found - exact).square())
    return tuple(product.sum().item() for product in products)


def _error(dot: float, found: float, exact: float, difference: float) -> GradientError:
    if not exact:
        return GradientError(float(not found), float("inf") if found else 0.0)
    return GradientError(dot / (found * exact) ** 0.5 if found else 0.0, (difference / exact) ** 0.5)
