"""Compares `slimfit_fx.preview` with what the same steps take on the CPU, compiled, and keeps the figures.

    python -m benchmarks.preview --model minilm --preset balanced --regions blocks

A model is trained with every layer open, and with the layers open that preview says take most at freeze_rate 0.9; then,
under the first optimizer, for `--steps` steps at that rate, which open every layer at least once.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import slimfit_fx
from examples.shared.memory import ENVIRONMENT, PeakMemory
from examples.shared.optimizers import OPTIMIZERS

from . import models

RESULTS = Path(__file__).parent / "results" / "preview.json"
RATES = (0.0, 0.9)
WARM_UP = 2


def compare(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row for each optimizer and rate; bytes that a step takes above weights, optimizer states and batch."""
    torch.manual_seed(0)
    model, inputs = models.build(options.model)
    settings = {"preset": options.preset, "regions": options.regions}
    previews = {
        (name, rate): slimfit_fx.preview(
            model, inputs, lambda p, name=name: OPTIMIZERS[name](p, 1e-4), freeze_rate=rate, **settings
        )
        for name in options.optimizers
        for rate in RATES
    }
    optimizers = {name: _with_states(model, name) for name in options.optimizers}
    transformed = slimfit_fx.transform(model, freeze_rate=RATES[-1], **settings)
    gates, memory, trained = slimfit_fx.gates(transformed), PeakMemory(torch.device("cpu")), set[str]()

    def step(optimizer: torch.optim.Optimizer) -> int:
        gc.collect()
        memory.start()
        transformed(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        trained.update(gates.open)
        return memory.peak()

    for (name, rate), preview in previews.items():
        found = preview.to_dict()
        peaks = []
        for _ in range(WARM_UP + 3):
            gates.set(found["open_layers"])
            peaks.append(step(optimizers[name]))
        row = {
            **{"model": options.model, **settings, "optimizer": name, "freeze_rate": rate},
            "preview_step_bytes": max(found["phases"].values()),
            "measured_step_bytes": max(peaks[WARM_UP:]),
            "preview_peak_bytes": preview.peak,
            "phases": found["phases"],
        }
        yield row
        if rate and name == options.optimizers[0]:
            trained.clear()
            peaks = [step(optimizers[name]) for _ in range(options.steps)]
            if missing := set(gates) - trained:
                raise ValueError(f"{options.steps} steps do not open {len(missing)} layers: --steps takes more")
            yield {**row, "steps": options.steps, "run_step_bytes": max(peaks)}


def _with_states(model: nn.Module, name: str) -> torch.optim.Optimizer:
    """An optimizer that has its states, as after many steps."""
    optimizer = OPTIMIZERS[name](model.parameters(), 0.0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for group in optimizer.param_groups:
        group["lr"] = 1e-4
    return optimizer


def _store(row: dict[str, Any]) -> None:
    """Puts a row into the results, in the place of that of the same setting."""
    keys = ("model", "preset", "regions", "optimizer", "freeze_rate")
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    found = {tuple(row[key] for key in keys): row for row in [*known, row]}
    RESULTS.write_text("[\n" + ",\n".join(f" {json.dumps(found[key])}" for key in sorted(found)) + "\n]\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=models.MODELS, default="minilm")
    parser.add_argument("--preset", choices=("exact", "balanced", "tight"), default="balanced")
    parser.add_argument("--regions", choices=("blocks", "model"), default="blocks")
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=["fused-adamw", "adamw"])
    parser.add_argument("--steps", type=int, default=30)
    if not ENVIRONMENT.items() <= os.environ.items():  # freed memory goes back at once
        command = [sys.executable, "-m", "benchmarks.preview", *sys.argv[1:]]
        raise SystemExit(subprocess.run(command, env={**os.environ, **ENVIRONMENT}, check=False).returncode)
    for row in compare(parser.parse_args()):
        _store(row)


if __name__ == "__main__":
    main()
