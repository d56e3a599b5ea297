"""Accuracy of methods on the text example's task, each tuned with the same effort; goes on where it was interrupted.

    python -m benchmarks.accuracy compile --rates 5e-5 1e-4 2e-4 --out benchmarks/results/accuracy-cpu.json
    python -m benchmarks.accuracy lora balanced --rates 2e-4 4e-4 8e-4 --out benchmarks/results/accuracy-cpu.json
    python -m benchmarks.accuracy codecs-only --optimizer adamw8bit --out benchmarks/results/accuracy-cpu.json
    python -m benchmarks.run benchmarks/suites/cpu-accuracy.json --out memory.json
    python -m benchmarks.accuracy --show benchmarks/results/accuracy-cpu.json --memory memory.json --plot docs/pictures

Each learning rate is tried with seed 0; the other seeds run at the one with the best validation accuracy. Data,
model and loop are those of examples/text/finetune.py (48 tokens, batch 32, 3 epochs, linear decay).
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from examples.shared import training
from examples.shared.optimizers import OPTIMIZERS
from examples.shared.options import option
from examples.text import finetune

from . import methods, show
from .run import machine

Run = dict[str, Any]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", type=known, metavar="METHOD")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-4], help="learning rates to try")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw")
    parser.add_argument("--option", action="append", default=[], type=option, metavar="FIELD=VALUE")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--show", type=Path, help="only print the table of this result")
    parser.add_argument("--memory", type=Path, help="a result of run.py: how much memory the methods need")
    parser.add_argument("--plot", type=Path, help="a folder for the picture of test error against memory")
    options, passed_on = parser.parse_known_args(arguments)
    if options.show:
        runs, peaks = json.loads(options.show.read_text())["runs"], total_peaks(options.memory)
        print(table(runs, peaks))
        if options.plot:
            show.save(plot(runs, peaks), options.plot, options.show.stem)
        return
    result = {"machine": machine(), "runs": []}
    if options.out and options.out.exists():
        result = json.loads(options.out.read_text())
    for method in options.methods:
        for run in wanted(method, options, result["runs"]):
            result["runs"].append({**run, **trained(run, passed_on)})
            if options.out:
                options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result["runs"]))


def known(method: str) -> str:
    if method not in methods.METHODS:
        raise argparse.ArgumentTypeError(f"no method {method!r}; there are {', '.join(methods.METHODS)}")
    return method


def wanted(method: str, options: argparse.Namespace, runs: Sequence[Run]) -> Iterator[Run]:
    """The runs that are missing: every rate with the first seed, then every seed with the best rate.

    `runs` grows while this goes on.
    """
    key = {"method": method, "option": dict(options.option), "optimizer": options.optimizer}

    def missing(rate: float, seed: int) -> Iterator[Run]:
        run = {**key, "learning_rate": rate, "seed": seed}
        if not any(run.items() <= done.items() for done in runs):
            yield run

    for rate in options.rates:
        yield from missing(rate, 0)
    rate = best_rate([run for run in runs if key.items() <= run.items()])
    for seed in range(1, options.seeds):
        yield from missing(rate, seed)


def best_rate(runs: Sequence[Run]) -> float:
    """The learning rate with the best validation accuracy at seed 0."""
    tried = [run for run in runs if run["seed"] == 0]
    return max(tried, key=lambda run: run["validation_accuracy"])["learning_rate"]


def trained(run: Run, arguments: Sequence[str]) -> Run:
    """Trains once, as examples/text/finetune.py does with these arguments; returns accuracies and costs."""
    options = finetune.parse(["--epochs", "3", *arguments, "--seed", str(run["seed"]), "--optimizer", run["optimizer"]])
    torch.manual_seed(run["seed"])
    torch.compiler.reset()
    model, sets = finetune.load(options)
    device = torch.device(options.device)
    seed = {"seed": run["seed"]} if methods.is_slimfit(run["method"]) else {}
    model = methods.prepare(model.to(device).train(), run["method"], **{**seed, **run["option"]})
    result = training.train(model, sets["train"], finetune.to_inputs, options, run["learning_rate"])
    for part in ("validation", "test"):
        result[f"{part}_accuracy"] = training.accuracy(model, sets[part], finetune.to_inputs, device)
    return result


def table(runs: Sequence[Run], peaks: Mapping[str, int] | None = None) -> str:
    """A line per method at its best rate; accuracies in per cent, their spread is the standard deviation of a run."""
    lines = []
    for name, group in show.grouped(runs, named).items():
        best = at_best_rate(group)
        rate = best[0]["learning_rate"]
        tests = [100 * run["test_accuracy"] for run in best]
        lines.append(
            [
                name,
                f"{rate:g}",
                ", ".join(sorted({f"{run['learning_rate']:g}" for run in group} - {f"{rate:g}"})),
                f"{100 * statistics.mean(run['validation_accuracy'] for run in best):.1f}",
                ", ".join(f"{accuracy:.1f}" for accuracy in tests),
                f"{statistics.mean(tests):.1f}" + (f" ± {statistics.stdev(tests):.1f}" if len(tests) > 1 else ""),
                show.amount("total_bytes", peaks[name]) if peaks and name in peaks else "",
            ]
        )
    headings = ["method", "learning rate", "tried", "validation", "test, by seed", "mean", "total peak"]
    return tabulate(lines, headings, "github", disable_numparse=True)


def plot(runs: Sequence[Run], peaks: Mapping[str, int]) -> Any:
    """Test error against the total peak; the bars span the seeds."""
    errors = {
        name: [100 - 100 * run["test_accuracy"] for run in at_best_rate(group)]
        for name, group in show.grouped(runs, named).items()
        if name in peaks
    }
    points = {name: (peaks[name] / 2**20, statistics.mean(values)) for name, values in errors.items()}
    figure = show.pareto(points, "", "weights, gradients, optimizer and activations at the peak, MiB", "test error, %")
    axes = figure.axes[0]
    for name, values in errors.items():
        axes.vlines(points[name][0], min(values), max(values), color="tab:gray", linewidth=1)
    show.name_points(figure, points)
    return figure


def total_peaks(path: Path | None) -> dict[str, int]:
    """What each method of a result of run.py needs, all optimizer states included, in bytes; the median over rounds."""
    cells = [cell for cell in json.loads(path.read_text())["cells"] if "error" not in cell] if path else []
    return {
        name: int(statistics.median(row["total_bytes_max"] + row["optimizer_bytes_to_come"] for row in rows))
        for name, rows in show.grouped(cells, lambda cell: named(cell["cell"])).items()
    }


def at_best_rate(runs: Sequence[Run]) -> list[Run]:
    rate = best_rate(runs)
    return sorted((run for run in runs if run["learning_rate"] == rate), key=lambda run: run["seed"])


def named(run: Mapping[str, Any]) -> str:
    """A run or a cell by its method, what was changed in it, and its optimizer if that is not AdamW."""
    option = [f"{field}={value}" for field, value in run.get("option", {}).items()]
    optimizer = [] if run["optimizer"] == "adamw" else [run["optimizer"]]
    return " ".join([run["method"], *option, *optimizer])


if __name__ == "__main__":
    main()
