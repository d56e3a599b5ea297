"""How costs grow with depth, width, batch, length and freezing rate: tables, and a picture of them.

    python -m benchmarks.run benchmarks/suites/cpu-scaling.json --out benchmarks/results/cpu-scaling.json
    python -m benchmarks.scaling benchmarks/results/cpu-scaling.json --plot docs/pictures

Cells of one of our methods that differ along one axis only make a line; each point stands beside `compile` at the same
place, and ratios are to it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

import slimfit_fx

from . import methods, models, show

Cell = dict[str, Any]
Place = Mapping[str, Any]
BASELINE = "compile"
RATE = "freezing rate"
_SHOWN = ("saved_bytes", "peak_bytes", "step_seconds", "first_step_seconds")
FIGURES = {figure: heading for figure, heading, _ in show.COLUMNS if figure in _SHOWN}


@dataclass(frozen=True)
class Line:
    """Cells along an axis, from small to large.

    Attributes:
        axis: a key of `place`.
        fixed: the model, and where on the other axes the line lies.
        points: the value on the axis, the baseline's cell there, the method's.
    """

    method: str
    axis: str
    fixed: Place
    points: list[tuple[float, Cell, Cell]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("--plot", type=Path, default=None, help="a folder for the picture")
    options = parser.parse_args()
    found = list(lines(json.loads(options.result.read_text())["cells"]))
    for line in found:
        print(f"\n{line.method}, {', '.join(f'{name} {value}' for name, value in line.fixed.items())}\n\n{table(line)}")
    if options.plot:
        show.save(plot(found), options.plot, options.result.stem)


def place(cell: Cell) -> dict[str, Any]:
    """Where a cell lies on all axes; what it does not say is as in models.json and methods.json."""
    entry = models.MODELS[cell["model"]]
    config = {**entry.get("config", {}), **cell.get("config", {})}
    found = {
        "model": cell["model"],
        "layers": config.get("num_hidden_layers", 12),
        "width": config.get("hidden_size", 768),
        "batch": cell.get("batch", entry["batch"]),
        "length": cell.get("length", entry["length"]),
    }
    if methods.is_slimfit(cell["method"]):
        options = methods.options(cell["method"], cell.get("option", {}))
        found[RATE] = options.get("freeze_rate", slimfit_fx.Config().freeze_rate)
    return found


def lines(cells: Sequence[Cell]) -> Iterator[Line]:
    """All lines of two points or more."""
    measured = [entry for entry in cells if "error" not in entry]
    baseline = {_key(place(entry["cell"])): entry for entry in measured if entry["cell"]["method"] == BASELINE}
    for axis in ("layers", "width", "batch", "length", RATE):
        groups: dict[Any, dict[float, Cell]] = {}
        for entry in measured:
            if methods.is_slimfit(entry["cell"]["method"]):
                where = place(entry["cell"])
                value = where.pop(axis)
                groups.setdefault((entry["cell"]["method"], _key(where)), {})[value] = entry
        for (method, fixed), group in groups.items():
            points = []
            for value, entry in sorted(group.items()):
                where = {**dict(fixed), axis: value}
                where.pop(RATE)  # which the baseline has not
                if _key(where) in baseline:
                    points.append((value, baseline[_key(where)], entry))
            if len(points) > 1:
                yield Line(method, axis, dict(fixed), points)


def table(line: Line) -> str:
    rows = []
    for value, base, entry in line.points:
        shown = [f"{value:g}"]
        for figure in FIGURES:
            ratio = f" ({entry[figure] / base[figure]:.2f}x)"
            shown += [show.amount(figure, base[figure]), show.amount(figure, entry[figure]) + ratio]
        rows.append(shown)
    headings = [name for heading in FIGURES.values() for name in (f"{heading}, {BASELINE}", heading)]
    return tabulate(rows, [line.axis, *headings], "github", disable_numparse=True)


def plot(found: Sequence[Line]) -> Any:
    """Peak memory above step time, a column for each line."""
    from matplotlib.figure import Figure

    panels = {"peak_bytes": ("peak over base, MiB", 2**20), "step_seconds": ("step, s", 1)}
    figure = Figure(figsize=(3 * len(found), 5.5), layout="constrained")
    axes = figure.subplots(len(panels), len(found), squeeze=False)
    for column, line in enumerate(found):
        values = [value for value, _, _ in line.points]
        for row, (name, (label, unit)) in enumerate(panels.items()):
            for which, color in enumerate(("tab:gray", "tab:red")):
                heights = [cells[which][name] / unit for _, *cells in line.points]
                axes[row][column].plot(values, heights, marker="o", color=color)
            axes[row][column].set(ylim=(0, None), ylabel=label if column == 0 else "")
            axes[row][column].grid(alpha=0.3)
        axes[-1][column].set_xlabel(line.axis)
    axes[0][0].legend([BASELINE, found[0].method])
    return figure


def _key(where: Place) -> Any:
    return tuple(sorted(where.items()))


if __name__ == "__main__":
    main()
