"""The table that says where each saved byte goes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from tabulate import tabulate

from slimfit_fx.graph.plan import Plan, SavedTensor
from slimfit_fx.model.layers import Layer

from .gradient_difference import GradientDifference

# a row's bytes: as it is, stored with all gates open, stored at the present gates
_BYTES = ("bytes", "bytes_stored", "bytes_now")


@dataclass(frozen=True)
class Report:
    """The saved tensors of a model's last captured graph, at the gates of the moment.

    Attributes:
        plan: what is saved.
        layers: what the gates freeze.
        open_gates: the gates at the time of asking.
        gradient_errors: what the codecs did to each gradient of the sample that `report` was given.
        optimizer_bytes: of the layers' optimizer states, (on their devices, on the host).
        outside: layers that train outside of the captured graphs: what they need there is not in the plan.
    """

    plan: Plan
    layers: Sequence[Layer]
    open_gates: Sequence[bool]
    gradient_errors: Mapping[str, GradientDifference] = field(default_factory=dict)
    optimizer_bytes: tuple[int, int] = (0, 0)
    outside: Sequence[str] = ()

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One dict per saved tensor: module, role, shape, dtype, kind, layers, stored_as, and its bytes: as it is
        (bytes), as it is stored with all gates open (bytes_stored), and at the present gates (bytes_now)."""
        return [self._row(tensor) for tensor in self.plan.saved]

    @property
    def saved_bytes_before(self) -> int:
        """Bytes that the backward would be handed if every layer trained and everything were saved as it is."""
        return self.plan.nbytes

    @property
    def saved_bytes_after(self) -> int:
        """Bytes handed to the backward at the present gates."""
        return self.plan.bytes_at(self.open_gates)

    def by_role(self) -> list[dict[str, Any]]:
        """Totals of `rows` by role and kind, the largest first."""
        totals: dict[tuple[str, str], dict[str, Any]] = {}
        for row in self.rows:
            key = (row["role"], row["kind"])
            total = totals.setdefault(key, dict(role=key[0], kind=key[1], tensors=0, **dict.fromkeys(_BYTES, 0)))
            total["tensors"] += 1
            for column in _BYTES:
                total[column] += row[column]
        return sorted(totals.values(), key=lambda total: -total["bytes"])

    def to_json(self) -> str:
        return json.dumps(
            {
                "saved_bytes_before": self.saved_bytes_before,
                "saved_bytes_after": self.saved_bytes_after,
                "optimizer_bytes": self.optimizer_bytes,
                "outside": list(self.outside),
                "by_role": self.by_role(),
                "gradient_errors": {name: asdict(error) for name, error in self.gradient_errors.items()},
                "rows": self.rows,
            }
        )

    def __str__(self) -> str:
        held = [row for row in self.rows if row["bytes"] or row["bytes_stored"]]
        tensors = [
            [
                row["module"],
                row["role"],
                "x".join(map(str, row["shape"])),
                row["dtype"],
                row["kind"],
                _shorten(row["layers"]),
                row["stored_as"],
                *(size_text(row[column]) for column in _BYTES),
            ]
            for row in held
        ]
        roles = [
            [total["role"], total["kind"], total["tensors"], *(size_text(total[column]) for column in _BYTES)]
            for total in self.by_role()
        ]
        roles.append(["total", "", len(held), *(size_text(sum(row[column] for row in held)) for column in _BYTES)])
        sizes = ["as it is", "stored", "now"]
        parts = [
            tabulate(tensors, ["module", "role", "shape", "dtype", "kind", "needed by", "stored as", *sizes]),
            tabulate(roles, ["role", "kind", "tensors", *sizes], colalign=("left", "left", "right")),
            *self._errors(),
            self._summary(),
        ]
        return "\n\n".join(parts)

    def _errors(self) -> list[str]:
        """The table of gradient errors, the largest first; none without a sample."""
        if not self.gradient_errors:
            return []
        errors = sorted(self.gradient_errors.items(), key=lambda item: -item[1].relative)
        lines = [[name, error.cosine, error.relative] for name, error in errors]
        return [tabulate(lines, ["gradient", "cosine", "relative error"], floatfmt=".4f")]

    def _row(self, tensor: SavedTensor) -> dict[str, Any]:
        return {
            "module": tensor.module,
            "role": tensor.role,
            "shape": list(tensor.shape),
            "dtype": tensor.dtype,
            "kind": "dynamic" if tensor.dynamic else "static",
            "layers": [self.layers[layer].name for layer in tensor.gates],
            "stored_as": tensor.form,
            "bytes": tensor.nbytes,
            "bytes_stored": tensor.stored,
            "bytes_now": tensor.bytes_at(self.open_gates),
        }

    def _summary(self) -> str:
        lines = [f"{sum(self.open_gates)} of {len(self.open_gates)} layers open."]
        head = [layer.name for layer in self.layers if layer.always_open]
        if head:
            lines.append(f"Always open ({len(head)}): {', '.join(head)}.")
        dropped = sorted({self.layers[g.gate].name for g in self.plan.gradients if not g.conditional})
        if dropped:
            lines.append(f"Computed, then dropped when closed ({len(dropped)}): {', '.join(dropped)}.")
        if self.outside:
            lines.append(
                f"Outside of the graphs, where nothing is compressed ({len(self.outside)}): {', '.join(self.outside)}."
            )
        near, far = self.optimizer_bytes
        if near or far:
            host = f", {size_text(far)} on the host" if far else ""
            lines.append(f"Optimizer states of layers: {size_text(near)}{host}.")
        return "\n".join(lines)


def _shorten(names: Sequence[str]) -> str:
    """Layer names without their common prefix, which the module column shows."""
    if len(names) < 2:
        return names[0] if names else ""
    parts = [name.split(".") for name in names]
    common = 0
    while all(len(p) > common + 1 and p[common] == parts[0][common] for p in parts):
        common += 1
    return ", ".join(".".join(p[common:]) for p in parts)


def size_text(nbytes: int) -> str:
    """Bytes in the unit that keeps them readable, powers of 1,024."""
    value = float(nbytes)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"
