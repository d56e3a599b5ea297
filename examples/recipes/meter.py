"""Step times and peak memory of a run of transformers' Trainer."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from examples.shared.memory import PeakMemory


class StepMeter(TrainerCallback):
    """Seconds of each step, without the loading of its batch, and bytes above those at the beginning of training."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.peak_bytes = 0
        self._begin = 0.0

    def result(self) -> dict[str, Any]:
        return {
            "step_seconds": statistics.median(self.seconds),
            "first_step_seconds": self.seconds[0],
            "peak_bytes": self.peak_bytes,
        }

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._memory = PeakMemory(args.device)
        self._memory.start()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._begin = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.device.type == "cuda":
            torch.cuda.synchronize(args.device)
        self.seconds.append(time.perf_counter() - self._begin)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.peak_bytes = self._memory.peak()
