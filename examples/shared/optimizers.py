"""Optimizers by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn

WEIGHT_DECAY = 0.01


def _adamw8bit(parameters: Iterable[nn.Parameter], rate: float) -> torch.optim.Optimizer:
    from torchao.optim import AdamW8bit

    return AdamW8bit(parameters, lr=rate, weight_decay=WEIGHT_DECAY)


# From parameters and a learning rate. SGD has no states, so a benchmark with it sees the activations alone; fused AdamW
# has no temporaries of the size of a weight.
OPTIMIZERS: Mapping[str, Callable[[Iterable[nn.Parameter], float], torch.optim.Optimizer]] = {
    "sgd": lambda parameters, rate: torch.optim.SGD(parameters, lr=rate),
    "adamw": lambda parameters, rate: torch.optim.AdamW(parameters, lr=rate, weight_decay=WEIGHT_DECAY),
    "fused-adamw": lambda parameters, rate: torch.optim.AdamW(
        parameters, lr=rate, weight_decay=WEIGHT_DECAY, fused=True
    ),
    "adamw8bit": _adamw8bit,
}
