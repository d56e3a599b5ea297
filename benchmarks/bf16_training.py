"""Whether fewer bits for bf16 activations show in training: MiniLM on sentences, under bf16 autocast, every layer open.

    python -m benchmarks.bf16_training --csv sst2.csv --out benchmarks/results/bf16-training.json

Other options are those of examples/text/finetune.py: `--csv` takes a file with the columns text and label, such as
SST-2's training set; default: Rotten Tomatoes. All runs of a seed see the same batches. Goes on where it was
interrupted.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers.utils import logging

import slimfit_fx
from examples.shared.training import accuracy
from examples.text import finetune
from slimfit_fx import Config

from .bf16_error import PRESETS
from .run import machine

METHODS = {"exact": Config(preset="exact")} | {
    f"{preset}, {codecs}" if codecs else preset: config for preset, codecs, config in PRESETS
}
LENGTH, BATCH, LEARNING_RATE = 32, 16, 1e-4
_LAST = 50  # steps whose loss is averaged


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", default=list(METHODS), metavar="METHOD")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    options, passed_on = parser.parse_known_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    result = json.loads(options.out.read_text()) if options.out.exists() else {"machine": machine(), "runs": []}
    for seed in range(options.seeds):
        for method in options.methods:
            key = {"method": method, "seed": seed, "steps": options.steps}
            if not any(key.items() <= run.items() for run in result["runs"]):
                result["runs"].append(key | train(METHODS[method], seed, options.steps, passed_on))
                options.out.write_text(json.dumps(result, indent=1) + "\n")
                print(result["runs"][-1], flush=True)


def train(config: Config, seed: int, steps: int, arguments: Sequence[str]) -> dict[str, Any]:
    """The loss, a mean over the last steps, and the accuracy on sentences that were not trained on."""
    torch._dynamo.reset()
    torch.manual_seed(seed)
    model, sets = finetune.load(finetune.parse(["--length", str(LENGTH), *arguments]))
    slimfit_fx.transform(model.train(), config.replace(freeze_rate=0.0, mode="eager"))
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    losses = []
    for inputs in batches(sets["train"], seed, steps):
        losses.append(step(model, inputs))
        optimizer.step()
        decay.step()
        optimizer.zero_grad()
    return {
        "loss": statistics.mean(losses[-_LAST:]),
        "accuracy": accuracy(model, sets["validation"], finetune.to_inputs, torch.device("cpu")),
    }


def batches(data: TensorDataset, seed: int, steps: int) -> Iterator[dict[str, Tensor]]:
    loader = DataLoader(data, BATCH, shuffle=True, drop_last=True, generator=torch.Generator().manual_seed(seed))
    done = 0
    while True:
        for batch in loader:
            if done == steps:
                return
            yield finetune.to_inputs(batch)
            done += 1


def step(model: nn.Module, inputs: dict[str, Tensor]) -> float:
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**inputs).loss
    loss.backward()
    return loss.item()


if __name__ == "__main__":
    main()
