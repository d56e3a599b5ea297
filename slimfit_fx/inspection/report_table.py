"""A report in full: a line for every saved tensor, names uncut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from slimfit_fx.sizes import size_text

from .gradient_difference import GradientDifference
from .notes import Note
from .text import aligned_table

_SIZES = ("as it is", "stored", "now")


def full(
    rows: Sequence[Mapping[str, Any]],
    roles: Sequence[Mapping[str, Any]],
    errors: Mapping[str, GradientDifference],
    notes: Sequence[Note],
    style: str = "simple",
) -> str:
    """Tables of tensors, of roles and of gradient errors (if there are any), and the notes.

    Args:
        rows: `Report.rows`.
        roles: `Report.by_role()`.
        errors: `Report.gradient_errors`.
        notes: below the tables.
        style: of tabulate: `"simple"` for a terminal, `"github"` for Markdown.
    """
    held = [row for row in rows if row["bytes"] or row["bytes_stored"]]
    tensors = [
        [
            row["module"],
            row["role"],
            "x".join(map(str, row["shape"])),
            row["dtype"],
            row["kind"],
            _without_common_prefix(row["layers"]),
            row["stored_as"],
            *sizes(row),
        ]
        for row in held
    ]
    totals = [[total["role"], total["kind"], str(total["tensors"]), *sizes(total)] for total in roles]
    whole = {column: sum(row[column] for row in held) for column in ("bytes", "bytes_stored", "bytes_now")}
    totals.append(["total", "", str(len(held)), *sizes(whole)])
    differences = sorted(errors.items(), key=lambda item: -item[1].relative)
    tables = [
        (tensors, ["module", "role", "shape", "dtype", "kind", "needed by", "stored as", *_SIZES], 7),
        (totals, ["role", "kind", "tensors", *_SIZES], 2),
        ([[name, *numbers(error)] for name, error in differences], ["gradient", "cosine", "relative error"], 1),
    ]
    parts = [
        aligned_table(_escaped(cells, style), headings, words, style)
        for cells, headings, words in (tables if errors else tables[:2])
    ]
    # in Markdown a single line break joins two lines
    return "\n\n".join([*parts, ("\n" if style == "simple" else "\n\n").join(note.full() for note in notes)])


def sizes(row: Mapping[str, Any]) -> list[str]:
    """Of a row or a total: as it is, as it is stored with all gates open, at the present gates."""
    return [size_text(row[column]) for column in ("bytes", "bytes_stored", "bytes_now")]


def numbers(error: GradientDifference) -> list[str]:
    return [f"{error.cosine:.4f}", f"{error.relative:.4f}"]


def _escaped(rows: Sequence[Sequence[str]], style: str) -> list[list[str]]:
    """In Markdown a bar would end a cell."""
    return [[cell.replace("|", r"\|") if style == "github" else cell for cell in row] for row in rows]


def _without_common_prefix(names: Sequence[str]) -> str:
    """Layer names without their common prefix, which the module column shows."""
    if len(names) < 2:
        return names[0] if names else ""
    parts = [name.split(".") for name in names]
    common = 0
    while all(len(p) > common + 1 and p[common] == parts[0][common] for p in parts):
        common += 1
    return ", ".join(".".join(p[common:]) for p in parts)
