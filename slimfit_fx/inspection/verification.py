"""What `slimfit_fx.verify` found: a table, and one line that says whether all is well."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tabulate import tabulate

from slimfit_fx.sizes import size_text

from .gradient_difference import GradientDifference, Tolerance

_SHOWN = 3  # faults in the last line


@dataclass(frozen=True)
class Verification:
    """A model's compiled training call against the untransformed model, on one batch.

    Attributes:
        preset: whose tolerance is applied.
        mode: the code generator, `"inductor"` or `"eager"`.
        tolerance: relative errors that gradients may have, rounding included.
        forward_rounding: the relative error that outputs may have; 0 is none, to the last bit.
        rows: one dict per gradient: parameter, layer (None without a gate), cosine and relative_error with all gates
            open, relative_error_half_closed (None if the layer was closed then), negligible (too small to be compared),
            stored_as: how the layer's input is saved.
        whole: the error of all gradients together, all gates open.
        saved_bytes: what the forward hands to the backward: `plain` without slimfit_fx; with it and all gates open,
            `open`; with half of the layers closed, `half_closed`.
        faults: what is wrong, a sentence each.
        notes: what could not be compared, a sentence each.
    """

    preset: str
    mode: str
    tolerance: Tolerance
    forward_rounding: float
    rows: Sequence[dict[str, Any]]
    whole: GradientDifference
    saved_bytes: dict[str, int]
    faults: Sequence[str]
    notes: Sequence[str]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.faults

    def to_json(self) -> str:
        """All of it; an error that is no number is `NaN` or `Infinity`, as Python's json reads them."""
        return json.dumps({"ok": self.ok, **asdict(self)})

    def __str__(self) -> str:
        lines = [
            [
                row["parameter"],
                row["cosine"],
                row["relative_error"],
                _half_closed(row),
                "negligible" if row["negligible"] else row["stored_as"],
            ]
            for row in self.rows
        ]
        lines.append(["all together", self.whole.cosine, self.whole.relative, "", ""])
        headings = ["gradient", "cosine", "relative error", "half closed", "input stored as"]
        sizes = {name: size_text(nbytes) for name, nbytes in self.saved_bytes.items()}
        saved = f"Saved for the backward: {sizes['open']} with all gates open, {sizes['half_closed']} with half of the "
        saved += f"layers closed; {sizes['plain']} without slimfit_fx."
        table = tabulate(lines, headings, floatfmt=".4f", colalign=("left", "right", "right", "right", "left"))
        return "\n".join([table, "", saved, *self.notes, self._verdict()])

    def _verdict(self) -> str:
        where = f"preset {self.preset!r}, mode {self.mode!r}"
        if self.ok:
            forward = f"within {self.forward_rounding:.2g}" if self.forward_rounding else "to the last bit"
            return (
                f"All is well ({where}): the forward {forward}, {len(self.rows)} gradients within "
                f"{self.tolerance.each:.2g} each and {self.tolerance.whole:.2g} together, closed layers without one, "
                "bytes as reported."
            )
        more = f"; and {len(self.faults) - _SHOWN} more, see .faults" if len(self.faults) > _SHOWN else ""
        return f"NOT well ({where}): {'; '.join(self.faults[:_SHOWN])}{more}."


def _half_closed(row: dict[str, Any]) -> str:
    error = row["relative_error_half_closed"]
    return "closed" if error is None else f"{error:.4f}"
