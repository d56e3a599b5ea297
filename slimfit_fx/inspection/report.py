"""Where each saved byte goes: the data; `summary` and `report_table` make text of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from slimfit_fx.graph.plan import Plan, SavedTensor
from slimfit_fx.model.layers import Layer
from slimfit_fx.module_paths import numbered_block
from slimfit_fx.sizes import size_text

from . import report_table, summary
from .gradient_difference import GradientDifference
from .notes import Note

# a row's bytes: as it is, stored with all gates open, stored at the present gates
_BYTES = ("bytes", "bytes_stored", "bytes_now")


@dataclass(frozen=True)
class Report:
    """The saved tensors of a model's last captured graph, at the gates of the moment.

    Printed, it is a summary of at most 100 columns; `table()` and `to_markdown()` list every tensor.

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
        totals = self._totals(lambda row: {"role": row["role"], "kind": row["kind"]})
        return sorted(totals, key=lambda total: -total["bytes"])

    def by_block(self) -> list[dict[str, Any]]:
        """Totals of `rows` by numbered block of the model, such as `encoder.layer.3`, in the order of the rows; the
        block of what lies beside them is `""`."""
        return self._totals(lambda row: {"block": numbered_block(row["module"])})

    def largest(self, count: int = 10) -> list[dict[str, Any]]:
        """The `rows` that take most bytes at the present gates, the largest first; none that takes no byte at all."""
        held = [row for row in self.rows if row["bytes"] or row["bytes_stored"]]
        return sorted(held, key=lambda row: (-row["bytes_now"], -row["bytes"]))[:count]

    def table(self) -> str:
        """Every tensor, the totals by role, and every name in full: as wide as it takes."""
        return report_table.full(self.rows, self.by_role(), self.gradient_errors, self._notes())

    def to_markdown(self) -> str:
        """What `table` has, as Markdown."""
        return report_table.full(self.rows, self.by_role(), self.gradient_errors, self._notes(), style="github")

    def to_json(self) -> str:
        """All of it, for programs."""
        return json.dumps(
            {
                "saved_bytes_before": self.saved_bytes_before,
                "saved_bytes_after": self.saved_bytes_after,
                "optimizer_bytes": self.optimizer_bytes,
                "outside": list(self.outside),
                "by_role": self.by_role(),
                "by_block": self.by_block(),
                "gradient_errors": {name: asdict(error) for name, error in self.gradient_errors.items()},
                "rows": self.rows,
            }
        )

    def __str__(self) -> str:
        closed = len(self.open_gates) - sum(self.open_gates)
        return summary.summary(
            self.by_role(),
            self.by_block(),
            self.largest(summary.LARGEST),
            summary.conclusion(self.by_role(), closed, len(self.open_gates)),
            self.gradient_errors,
            self._notes(),
        )

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

    def _totals(self, group: Callable[[dict[str, Any]], dict[str, str]]) -> list[dict[str, Any]]:
        """Totals of the rows for which `group` returns the same, in the order in which they come."""
        totals: dict[tuple[str, ...], dict[str, Any]] = {}
        for row in self.rows:
            key = group(row)
            total = totals.setdefault(tuple(key.values()), {**key, "tensors": 0, **dict.fromkeys(_BYTES, 0)})
            total["tensors"] += 1
            for column in _BYTES:
                total[column] += row[column]
        return list(totals.values())

    def _notes(self) -> list[Note]:
        """What the tables do not show."""
        always = [layer.name for layer in self.layers if layer.always_open]
        dropped = sorted({self.layers[g.gate].name for g in self.plan.gradients if not g.conditional})
        notes = [Note(f"{sum(self.open_gates)} of {len(self.open_gates)} layers open.")]
        for text, names in (
            ("Always open", always),
            ("Computed, then dropped when closed", dropped),
            ("Head and loss in parts, no logits saved", self.plan.heads),
            ("Outside of the graphs, where nothing is compressed", self.outside),
        ):
            if names:
                notes.append(Note(text, names))
        if self.plan.whole_heads:
            logits = sum(row["bytes_now"] for row in self.rows if row["role"] == "logits")
            text = f'The model returns its logits: transform(model, outputs="loss") would save {size_text(logits)}'
            notes.append(Note(text, self.plan.whole_heads))
        near, far = self.optimizer_bytes
        if near or far:
            host = f", {size_text(far)} on the host" if far else ""
            notes.append(Note(f"Optimizer states of layers: {size_text(near)}{host}."))
        return notes
