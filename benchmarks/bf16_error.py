"""How many bits bf16 activations need: gradient errors of codecs by role, beside the error that bf16 itself makes.

    python -m benchmarks.bf16_error --out benchmarks/results/bf16-error.json
    python -m benchmarks.bf16_error MiniLM-L6 --only "norm input" --out benchmarks/results/bf16-error.json
    python -m benchmarks.bf16_error --show benchmarks/results/bf16-error.json

One batch under bf16 autocast, without dropout, all layers open, in the interpreter; a codec is applied to one role,
everything else is exact. Errors are |g - e| / |e| of each weight matrix's gradient by itself: e is the same run's
without codecs. bf16's own error is that of e against the gradient in float32.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm
from transformers.utils import logging

from slimfit_fx import Config
from slimfit_fx.codecs import Derivative, FixedPoint, Format, Quantize, Recompute
from slimfit_fx.graph.plan import Plan
from slimfit_fx.inspection.gradient_difference import gradient_errors, negligible, whole_norm
from slimfit_fx.inspection.probe import sample_gradients

from .outliers import Outliers
from .pretrained import MODELS, Batch
from .run import machine

Gradients = Mapping[str, Tensor]

GROUPS: list[Format] = [
    Quantize(8),
    *(Quantize(bits, 64) for bits in (6, 5, 4)),
    Outliers(4, 64, 1),
    Outliers(4, 64, 2),
]
# Query, key and value are read by batched products under autocast, which makes them "other".
CANDIDATES: dict[tuple[str, ...], list[Format]] = {
    ("linear input",): GROUPS,
    ("attention operand", "other"): GROUPS,
    ("activation input",): [
        *GROUPS,
        Derivative(FixedPoint(6, 1.26 / 63, -0.13)),
        Derivative(FixedPoint(4, 1.26 / 15, -0.13)),
    ],
    ("norm input",): [
        Quantize(8, 64, symmetric=False),
        Quantize(6, 64, symmetric=False),
        Quantize(6, 64),
        Outliers(8, 64, 1),
        Outliers(6, 64, 1),
        Outliers(4, 64, 2),
    ],
}
# What a preset stores in eight bits, in six.
SIX: dict[str, Format | None] = {
    "attention operand": Quantize(6, 64),
    "other": Quantize(6, 64),
    "norm input": Quantize(6, 64, symmetric=False),
}
PRESETS: list[tuple[str, str, Config]] = [
    ("balanced", "", Config(preset="balanced")),
    (
        "balanced",
        "int6 for int8",
        Config(codecs={**SIX, "linear input": Quantize(6, 64), "activation input": Quantize(6, 64)}),
    ),
    ("tight", "", Config(preset="tight")),
    ("tight", "int6 for int8", Config(preset="tight", codecs={**SIX, "attention operand": Recompute(Quantize(6, 64))})),
]


def measure(name: str, only: str, autocast: bool) -> Iterator[dict[str, Any]]:
    """The row of bf16 itself, then those of presets and codecs whose name matches the expression `only`."""
    torch.manual_seed(0)  # of new heads
    model, batch = MODELS[name](*SIZES[name])
    exact = Config(preset="exact")
    single, _ = sample_gradients(model, exact, batch)
    if not autocast:
        model.bfloat16()
        batch = {key: x.bfloat16() if x.is_floating_point() else x for key, x in batch.items()}
    kind = "autocast" if autocast else "weights"
    plain, _ = _gradients(model, exact, batch, autocast)
    weights = _weights(model, plain)
    noise = _relative(plain, single, weights)
    common = {"model": name, "bf16": kind}
    yield {**common, "role": "bf16 itself", "codec": "", **_summary(noise)}
    configs = list(PRESETS)
    for roles, codecs in CANDIDATES.items():
        configs += [
            (", ".join(roles), codec.label, Config(preset="exact", codecs=dict.fromkeys(roles, codec)))
            for codec in codecs
        ]
    for role, codec, config in configs:
        if not re.search(only, f"{role} {codec}"):
            continue
        found, plan = _gradients(model, config, batch, autocast)
        error = _relative(found, plain, weights)
        yield {
            **common,
            "role": role,
            "codec": codec,
            **_bytes(plan, [] if config.preset != "exact" else role.split(", ")),
            **_summary(error),
            # of the error that is there without codecs
            "share_of_bf16s": _summary({key: error[key] / noise[key] for key in error}),
            "against_float32": _summary(_relative(found, single, weights)),
        }


# (batch, tokens)
SIZES = {"MiniLM-L6": (8, 48), "DistilBERT": (8, 48), "SmolLM2-135M": (4, 48), "DINOv2-small": (8, 49)}


def _gradients(model: nn.Module, config: Config, batch: Batch, autocast: bool) -> tuple[Gradients, Plan]:
    torch._dynamo.reset()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return sample_gradients(model, config, batch)


def _weights(model: nn.Module, gradients: Gradients) -> list[str]:
    """The parameters that are matrices or more, and whose gradient counts."""
    whole = whole_norm(gradients)
    found = {name: gradients[name] for name, p in model.named_parameters() if p.dim() > 1 and name in gradients}
    return [name for name, gradient in found.items() if not negligible(gradient, gradient, whole)]


def _relative(found: Gradients, exact: Gradients, names: list[str]) -> dict[str, float]:
    errors = gradient_errors({name: found[name] for name in names}, {name: exact[name] for name in names})
    return {name: errors[name].relative for name in names}


def _summary(values: Mapping[str, float]) -> dict[str, Any]:
    largest = max(values, key=values.__getitem__)
    return {"median": statistics.median(values.values()), "largest": values[largest], "largest_in": largest}


def _bytes(plan: Plan, roles: list[str]) -> dict[str, Any]:
    """Bits of an element of what is stored in these roles, by its dtype; and all bytes, before and after."""
    rows = [row for row in plan.saved if row.stored and (row.role in roles or not roles)]
    before, after = sum(row.nbytes for row in plan.saved), sum(row.stored for row in plan.saved)
    sizes = {"dtypes": sorted({row.dtype for row in rows}), "bytes": before, "bytes_stored": after}
    if not roles:
        return sizes
    elements = sum(row.nbytes // getattr(torch, row.dtype).itemsize for row in rows)
    return {**sizes, "bits": 8 * sum(row.stored for row in rows) / elements if elements else 0.0}


def table(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        share, total = row.get("share_of_bf16s", {}), row.get("against_float32", {})
        lines.append(
            [
                row["model"],
                row["role"],
                row["codec"],
                f"{row['bits']:.2f}" if "bits" in row else "",
                f"{row['median']:.4f}",
                f"{row['largest']:.4f}",
                *(f"{share[key]:.2f}" if share else "" for key in ("median", "largest")),
                *(f"{total[key]:.4f}" if total else "" for key in ("median", "largest")),
            ]
        )
    headers = ["model", "role or preset", "codec", "bits", "median error", "largest", "of bf16's: median", "largest"]
    return tabulate(lines, [*headers, "against float32: median", "largest"], "github", disable_numparse=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(MODELS), metavar="MODEL")
    parser.add_argument("--weights", action="store_true", help="bf16 weights instead of autocast")
    parser.add_argument("--only", default="", help="an expression: measure these again, and keep the others of --out")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--show", type=Path, help="print the table of a result that is there already")
    options = parser.parse_args()
    if options.show:
        print(table(json.loads(options.show.read_text())["rows"]))
        return
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    rows = json.loads(options.out.read_text())["rows"] if options.out and options.out.exists() else []
    for name in options.models:
        for row in tqdm(measure(name, options.only, not options.weights), name):
            rows = [old for old in rows if any(old[key] != row[key] for key in _KEY)] + [row]
            if options.out:
                options.out.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
    print(table(rows))


_KEY = ("model", "bf16", "role", "codec")

if __name__ == "__main__":
    main()
