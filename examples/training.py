"""What the examples share: options, an ordinary training loop, accuracy. Nothing in the loop knows of slimfit_fx."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from meter import MemoryTimeline, PeakMemory
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

import slimfit_fx

# From the tensors of a batch to the arguments of a transformers model, labels included.
ToInputs = Callable[[list[Tensor]], dict[str, Tensor]]
# From parameters and a learning rate; SGD has no states, so that a benchmark sees the activations.
OPTIMIZERS: Mapping[str, Callable[[Iterable[nn.Parameter], float], torch.optim.Optimizer]] = {
    "sgd": lambda parameters, rate: torch.optim.SGD(parameters, lr=rate),
    "adamw": lambda parameters, rate: torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01),
    "adamw8bit": lambda parameters, rate: _adamw8bit(parameters, rate),
}


def parser(description: str | None, epochs: int, learning_rate: float, baseline_learning_rate: float):
    """The options of every example; the learning rates are the ones tuned for the two kinds of run."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_method_options(options)
    options.add_argument("--freeze-rate", type=float, default=0.9)
    options.add_argument("--policy", default="update")
    options.add_argument("--mode", default="inductor", choices=["inductor", "eager"])
    options.add_argument(
        "--learning-rate",
        type=float,
        default=None,
        help=f"default: {learning_rate:g}, for the baselines {baseline_learning_rate:g}",
    )
    options.add_argument("--optimizer", default="adamw", choices=OPTIMIZERS, help="adamw8bit: needs torchao")
    options.add_argument("--plot", type=Path, default=None, help="save pictures of the run in this folder")
    options.add_argument("--epochs", type=int, default=epochs)
    options.add_argument("--steps", type=int, default=0, help="instead of whole epochs")
    options.add_argument("--batch", type=int, default=32)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--json", default=None, help="append the result to this file")
    options.set_defaults(learning_rates=(learning_rate, baseline_learning_rate))
    return options


def add_method_options(parser: argparse.ArgumentParser) -> None:
    """How the model is trained: with slimfit_fx and which of its options, or without."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--baseline", action="store_true", help="plain torch.compile, every layer trains")
    which.add_argument("--eager-baseline", action="store_true", help="no compiler, every layer trains")
    parser.add_argument("--preset", default="balanced")
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        type=option,
        help="any other field of slimfit_fx.Config, for example catch_up=0.5; may be repeated",
    )


def option(text: str) -> tuple[str, Any]:
    """A field of `slimfit_fx.Config` and its value, JSON or a bare word, from "field=value"."""
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def run(
    model: nn.Module, sets: Mapping[str, TensorDataset], to_inputs: ToInputs, options: argparse.Namespace
) -> dict[str, Any]:
    """Trains on `sets["train"]` and prints accuracy on the others, step time, peak memory and the report."""
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
            mode=options.mode,
            seed=options.seed,
            **dict(options.option),
        )
    result = train(model, sets["train"], to_inputs, options, learning_rate)
    for part in sets.keys() - {"train"}:
        result[f"{part}_accuracy"] = accuracy(model, sets[part], to_inputs, device)
    if not plain:
        print(slimfit_fx.report(model))
    if options.plot:
        save_pictures(model, sets["train"], to_inputs, options)
    print(
        f"\ntest accuracy {result['test_accuracy']:.2%}   step {result['step_seconds']:.3f} s   "
        f"peak over weights and data {result['peak_bytes'] / 2**20:.0f} MiB"
    )
    result = {**vars(options), "learning_rate": learning_rate, **result}
    if options.json:
        with Path(options.json).open("a") as file:
            file.write(json.dumps(result, default=str) + "\n")
    return result


def train(
    model: nn.Module, data: TensorDataset, to_inputs: ToInputs, options: argparse.Namespace, learning_rate: float
) -> dict[str, Any]:
    """The optimizer with linear decay; batches of one size, so that one graph serves them all."""
    order = torch.Generator().manual_seed(options.seed)
    batches = DataLoader(data, batch_size=options.batch, shuffle=True, drop_last=True, generator=order)
    optimizer = OPTIMIZERS[options.optimizer](model.parameters(), learning_rate)
    steps = options.steps or options.epochs * len(batches)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    device = torch.device(options.device)
    memory, seconds, losses = PeakMemory(device), [], []
    memory.start()
    progress = tqdm(total=steps, unit="step", mininterval=1)
    while len(losses) < steps:
        for batch in batches:
            if len(losses) == steps:
                break
            start = time.perf_counter()
            optimizer.zero_grad()
            inputs = {name: tensor.to(device) for name, tensor in to_inputs(batch).items()}
            loss = model(**inputs).loss
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            seconds.append(time.perf_counter() - start)
            progress.set_postfix(loss=f"{statistics.mean(losses[-20:]):.3f}", refresh=False)
            progress.update()
    progress.close()
    return {
        "steps": steps,
        "loss": statistics.mean(losses[-20:]),
        "step_seconds": statistics.median(seconds),
        "first_step_seconds": seconds[0],
        "peak_bytes": memory.peak(),
    }


def _adamw8bit(parameters: Iterable[nn.Parameter], rate: float) -> torch.optim.Optimizer:
    from torchao.optim import AdamW8bit

    return AdamW8bit(parameters, lr=rate, weight_decay=0.01)


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
