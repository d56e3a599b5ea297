"""The same training with torch.compile and with slimfit_fx, one after the other, and a table of both."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from .memory import ENVIRONMENT

ROOT = Path(__file__).parents[2]
METHODS = {"torch.compile": ["--baseline"], "slimfit_fx": []}


def compare(module: str, arguments: Sequence[str] | None, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Runs a program with each method, prints the table, and returns the results by method.

    Each run has a process and a folder of generated code of its own: neither the memory that compilation leaves behind
    nor code that the other run compiled counts.

    Args:
        module: the program.
        arguments: its own, with `--compare`; None for those of the command line.
        options: what it made of them.
    """
    kept = [argument for argument in (sys.argv[1:] if arguments is None else arguments) if argument != "--compare"]
    kept.append("--no-validation")
    if not (options.steps or options.epochs):
        kept.append(f"--steps={options.compared_steps}")
    results = {}
    for method, flags in METHODS.items():
        print(f"\n{method}", flush=True)
        results[method] = run_apart(module, [*kept, *flags])
    print(f"\n{table(results)}")
    if options.json:
        with Path(options.json).open("a") as file:
            file.writelines(json.dumps(result) + "\n" for result in results.values())
    return results


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A column for each method and their ratio; below it how long they trained, with which learning rates."""
    plain, slim = results.values()
    rows = [
        ("saved for the backward", "saved_bytes", mebibytes),
        ("largest peak over weights and data", "peak_bytes", mebibytes),
        ("step, median", "step_seconds", "{:.2f} s".format),
        ("first step, compilation included", "first_step_seconds", "{:.0f} s".format),
    ]
    lines = [[name, show(plain[key]), show(slim[key]), f"{slim[key] / plain[key]:.2f}x"] for name, key, show in rows]
    lines.append(["test accuracy", *(f"{result['test_accuracy']:.1%}" for result in (plain, slim)), ""])
    text = tabulate(lines, ["", *results, "ratio"], colalign=("left", "right", "right", "right"), disable_numparse=True)
    rates = " and ".join(f"{result['learning_rate']:g}" for result in (plain, slim))
    return (
        f"{text}\n\n{plain['steps']} steps each ({plain['epochs']:.1f} epochs), learning rates {rates}, on "
        f"{plain['device']}.\nThe peak is what optimizer states, gradients and activations need in the largest step."
    )


def run_apart(module: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Runs a program in a process and with a folder of generated code of its own; what it appends to its `--json` file.

    Raises:
        SystemExit: the program failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        environment = {**os.environ, **ENVIRONMENT, "TORCHINDUCTOR_CACHE_DIR": str(Path(folder) / "code")}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        done = subprocess.run([sys.executable, "-m", module, *arguments, f"--json={result}"], env=environment)
        if done.returncode:
            raise SystemExit(done.returncode if done.returncode > 0 else f"killed by signal {-done.returncode}")
        return json.loads(result.read_text())


def mebibytes(nbytes: int) -> str:
    return f"{nbytes / 2**20:.0f} MiB"
