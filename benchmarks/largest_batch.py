"""Finds the largest batch that trains in a given memory, weights, gradients and optimizer states included.

    python -m benchmarks.largest_batch compile balanced --memory 2GiB --model minilm --out batches.json

Every batch is measured in a process of its own; what the optimizer will keep for layers that have not trained by then
is added. The peak grows evenly with the batch, so the next one to try is read off a line through the two nearest to the
limit; the search ends when the smallest batch that is too large is within 2% of the answer.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tabulate import tabulate

import slimfit_fx
from examples.shared.optimizers import OPTIMIZERS

from . import measure, methods, models, run

PRECISE = 0.02


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="+", choices=methods.METHODS)
    parser.add_argument("--memory", required=True, help='bytes, or such as "32GiB"')
    parser.add_argument("--model", choices=models.MODELS, default="minilm")
    parser.add_argument("--length", type=int, default=None, help="tokens, or pixels a side; default: the model's")
    parser.add_argument("--precision", choices=measure.PRECISIONS, default="fp32")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw")
    parser.add_argument("--out", type=Path, default=None, help="where the result goes, as JSON")
    options = parser.parse_args(arguments)
    limit = slimfit_fx.Config(memory_budget=options.memory).budget
    assert limit is not None
    setting = {
        name: value for name in ("model", "length", "precision", "optimizer") if (value := getattr(options, name))
    }
    result: dict[str, Any] = {"machine": run.machine(), "setting": setting, "memory": limit, "methods": {}}
    for method in options.methods:
        tried: dict[int, int | None] = {}
        found = largest_batch(
            _peak_of({**setting, "method": method}), limit, models.MODELS[options.model]["batch"], tried
        )
        result["methods"][method] = {"batch": found, "tried": tried}
        if options.out:
            options.out.write_text(json.dumps(result, indent=1) + "\n")
    rows = [(method, entry["batch"]) for method, entry in result["methods"].items()]
    print(tabulate(rows, ["method", f"largest batch in {options.memory}"], "github"))


def largest_batch(peak: Callable[[int], int | None], limit: int, start: int, tried: dict[int, int | None]) -> int:
    """The largest batch whose peak is at most `limit`, up to 2%; 0 if a batch of one is too large.

    Args:
        peak: the peak of a batch in bytes; None if there was not enough memory to measure it.
        limit: bytes.
        start: the first batch to try.
        tried: gets every batch tried and its peak.
    """
    fits, too_large, batch = 0, None, start
    while True:
        tried[batch] = total = peak(batch)
        if total is not None and total <= limit:
            fits = batch
        else:
            too_large = batch
        if too_large is not None and too_large - fits <= max(1, int(PRECISE * fits)):
            return fits
        batch = _next(tried, limit, fits, too_large)


def _next(tried: Mapping[int, int | None], limit: int, fits: int, too_large: int | None) -> int:
    """The next batch to try, between what fits and what is too large."""
    lowest = fits + max(1, int(PRECISE * fits))
    highest = 8 * fits if too_large is None else too_large - 1
    guess = 2 * fits or highest // 2
    known = sorted((abs(total - limit), total, batch) for batch, total in tried.items() if total is not None)
    if len(known) > 1:
        (_, below, one), (_, above, other) = known[:2]
        guess = int(one + (limit - below) * (other - one) / (above - below)) if above != below else guess
    if too_large is not None and guess >= too_large:  # it did not even run: nothing is known between the two
        guess = (fits + too_large) // 2
    return min(max(guess, lowest), highest)


def _peak_of(cell: dict[str, Any]) -> Callable[[int], int | None]:
    def peak(batch: int) -> int | None:
        with tempfile.TemporaryDirectory() as cache:
            figures = run.measured_once({**cell, "batch": batch, "steps": 1}, cache)
        if "error" not in figures:
            return figures.get("reserved_bytes", figures["total_bytes_max"]) + figures["optimizer_bytes_to_come"]
        if "out of memory" in figures["error"].lower() or "killed" in figures["error"]:
            return None
        raise SystemExit(f"{cell['method']}, batch {batch}: {figures['error']}")

    return peak


if __name__ == "__main__":
    main()
