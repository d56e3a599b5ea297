"""Measures a suite: every cell in processes of its own, methods in turn; goes on where it was interrupted.

    python -m benchmarks.run benchmarks/suites/cpu.json --out benchmarks/results/cpu.json
    python -m benchmarks.show benchmarks/results/cpu.json

A suite is a list of grids: all combinations of the values of their keys, which are the arguments of measure.py
("config" and "option" are objects). The cells of a round are measured one after another: the speed of a shared machine
drifts, but little within a round, and ratios are taken within rounds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from examples.shared.memory import ENVIRONMENT

ROOT = Path(__file__).parent.parent
Cell = dict[str, Any]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=None, help="default: the suite's")
    parser.add_argument("--retry", action="store_true", help="measure again what failed")
    options = parser.parse_args(arguments)
    suite = json.loads(options.suite.read_text())
    result = json.loads(options.out.read_text()) if options.out.exists() else {"machine": machine(), "cells": []}
    if options.retry:
        result["cells"] = [cell for cell in result["cells"] if "error" not in cell]
    done = {json.dumps(cell["cell"], sort_keys=True) for cell in result["cells"]}
    wanted = [{**cell, "round": number} for number in range(options.rounds or suite["rounds"]) for cell in cells(suite)]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    progress = tqdm(wanted, unit="cell")
    for cell in progress:
        progress.set_description(f"{cell['model']} {cell['method']}")
        if json.dumps(cell, sort_keys=True) not in done:
            result["cells"].append({"cell": cell, **measured(cell)})
            options.out.write_text(json.dumps(result, indent=1) + "\n")


def cells(suite: Mapping[str, Any]) -> Iterator[Cell]:
    """The suite's cells, in order and each once."""
    seen: list[Cell] = []
    for grid in suite["grids"]:
        axes = {**suite.get("defaults", {}), **grid}
        choices = [values if isinstance(values, list) else [values] for values in axes.values()]
        for values in itertools.product(*choices):
            cell = dict(zip(axes, values, strict=True))
            if cell not in seen:
                seen.append(cell)
                yield cell


def measured(cell: Cell) -> dict[str, Any]:
    """What measure.py prints for the cell, with the first step of a second process that finds the code in the cache."""
    with tempfile.TemporaryDirectory() as cache:
        figures = measured_once(cell, cache)
        again = {} if "error" in figures else measured_once({**cell, "steps": 0}, cache)
    if "first_step_seconds" in again:
        figures["warm_first_step_seconds"] = again["first_step_seconds"]
    return figures


def measured_once(cell: Cell, cache: str) -> dict[str, Any]:
    """What measure.py prints for the cell, in a process of its own; `error` is its last words if it fails.

    Args:
        cell: as in a suite.
        cache: the folder in which Inductor looks for compiled code, and leaves it.
    """
    command = [sys.executable, "-m", "benchmarks.measure", *flags(cell)]
    environment = {**os.environ, **ENVIRONMENT, "TORCHINDUCTOR_CACHE_DIR": cache}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode < 0:  # by the kernel, where memory was short
        return {"error": f"killed by signal {-done.returncode}"}
    if done.returncode > 0:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return {"error": lines[-1][:300]}
    return json.loads(done.stdout.splitlines()[-1])


def flags(cell: Cell) -> list[str]:
    """measure.py's arguments for a cell."""
    result = [cell["method"]]
    for name, value in cell.items():
        if name in ("config", "option"):
            for field, entry in value.items():
                result += [f"--{name}", f"{field}={json.dumps(entry)}"]
        elif name not in ("method", "round"):
            result += [f"--{name}", str(value)]
    return result


def machine() -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "device": cuda or f"CPU {platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


if __name__ == "__main__":
    main()
