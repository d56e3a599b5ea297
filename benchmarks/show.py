"""Prints the tables of results of run.py and draws their Pareto plots.

    python -m benchmarks.show benchmarks/results/cpu.json --plot docs/pictures

One table per setting. Figures are medians over rounds; ratios are to `compile`, or to the first method, within a round.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

Cell = dict[str, Any]
# figure, heading, whether with its ratio to the baseline
COLUMNS = (
    ("saved_bytes", "saved", True),
    ("peak_bytes", "peak over base", True),
    ("gradient_bytes", "gradients", False),
    ("optimizer_bytes", "optimizer", False),
    ("total_bytes", "total peak", True),
    ("total_bytes_max", "most", True),
    ("step_seconds", "step", True),
    ("flops_left", "products left", False),
    ("first_step_seconds", "first step", True),
    ("warm_first_step_seconds", "first step, cached", False),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--plot", type=Path, default=None, help="a folder for the pictures")
    options = parser.parse_args()
    for path in options.results:
        result = json.loads(path.read_text())
        machine = result["machine"]
        print(f"{machine['device']}, torch {machine['torch']}, {machine['date']}, commit {machine['commit'][:10]}")
        for number, (setting, cells) in enumerate(settings(result["cells"]).items()):
            print(f"\n{setting}\n\n{table(cells)}\n")
            if options.plot:
                save(plot(setting, cells), options.plot, f"{path.stem}-{number}")


def settings(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """Cells by setting: everything but method and round, in words."""

    def setting(entry: Cell) -> str:
        rest = {key: value for key, value in sorted(entry["cell"].items()) if key not in ("method", "round", "steps")}
        return ", ".join(str(v) if isinstance(v, str) else f"{k} {json.dumps(v)}" for k, v in rest.items())

    return grouped(cells, setting)


def table(cells: Sequence[Cell]) -> str:
    """A line per method; a method that failed in any round says why."""
    lines = []
    for method, rows in by_method(cells).items():
        errors = [row["error"] for row in rows if "error" in row]
        if errors:
            lines.append([method, f"failed: {errors[0]}"])
            continue
        shown = []
        for figure, _, with_ratio in COLUMNS:
            values = [row[figure] for row in rows if figure in row]
            text = amount(figure, statistics.median(values)) if values else ""
            shown.append(f"{text} ({ratio(cells, rows, figure):.2f}x)" if values and with_ratio else text)
        lines.append([method, *shown])
    return tabulate(lines, ["method", *(heading for _, heading, _ in COLUMNS)], "github")


def plot(setting: str, cells: Sequence[Cell]) -> Any:
    """Peak memory against step time, both relative to the baseline."""
    points = {
        method: (ratio(cells, rows, "step_seconds"), ratio(cells, rows, "peak_bytes"))
        for method, rows in by_method(cells).items()
        if not any("error" in row for row in rows)
    }
    figure = pareto(points, setting, "step time / torch.compile", "peak over base / torch.compile")
    figure.axes[0].set_ylim(bottom=0)
    name_points(figure, points)
    return figure


def pareto(points: Mapping[str, tuple[float, float]], title: str, xlabel: str, ylabel: str) -> Any:
    """Two costs of each method; a method that no other beats in both is larger, and red."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.5))
    axes = figure.add_subplot()
    for point in points.values():
        best = not any(other != point and beats(other, point) for other in points.values())
        axes.scatter(*point, color="tab:red" if best else "tab:gray", marker="o" if best else ".")
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    axes.grid(alpha=0.3)
    return figure


def name_points(figure: Any, points: Mapping[str, tuple[float, float]]) -> None:
    """Writes the names beside their points and off each other, when all else is drawn."""
    from adjustText import adjust_text

    axes = figure.axes[0]
    texts = [axes.text(*point, name, fontsize=8) for name, point in points.items()]
    adjust_text(
        texts, ax=axes, expand=(1.2, 1.5), arrowprops={"arrowstyle": "-", "color": "tab:gray", "linewidth": 0.5}
    )


def beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return all(a <= b for a, b in zip(one, other, strict=True))


def by_method(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    return grouped(cells, lambda entry: entry["cell"]["method"])


def grouped(rows: Iterable[Cell], name: Callable[[Cell], str]) -> dict[str, list[Cell]]:
    """Rows by name, names in the order of their first rows."""
    groups: dict[str, list[Cell]] = {}
    for row in rows:
        groups.setdefault(name(row), []).append(row)
    return groups


def ratio(cells: Sequence[Cell], rows: Sequence[Cell], figure: str) -> float:
    """The median over the rounds of `figure` relative to the baseline's in the same round."""
    groups = by_method(cells)
    baseline = {row["cell"]["round"]: row for row in groups.get("compile") or next(iter(groups.values()))}
    ratios = [
        row[figure] / baseline[row["cell"]["round"]][figure]
        for row in rows
        if baseline.get(row["cell"]["round"], {}).get(figure)
    ]
    return statistics.median(ratios) if ratios else float("nan")


def save(figure: Any, folder: Path, name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.svg", bbox_inches="tight")


def amount(figure: str, value: float) -> str:
    if "bytes" in figure:
        return f"{value / 2**20:.0f} MiB"
    return f"{value:.2f}x" if figure == "flops_left" else f"{value:.2f} s"


if __name__ == "__main__":
    main()
