"""Measures methods side by side, each in processes of its own, in turn; writes JSON and prints ratios.

    python benchmarks/compare.py compile balanced balanced@0 tight --rounds 3 --out benchmarks/results/bert4-cpu.json
    python benchmarks/compare.py --show benchmarks/results/bert4-cpu.json

A preset may be followed by its freezing rate, 0.9 by default. Ratios are taken within a round, against the first
method, and their median over the rounds is shown: the speed of a shared machine drifts, but little within a round.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from measure import BASELINES, METHODS
from tabulate import tabulate
from tqdm import tqdm

HERE = Path(__file__).parent
FIGURES = ("saved_bytes", "peak_bytes", "step_seconds", "first_step_seconds")
# glibc gives freed memory back at once, so that the resident set is what is in use; compile times are cold
ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", help=f"of {', '.join(METHODS)}; the first one is compared with")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--show", type=Path, help="print the table of a result that is there already")
    options, passed_on = parser.parse_known_args()
    if options.show:
        print(table(json.loads(options.show.read_text())))
        return
    result = {"machine": machine(), "rounds": run(options.methods, options.rounds, passed_on)}
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


def run(methods: list[str], rounds: int, arguments: list[str]) -> list[list[dict[str, Any]]]:
    """A list per round with one row per method; a method that fails leaves its error in its row."""
    progress = tqdm(total=rounds * len(methods), unit="run")
    results = []
    for _ in range(rounds):
        rows = []
        for method in methods:
            progress.set_description(method)
            name, _, rate = method.partition("@")
            command = [sys.executable, str(HERE / "measure.py"), name, "--freeze-rate", rate or "0.9", *arguments]
            done = subprocess.run(command, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True)
            rows.append(
                json.loads(done.stdout.splitlines()[-1])
                if done.returncode == 0
                else {"method": method, "error": done.stderr.strip().splitlines()[-1:]}
            )
            progress.update()
        results.append(rows)
    return results


def table(result: dict[str, Any]) -> str:
    """Medians, and in brackets the median of the ratios to the first method of the same round."""
    rounds = result["rounds"]
    lines = []
    for place, row in enumerate(rounds[0]):
        if any("error" in rows[place] for rows in rounds):
            lines.append([row["method"], *(["failed"] * len(FIGURES))])
            continue
        cells = [row["method"] if row["method"] in BASELINES else f"{row['method']} F={row['freeze_rate']:g}"]
        for figure in FIGURES:
            value = statistics.median(rows[place][figure] for rows in rounds)
            ratio = statistics.median(rows[place][figure] / rows[0][figure] for rows in rounds)
            shown = f"{value / 2**20:.0f} MiB" if figure.endswith("bytes") else f"{value:.2f} s"
            cells.append(f"{shown} ({ratio:.2f}x)")
        lines.append(cells)
    return tabulate(lines, ["method", "saved after forward", "peak over base", "step", "first step"], "github")


def machine() -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True).stdout.strip()
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
