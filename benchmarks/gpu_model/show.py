"""The simulated results as the tables of docs/benchmarks.md."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]
CLAIM = {"mean": 2.2, "best": 3.1}  # the paper's: total memory of eager fine-tuning over its own
OURS = ("balanced", "tight")
_COLUMNS = (
    "total peak",
    "saved",
    "kernels' traffic",
    "forward and backward",
    "with AdamW",
    "kernels",
    "host calls",
)


def overview(path: Path) -> Iterator[str]:
    """Lines of Markdown: one for each model, precision and batch, with the total peak of each method in GiB and, in
    parentheses, its roofline over torch.compile's, without and with the optimizer; then the paper's claim."""
    rows: list[Row] = json.loads(path.read_text())["rows"]
    methods = _unique(row["method"] for row in rows)
    what = "total peak in GiB (roofline over torch.compile's: forward and backward, with AdamW)"
    yield f"| {what} | {' | '.join(map(_name, methods))} |"
    yield f"| --- |{' --- |' * len(methods)}"
    for setting in _unique(map(_setting, rows)):
        here = {row["method"]: row for row in rows if _setting(row) == setting}
        base = here.get("torch.compile")
        model, precision, batch = setting
        cells = [_total(here[method], base) if method in here else "" for method in methods]
        yield f"| {model}, {precision}, batch {batch} | {' | '.join(cells)} |"
    yield from claim(rows)


def show(path: Path) -> Iterator[str]:
    """Lines of Markdown: a table for each model, precision and batch, then the paper's claim."""
    result = json.loads(path.read_text())
    rows: list[Row] = result["rows"]
    yield f"{result['what']}. {result['device']}, torch {result['torch']}, freeze rate {result['freeze_rate']}."
    for setting in _unique(map(_setting, rows)):
        model, precision, batch = setting
        here = [row for row in rows if _setting(row) == setting]
        base = next((row for row in here if row["method"] == "torch.compile"), None)
        yield ""
        yield f"| {model}, {precision}, batch {batch} | {' | '.join(_COLUMNS)} |"
        yield f"| --- |{' --- |' * len(_COLUMNS)}"
        yield from (_line(row, base) for row in here)
    yield from claim(rows)


def claim(rows: Iterable[Row]) -> Iterator[str]:
    """How many times less total memory than eager fine-tuning, over all settings that have both; met or not."""
    rows = list(rows)
    eager = {_setting(row): row for row in rows if row["method"] == "eager"}
    yield ""
    yield "| total peak, times less than eager | settings | mean | best | the paper's 2.2 and 3.1 |"
    yield "| --- | --- | --- | --- | --- |"
    for method in OURS:
        for precision in _unique(row["precision"] for row in rows):
            ratios = [
                eager[_setting(row)]["total_bytes"] / row["total_bytes"]
                for row in rows
                if row["method"] == method and row["precision"] == precision and _setting(row) in eager
            ]
            if ratios:
                mean, best = statistics.mean(ratios), max(ratios)
                verdict = " and ".join(
                    "met" if found >= wanted else "not met"
                    for found, wanted in zip((mean, best), CLAIM.values(), strict=True)
                )
                yield f"| `{method}`, {precision} | {len(ratios)} | {mean:.2f} | {best:.2f} | {verdict} |"


def _setting(row: Row) -> tuple[str, str, int]:
    return row["model"], row["precision"], row["batch"]


def _unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def _line(row: Row, base: Row | None) -> str:
    cells = [
        f"{row['total_bytes'] / 2**20:,.0f} MiB" + _ratio(row, base, "total_bytes"),
        f"{row['saved_bytes'] / 2**20:,.0f} MiB" + _ratio(row, base, "saved_bytes"),
        f"{row['kernel_traffic'] / 2**30:.1f} GiB",
        f"{row['pass_seconds'] * 1e3:.1f} ms" + _ratio(row, base, "pass_seconds"),
        f"{row['seconds'] * 1e3:.1f} ms" + _ratio(row, base, "seconds"),
        f"{row['kernels']:,}",
        f"{row['host_calls']:,}",
    ]
    return f"| {_name(row['method'])} | {' | '.join(cells)} |"


def _name(method: str) -> str:
    return f"`{method}`" if method in OURS else method


def _total(row: Row, base: Row | None) -> str:
    total = f"{row['total_bytes'] / 2**30:.2f}"
    if base is None or row is base:
        return total
    return f"{total} ({row['pass_seconds'] / base['pass_seconds']:.2f}, {row['seconds'] / base['seconds']:.2f})"


def _ratio(row: Row, base: Row | None, name: str) -> str:
    return f" ({row[name] / base[name]:.2f}x)" if base is not None and row is not base else ""
