"""Measures one cell in this process, a method on a model in a setting, and prints one JSON line.

    python -m benchmarks.measure balanced --model bert4 --optimizer adamw --batch 32
    python -m benchmarks.measure balanced --model bert4 --config num_hidden_layers=8 --option freeze_rate=0.5

Resident memory is only meaningful when freed memory goes back at once, and a first step only when nothing is cached:
`run.py` sees to both in the processes that it starts.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

import slimfit_fx
from examples.shared.memory import PeakMemory
from examples.shared.optimizers import OPTIMIZERS
from examples.shared.options import option

from . import floor, methods, models

WARM_UP = 2
PRECISIONS = ("fp32", "tf32", "bf16")
LEARNING_RATE = 1e-4


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The cell's figures: bytes, seconds, and how many graphs were compiled.

    `saved_bytes` is what is in use after a forward, `peak_bytes` the most that is in use during a step, both above
    what the step began with; `total_bytes` adds the weights and the optimizer states of that moment.
    `optimizer_bytes_to_come` are the states of layers that have not trained when all is measured. `predicted_bytes` is
    what the report says is saved; `flops_left` a floor of the time for matrix products. Bytes are medians over the
    steps; `_max`: of the step that took most, for instance because it trained a large embedding.
    """
    torch.manual_seed(0)
    device = torch.device(options.device)
    if options.precision == "tf32":
        torch.set_float32_matmul_precision("high")
    model, inputs = models.build(options.model, options.batch, options.length, dict(options.config))
    model = methods.prepare(model.to(device), options.method, **dict(options.option))
    inputs = {name: value.to(device) for name, value in inputs.items()}
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = OPTIMIZERS[options.optimizer](
        model.parameters() if options.method == "lisa" else parameters, LEARNING_RATE
    )
    autocast = torch.autocast(device.type, torch.bfloat16) if options.precision == "bf16" else nullcontext()
    weight_bytes = tensor_bytes([*model.parameters(), *model.buffers()])
    memory = PeakMemory(device)
    slimfit = methods.is_slimfit(options.method)
    spent = _time_scheduler(slimfit_fx.scheduler(model)) if slimfit else [0.0]

    def step() -> dict[str, float]:
        gc.collect()
        spent[0] = 0.0
        held = weight_bytes + optimizer_bytes(optimizer)
        memory.start()
        start = time.perf_counter()
        with autocast:
            loss = model(**inputs).loss
        _synchronize(device)
        saved = memory.current()
        loss.backward()
        gradients = tensor_bytes(parameter.grad for parameter in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        _synchronize(device)
        seconds, peak = time.perf_counter() - start, memory.peak()
        # the gates are still those of this step
        return {
            "seconds": seconds,
            "scheduler_seconds": spent[0],
            "saved_bytes": saved,
            "predicted_bytes": slimfit_fx.report(model).saved_bytes_after if slimfit else 0,
            "flops_left": floor.flops_left(model) if slimfit else 1.0,
            "gradient_bytes": gradients,
            "peak_bytes": peak,
            "total_bytes": held + peak,
        }

    first = step()["seconds"]
    if options.steps == 0:
        return {**vars(options), "first_step_seconds": first}
    for _ in range(WARM_UP):
        step()
    rows = [step() for _ in range(options.steps)]
    seconds = sorted(row["seconds"] for row in rows)
    figures = {
        "first_step_seconds": first,
        "step_seconds": statistics.median(seconds),
        "step_seconds_spread": [seconds[0], seconds[-1]],
        "scheduler_seconds": statistics.mean(row["scheduler_seconds"] for row in rows),
        "weight_bytes": weight_bytes,
        "gradient_bytes": max(row["gradient_bytes"] for row in rows),
        "optimizer_bytes": optimizer_bytes(optimizer),
        "saved_bytes": statistics.median(row["saved_bytes"] for row in rows),
        "saved_bytes_max": max(row["saved_bytes"] for row in rows),
        "predicted_bytes": statistics.median(row["predicted_bytes"] for row in rows),
        "flops_left": statistics.mean(row["flops_left"] for row in rows),
        "peak_bytes": statistics.median(row["peak_bytes"] for row in rows),
        "peak_bytes_max": max(row["peak_bytes"] for row in rows),
        "total_bytes": statistics.median(row["total_bytes"] for row in rows),
        "total_bytes_max": max(row["total_bytes"] for row in rows),
        "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],
    }
    figures["transient_bytes"] = figures["peak_bytes"] - max(figures["saved_bytes"], figures["gradient_bytes"])
    if device.type == "cuda":
        figures["reserved_bytes"] = torch.cuda.max_memory_reserved(device)
    kept = methods.options(options.method, dict(options.option)).get("closed_state", "device") == "device"
    figures["optimizer_bytes_to_come"] = optimizer_bytes_to_come(optimizer, options.optimizer) if kept else 0
    return {**vars(options), **figures}


def tensor_bytes(tensors: Iterable[Tensor | None]) -> int:
    """Of tensors that share nothing; tensor subclasses by what they hold."""
    return sum(_nbytes(tensor) for tensor in tensors if tensor is not None)


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    states = (value for state in optimizer.state.values() for value in state.values())
    return tensor_bytes(value for value in states if isinstance(value, Tensor))


def optimizer_bytes_to_come(optimizer: torch.optim.Optimizer, kind: str) -> int:
    """What the states of the parameters that have not been trained yet will take, by training copies of them."""
    untrained = [p for group in optimizer.param_groups for p in group["params"] if p not in optimizer.state]
    copies = [nn.Parameter(torch.zeros_like(parameter)) for parameter in untrained]
    if not copies:
        return 0
    for copy in copies:
        copy.grad = torch.zeros_like(copy)
    other = OPTIMIZERS[kind](copies, LEARNING_RATE)
    other.step()
    return optimizer_bytes(other)


def _nbytes(tensor: Tensor) -> int:
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.numel() * tensor.element_size()
    names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    return sum(_nbytes(getattr(tensor, name)) for name in names)


def _time_scheduler(scheduler: slimfit_fx.Scheduler) -> list[float]:
    """A list whose one element grows by the host's time in the scheduler."""
    spent = [0.0]

    def timed(method: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            start = time.perf_counter()
            result = method(*arguments)
            spent[0] += time.perf_counter() - start
            return result

        return run

    for name in ("begin_forward", "before_optimizer_step", "after_optimizer_step"):
        setattr(scheduler, name, timed(getattr(scheduler, name)))
    return spent


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=methods.METHODS)
    parser.add_argument("--model", choices=models.MODELS, default="bert4")
    parser.add_argument("--batch", type=int, default=None, help="default: the model's")
    parser.add_argument("--length", type=int, default=None, help="tokens, or pixels a side; default: the model's")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="sgd")
    parser.add_argument("--config", action="append", default=[], type=option, metavar="FIELD=VALUE")
    parser.add_argument("--option", action="append", default=[], type=option, metavar="FIELD=VALUE")
    parser.add_argument("--steps", type=int, default=9, help="0: only the first, with its compilation")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    print(json.dumps(measure(parse())))
