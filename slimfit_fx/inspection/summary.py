"""A report for a person: totals, the largest tensors and a conclusion, on one screen of 100 columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from slimfit_fx.sizes import size_text

from .gradient_difference import GradientDifference
from .notes import Note
from .report_table import numbers, sizes
from .text import fitted_table, wrapped

LARGEST = 10  # tensors
_LINES = 8  # of a table of totals or of gradient errors, before the rest is one line
_NAMED = 3  # roles in the conclusion
_BYTES = ("bytes", "bytes_stored", "bytes_now")
_SIZES = ("as it is", "all open", "now")
_MORE = 'Names with "..." are shortened; report.table() lists every tensor, with full names.'

Total = Mapping[str, Any]


def summary(
    roles: Sequence[Total],
    blocks: Sequence[Total],
    largest: Sequence[Mapping[str, Any]],
    conclusion: str,
    errors: Mapping[str, GradientDifference],
    notes: Sequence[Note],
) -> str:
    """The text, of which no line is longer than 100 columns.

    Args:
        roles: `Report.by_role()`.
        blocks: `Report.by_block()`.
        largest: `Report.largest()`.
        conclusion: what comes out, in two sentences.
        errors: `Report.gradient_errors`.
        notes: below the conclusion.
    """
    parts = [_roles(roles), _blocks(blocks), _largest(largest), _errors(errors), wrapped(conclusion)]
    parts.append("\n".join([*(note.short() for note in notes), _MORE]))
    return "\n\n".join(filter(None, parts))


def conclusion(roles: Sequence[Total], closed: int, layers: int) -> str:
    """How much is saved, and as what; how much the codecs and how much the closed layers account for.

    Args:
        roles: `Report.by_role()`.
        closed: how many layers are closed.
        layers: how many there are.
    """
    before, stored, now = (sum(role[column] for role in roles) for column in _BYTES)
    if before == now == 0:
        return "Nothing is saved for the backward."
    parts: dict[str, int] = {}
    for role in roles:
        parts[role["role"]] = parts.get(role["role"], 0) + role["bytes_now"]
    named = sorted(((nbytes, role) for role, nbytes in parts.items() if nbytes), reverse=True)
    kinds = [f"{size_text(nbytes)} {_plural(role)}" for nbytes, role in named[:_NAMED]]
    if rest := named[_NAMED:]:
        kinds.append(f"{size_text(sum(nbytes for nbytes, _ in rest))} of other roles")
    first = f"{size_text(now)} are saved{_against(before, now)}{': ' if kinds else ''}{', '.join(kinds)}."
    if now == before:
        return f"{first} No codec, and none of the {closed} closed layers (of {layers}), makes a difference."
    return (
        f"{first} Codecs and rebuilding account for {size_text(before - stored)} of the difference, "
        f"the {closed} closed layers (of {layers}) for {size_text(stored - now)}."
    )


def _against(before: int, now: int) -> str:
    if now == before:
        return ", as much as without slimfit_fx"
    ratio = f" (1/{before / now:.1f})" if 0 < now < before else f" ({now / before:.2f}x)" if before else ""
    return f" instead of {size_text(before)}{ratio}"


def _plural(role: str) -> str:
    return role if role.endswith("s") else f"{role}s"


def _roles(roles: Sequence[Total]) -> str:
    held = [role for role in roles if role["bytes"] or role["bytes_stored"]]
    lines = [[role["role"], role["kind"], str(role["tensors"]), *sizes(role)] for role in held[:_LINES]]
    if rest := held[_LINES:]:
        lines.append([f"{len(rest)} more", "", str(sum(role["tensors"] for role in rest)), *sizes(_sum(rest))])
    lines.append(["total", "", str(sum(role["tensors"] for role in held)), *sizes(_sum(held))])
    return fitted_table(lines, ["role", "kind", "tensors", *_SIZES], words=2)


def _blocks(blocks: Sequence[Total]) -> str:
    """The blocks that hold most, in the model's order, and what lies beside them; nothing if there are no blocks."""
    numbered = [total for total in blocks if total["block"]]
    if not numbered:
        return ""
    most = {total["block"] for total in sorted(numbered, key=lambda total: -total["bytes"])[:_LINES]}
    shown = [total for total in numbered if total["block"] in most]
    rest = [total for total in numbered if total["block"] not in most]
    beside = [total for total in blocks if not total["block"]]
    lines = [[total["block"], str(total["tensors"]), *sizes(total)] for total in shown]
    for name, totals in ((f"{len(rest)} more blocks", rest), ("beside them", beside)):
        if totals:
            lines.append([name, str(sum(total["tensors"] for total in totals)), *sizes(_sum(totals))])
    return fitted_table(lines, ["block", "tensors", *_SIZES], words=1)


def _largest(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        [
            row["module"] or "(model)",
            row["role"],
            "x".join(map(str, row["shape"])),
            _briefly(row["stored_as"]),
            size_text(row["bytes"]),
            size_text(row["bytes_now"]),
        ]
        for row in rows
    ]
    return fitted_table(lines, ["largest now", "role", "shape", "stored as", "as it is", "now"], words=4)


def _briefly(form: str) -> str:
    """How a tensor is stored, without the groups that it is quantized in."""
    parts = [part for part in form.split(", ") if not part.startswith("group ") and part != "asymmetric"]
    return ", ".join(parts) or "as it is"


def _errors(errors: Mapping[str, GradientDifference]) -> str:
    """The largest gradient errors; nothing without a sample."""
    if not errors:
        return ""
    lines = sorted(errors.items(), key=lambda item: -item[1].relative)
    table = [[name, *numbers(error)] for name, error in lines[:_LINES]]
    if len(lines) > _LINES:
        table.append([f"{len(lines) - _LINES} more, with smaller errors", "", ""])
    return fitted_table(table, ["gradient", "cosine", "relative error"], words=1)


def _sum(totals: Sequence[Total]) -> dict[str, int]:
    return {column: sum(total[column] for total in totals) for column in _BYTES}
