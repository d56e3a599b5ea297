"""The table of docs/benchmarks.md: simulated steps of every method on whole models."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .devices import Device
from .methods import FREEZE_RATE, METHODS, Step
from .models import REAL
from .trace import at_depth, peak_at_depth

BATCHES = (32, 128, 8)
_FIRST = ("bert-base-128", "vit-b16-224")  # what the library is judged by comes first
_ADAMW_PASSES = 7  # over the bytes of a parameter
DEPTHS = (2, 3)  # a model of one layer has fewer kernels in common with a deep one
Row = dict[str, Any]


def measure(device: Device, *, out: Path, only: str = "") -> None:
    """Adds to `out` what it lacks, row by row; `only`: models with this in their names."""
    found: list[Row] = json.loads(out.read_text())["rows"] if out.exists() else []
    head = {
        "what": "simulated from generated code, no kernel ran; seconds are a roofline",
        "device": device.name,
        "torch": torch.__version__,
        "freeze_rate": FREEZE_RATE,
        "optimizer": "AdamW, fused: both moments of every parameter that trains, no temporaries",
        "depths": DEPTHS,
    }
    done = {key(row) for row in found}
    for name, bf16, batch, method in cells(only):
        if (name, "bf16" if bf16 else "fp32", batch, method) in done:
            continue
        found += rows(name, bf16, batch, method, device)
        out.write_text(json.dumps({**head, "rows": found}, indent=1) + "\n")
        print(name, "bf16" if bf16 else "fp32", batch, method, flush=True)


def cells(only: str) -> Iterator[tuple[str, bool, int, str]]:
    """(model, whether under bf16 autocast, batch, method)."""
    names = [*_FIRST, *(name for name in REAL if name not in _FIRST)]
    for group in (names[: len(_FIRST)], names[len(_FIRST) :]):
        for batch, name, bf16 in itertools.product(BATCHES, group, (False, True)):
            if only in name:
                yield from ((name, bf16, batch, method) for method in METHODS)


def key(row: Row) -> tuple[str, str, int, str]:
    return row["model"], row["precision"], row["batch"], row["method"]


def rows(name: str, bf16: bool, batch: int, method: str, device: Device) -> Iterator[Row]:
    """What the JSON has of a cell; tf32 is the code of fp32 on another roofline."""
    model = REAL[name]
    less, more = (METHODS[method](model, batch, layers, bf16) for layers in DEPTHS)
    for precision in ("bf16",) if bf16 else ("fp32", "tf32"):
        cell = {"model": name, "precision": precision, "batch": batch, "method": method}
        yield {**cell, **at_layers(less, more, DEPTHS, model.layers, device, "fp32" if bf16 else precision)}


def at_layers(
    less: Step, more: Step, depths: tuple[int, int], layers: int, device: Device, precision: str
) -> dict[str, float]:
    """The figures of a model with `layers` layers from those with `depths`; bytes, seconds, FLOPs and counts.

    `total_bytes`: weights, AdamW's states and the peak of activations, gradients and temporaries. `optimizer_seconds`:
    of a fused AdamW that reads parameter, gradient and two moments and writes all but the gradient, of the parameters
    that have a gradient, in fp32. `pass_seconds`: of forward and backward; `seconds`: of all three.
    """
    between, beyond = depths[1] - depths[0], layers - depths[1]
    figures = zip(
        less.trace.figures(device, precision).items(), more.trace.figures(device, precision).values(), strict=True
    )
    found = {name: at_depth(a, b, between, beyond) for (name, a), b in figures}
    found["weight_bytes"] = at_depth(less.weights, more.weights, between, beyond)
    found["state_bytes"] = at_depth(less.states, more.states, between, beyond)
    found["peak_bytes"] = peak_at_depth(less.trace, more.trace, between, beyond)
    found["total_bytes"] = found["weight_bytes"] + found["state_bytes"] + found["peak_bytes"]
    found["optimizer_seconds"] = _ADAMW_PASSES * found["gradient_bytes"] / device.bandwidth
    found["pass_seconds"] = found["forward_seconds"] + found["backward_seconds"]
    found["seconds"] = found["pass_seconds"] + found["optimizer_seconds"]
    return {name: round(value, 6) if "seconds" in name else round(value) for name, value in found.items()}
