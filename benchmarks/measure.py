"""Measures one method on one setting in this process, and prints one JSON line.

    python benchmarks/measure.py exact --setting bert4 --freeze-rate 0.9

Resident memory is only meaningful when freed memory goes back at once: `compare.py` sets glibc's thresholds for the
processes that it starts.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import training
from meter import PeakMemory

import slimfit_fx
from slimfit_fx.presets import PRESETS

BASELINES = ("eager", "compile")
METHODS = (*BASELINES, *PRESETS)


def bert(batch: int, length: int, **config: Any) -> tuple[nn.Module, dict[str, Any]]:
    """A BERT classifier with dropout 0.1, random weights and tokens; BERT-base where `config` says nothing else."""
    from transformers import BertConfig, BertForSequenceClassification

    inputs = {
        "input_ids": torch.randint(0, 30000, (batch, length)),
        "attention_mask": torch.ones(batch, length, dtype=torch.long),
        "labels": torch.randint(0, 2, (batch,)),
    }
    return BertForSequenceClassification(BertConfig(problem_type="single_label_classification", **config)), inputs


SETTINGS: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {
    "bert4": lambda: bert(16, 128, num_hidden_layers=4),
    "bert12": lambda: bert(4, 128),
    # the text example's architecture and shapes
    "minilm": lambda: bert(32, 48, hidden_size=384, num_hidden_layers=6, intermediate_size=1536),
}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    # without state: the activations are what is looked at
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-4),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-4),
}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    model, inputs = SETTINGS[options.setting]()
    device = torch.device(options.device)
    model.to(device).train()
    inputs = {name: value.to(device) for name, value in inputs.items()}
    if options.method == "compile":
        model.compile()
    elif options.method != "eager":
        slimfit_fx.transform(model, preset=options.method, freeze_rate=options.freeze_rate, **dict(options.option))
    spent = [0.0] if options.method in BASELINES else _time_scheduler(slimfit_fx.scheduler(model))
    optimizer = OPTIMIZERS[options.optimizer](model.parameters())
    memory = PeakMemory(device)

    def step() -> dict[str, float]:
        gc.collect()
        spent[0] = 0.0
        memory.start()
        start = time.perf_counter()
        loss = model(**inputs).loss
        saved = memory.current()
        predicted = saved if options.method in BASELINES else slimfit_fx.report(model).saved_bytes_after
        loss.backward()
        _synchronize(device)
        peak = memory.peak()
        optimizer.step()
        optimizer.zero_grad()
        _synchronize(device)
        seconds = time.perf_counter() - start
        return {
            "seconds": seconds,
            "scheduler_seconds": spent[0],
            "saved_bytes": saved,
            "predicted_bytes": predicted,
            "peak_bytes": peak,
        }

    first = step()["seconds"]
    for _ in range(2):
        step()
    rows = [step() for _ in range(options.steps)]
    seconds = sorted(row["seconds"] for row in rows)
    return {
        **vars(options),
        "first_step_seconds": first,
        "step_seconds": statistics.median(seconds),
        "step_seconds_spread": [seconds[0], seconds[-1]],
        "scheduler_seconds": statistics.mean(row["scheduler_seconds"] for row in rows),
        "saved_bytes": statistics.median(row["saved_bytes"] for row in rows),
        "prediction_error": max(abs(row["saved_bytes"] / row["predicted_bytes"] - 1) for row in rows),
        "saved_bytes_max": max(row["saved_bytes"] for row in rows),
        "peak_bytes": statistics.median(row["peak_bytes"] for row in rows),
        "peak_bytes_max": max(row["peak_bytes"] for row in rows),
    }


def _time_scheduler(scheduler: slimfit_fx.Scheduler) -> list[float]:
    """A list whose one element grows by the host's time in the scheduler."""
    spent = [0.0]

    def timed(method: Callable[..., None]) -> Callable[..., None]:
        def run(*arguments: Any) -> None:
            start = time.perf_counter()
            method(*arguments)
            spent[0] += time.perf_counter() - start

        return run

    for name in ("step", "before_optimizer_step", "after_optimizer_step"):
        setattr(scheduler, name, timed(getattr(scheduler, name)))
    return spent


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("--setting", choices=SETTINGS, default="bert4")
    parser.add_argument("--freeze-rate", type=float, default=0.9)
    parser.add_argument("--option", action="append", default=[], type=training.option, metavar="FIELD=VALUE")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="sgd")
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    print(json.dumps(measure(parse())))
