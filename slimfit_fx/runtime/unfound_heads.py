"""Says, once, that `outputs="loss"` leaves nothing out."""

from __future__ import annotations

import warnings

from slimfit_fx.config import Config
from slimfit_fx.errors import SlimFitWarning
from slimfit_fx.graph.plan import Plan


class UnfoundHeads:
    """Watches whether a head and its loss were found where the configuration counts on it."""

    def __init__(self, config: Config) -> None:
        self._waiting = config.outputs == "loss" and "chunk_loss" not in config.disable_passes

    def check(self, plan: Plan) -> None:
        """Warns if the forward that `plan` is of has whole logits, or none."""
        if self._waiting and not plan.heads:
            warnings.warn(
                "outputs='loss' leaves nothing out: no graph of this forward has a linear layer, with at least four "
                "times as many outputs as inputs, whose result is read by cross_entropy alone. Pass labels, so that "
                "the model makes the loss, and let nothing else in it read the logits; slimfit_fx.explain(model) shows "
                "graph breaks.",
                SlimFitWarning,
                stacklevel=2,
            )
        self._waiting = False
