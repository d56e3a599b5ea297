"""Compares `slimfit_fx.preview` with what the same steps take on the CPU, compiled, and keeps the figures.

    python -m benchmarks.preview --model minilm --preset balanced --regions blocks

A model is trained with every layer open, and with the layers open that preview says take most at freeze_rate 0.9;
before that, under the first optimizer, for `--steps` steps at that rate, which open every layer at least once.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import slimfit_fx
from examples.shared.optimizers import OPTIMIZERS

from . import models

RESULTS = Path(__file__).parent / "results" / "preview.json"
RATES = (0.0, 0.9)
WARM_UP = 2
LEARNING_RATE = 1e-4


def compare(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row for each rate and optimizer; bytes that a step takes above weights, optimizer states and batch.

    Measured is what torch's allocator hands out; what libraries allocate by themselves is not among it.
    """
    torch.manual_seed(0)
    model, inputs = models.build(options.model)
    optimizers = {name: _with_states(model, name) for name in options.optimizers}
    for rate in sorted(RATES, reverse=True):
        settings = {"preset": options.preset, "regions": options.regions, "freeze_rate": rate}
        previews = {
            name: slimfit_fx.preview(model, inputs, functools.partial(_optimizer, name), **settings)
            for name in optimizers
        }
        transformed = slimfit_fx.transform(model, **settings)
        gates, trained = slimfit_fx.gates(transformed), set[str]()
        for name, preview in previews.items():
            optimizer, found = optimizers[name], preview.to_dict()
            run: list[int] = []
            if rate and name == options.optimizers[0]:
                for _ in range(WARM_UP + options.steps):
                    run.append(_step(transformed, inputs, optimizer))
                    trained.update(gates.open)
                if options.steps and (missing := set(gates) - trained):
                    raise ValueError(f"{options.steps} steps do not open {len(missing)} layers: --steps takes more")
            peaks = []
            for _ in range(WARM_UP + 1):
                gates.set(found["open_layers"])
                peaks.append(_step(transformed, inputs, optimizer))
            yield {
                **{"model": options.model, **settings, "optimizer": name},
                "preview_step_bytes": max(found["phases"].values()),
                "measured_step_bytes": max(peaks[WARM_UP:]),
                "steps": options.steps if run else 0,
                "run_step_bytes": max(run[WARM_UP:], default=None),
                "preview_peak_bytes": preview.peak,
                "phases": found["phases"],
            }
        slimfit_fx.undo(transformed)


def _step(model: nn.Module, inputs: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer) -> int:
    """The most bytes that a step had allocated at once, above what it began with."""
    gc.collect()
    with torch.profiler.profile(profile_memory=True) as profile:
        model(**inputs).loss.backward()
        optimizer.step()
    optimizer.zero_grad()
    recorded: Any = profile.profiler
    events = [event for event in recorded.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def _optimizer(name: str, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return OPTIMIZERS[name](parameters, LEARNING_RATE)


def _with_states(model: nn.Module, name: str) -> torch.optim.Optimizer:
    """One that has its states, as after many steps."""
    optimizer = OPTIMIZERS[name](model.parameters(), 0.0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for group in optimizer.param_groups:
        group["lr"] = LEARNING_RATE
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
    for row in compare(parser.parse_args()):
        _store(row)


if __name__ == "__main__":
    main()
