"""An ordinary training loop and accuracy. Nothing in the loop knows of slimfit_fx."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

import slimfit_fx

from .memory import MemoryTimeline, StepMemory, is_exact
from .optimizers import OPTIMIZERS

# From the tensors of a batch to the arguments of a transformers model, labels included.
ToInputs = Callable[[list[Tensor]], dict[str, Tensor]]


def run(
    model: nn.Module, sets: Mapping[str, TensorDataset], to_inputs: ToInputs, options: argparse.Namespace
) -> dict[str, Any]:
    """Trains on `sets["train"]` and prints accuracy on `sets["test"]`, step time, peak memory and the report."""
    device = torch.device(options.device)
    model.to(device).train()
    plain = options.baseline or options.eager_baseline
    learning_rate = options.learning_rate or options.learning_rates[plain]
    if options.baseline:
        model.compile()
    elif not plain:
        slimfit_fx.transform(
            model,
            preset=options.preset,
            freeze_rate=options.freeze_rate,
            policy=options.policy,
            regions=options.regions,
            mode=options.mode,
            seed=options.seed,
            **dict(options.option),
        )
    result = train(model, sets["train"], to_inputs, options, learning_rate)
    for part in ["test"] if options.no_validation else ["validation", "test"]:
        result[f"{part}_accuracy"] = accuracy(model, sets[part], to_inputs, device)
    if not plain:
        print(slimfit_fx.report(model))
    if options.plot:
        save_pictures(model, sets["train"], to_inputs, options)
    print(
        f"\ntest accuracy {result['test_accuracy']:.2%}   step {result['step_seconds']:.3f} s   largest peak over "
        f"weights and data {result['peak_bytes'] / 2**20:.0f} MiB"
        + ("" if is_exact(device) else " (with memory that is free already: see examples/shared/memory.py)")
    )
    result = {**vars(options), "learning_rate": learning_rate, **result}
    if options.json:
        with Path(options.json).open("a") as file:
            file.write(json.dumps(result, default=str) + "\n")
    return result


def train(
    model: nn.Module, data: TensorDataset, to_inputs: ToInputs, options: argparse.Namespace, learning_rate: float
) -> dict[str, Any]:
    """The optimizer with linear decay; batches of one size, so that one graph serves them all.

    Returns:
        steps, epochs (a fraction where steps were asked for), loss (the mean of the last 20 steps), step_seconds (the
        median), first_step_seconds (compilation included), saved_bytes (in use after a forward above its beginning, the
        median), peak_bytes (the most that any step but the first, which compiles, needs over weights and data).
    """
    order = torch.Generator().manual_seed(options.seed)
    batches = DataLoader(data, batch_size=options.batch, shuffle=True, drop_last=True, generator=order)
    optimizer = OPTIMIZERS[options.optimizer](model.parameters(), learning_rate)
    steps = options.steps or (options.epochs or 1) * len(batches)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    device = torch.device(options.device)
    memory, seconds, losses = StepMemory(device, optimizer), [], []
    progress = tqdm(total=steps, unit="step", mininterval=1)
    while len(losses) < steps:
        for batch in batches:
            if len(losses) == steps:
                break
            inputs = {name: tensor.to(device) for name, tensor in to_inputs(batch).items()}
            memory.begin()
            start = time.perf_counter()
            loss = model(**inputs).loss
            memory.after_forward()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            seconds.append(time.perf_counter() - start)
            memory.end()
            optimizer.zero_grad()
            progress.set_postfix(loss=f"{statistics.mean(losses[-20:]):.3f}", refresh=False)
            progress.update()
    progress.close()
    return {
        "steps": steps,
        "epochs": steps / len(batches),
        "loss": statistics.mean(losses[-20:]),
        "step_seconds": statistics.median(seconds),
        "first_step_seconds": seconds[0],
        **memory.result(),
    }


def save_pictures(model: nn.Module, data: TensorDataset, to_inputs: ToInputs, options: argparse.Namespace) -> None:
    """The memory of one more step, and which layers trained when."""
    device = torch.device(options.device)
    batch = next(iter(DataLoader(data, batch_size=options.batch)))
    inputs = {name: tensor.to(device) for name, tensor in to_inputs(batch).items()}
    model.zero_grad()
    with MemoryTimeline(device) as timeline:
        timeline.mark("forward")
        loss = model(**inputs).loss
        timeline.mark("backward")
        loss.backward()
    options.plot.mkdir(parents=True, exist_ok=True)
    slimfit_fx.plot_memory(timeline.samples, timeline.marks).savefig(options.plot / "memory.png", dpi=150)
    if not (options.baseline or options.eager_baseline):
        slimfit_fx.plot_history(model).savefig(options.plot / "history.png", dpi=150)


@torch.no_grad()
def accuracy(model: nn.Module, data: TensorDataset, to_inputs: ToInputs, device: torch.device) -> float:
    """The part of `data` that the model, in eval mode, puts into the right class."""
    model.eval()
    hits = 0
    for batch in DataLoader(data, batch_size=128):
        inputs = to_inputs(batch)
        labels = inputs.pop("labels")
        logits = model(**{name: tensor.to(device) for name, tensor in inputs.items()}).logits
        hits += int((logits.argmax(-1).cpu() == labels).sum())
    model.train()
    return hits / len(data)
