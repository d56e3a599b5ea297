"""A callback for transformers' Trainer: the scheduler's state in the checkpoint, its figures in the log.

    trainer = Trainer(model=slimfit_fx.transform(model), ..., callbacks=[SlimFitCallback()])

Trainer works without it; a run that is resumed without it chooses its layers anew.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

import slimfit_fx
from slimfit_fx.errors import StateError


class SlimFitCallback(TrainerCallback, ExportableState):
    """Saves and restores the scheduler with Trainer's checkpoints, in `trainer_state.json`.

    Each log entry gets `slimfit/freeze_rate`, `slimfit/open_layers` and `slimfit/saved_bytes`; callbacks that stand
    behind this one see them, and `state.log_history` has them.

    Raises:
        StateError: training begins with a model that is not transformed, or resumes with a state of another model.
    """

    def __init__(self) -> None:
        self.scheduler_state: dict[str, Any] | None = None
        self._model: nn.Module | None = None

    def state(self) -> dict[str, Any]:
        """What Trainer writes into the checkpoint."""
        if self._model is not None:
            self.scheduler_state = slimfit_fx.scheduler(self._model).state_dict()
        return {"args": {}, "attributes": {"scheduler_state": self.scheduler_state}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model: nn.Module = kwargs["model"]
        scheduler, self._model = slimfit_fx.scheduler(model), model
        if not state.global_step:
            return
        restored: Any = state.stateful_callbacks  # a mapping from class name to what `state` returned, when loaded
        saved = restored.get(type(self).__name__, {}).get("attributes", {}).get("scheduler_state")
        if saved is None:
            raise StateError(
                "the checkpoint has no scheduler state: it was saved without SlimFitCallback. Resume without the "
                "callback to choose the layers anew."
            )
        scheduler.load_state_dict(saved)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._model is None or "loss" not in kwargs["logs"]:
            return
        gates = slimfit_fx.gates(self._model)
        figures = {
            "slimfit/freeze_rate": slimfit_fx.scheduler(self._model).freeze_rate,
            "slimfit/open_layers": len(gates.open),
            "slimfit/saved_bytes": slimfit_fx.report(self._model).saved_bytes_after,
        }
        kwargs["logs"].update(figures)
        state.log_history[-1].update(figures)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.state()
        self._model = None
