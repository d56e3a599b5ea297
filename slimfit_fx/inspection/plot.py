"""Pictures of a run, with matplotlib (the extra `plot`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from slimfit_fx.errors import StateError
from slimfit_fx.runtime.registry import started_session

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Scores above are those of layers that had no turn yet.
_MEASURED = 1e8


def plot_history(model: nn.Module, last: int = 500) -> Figure:
    """A map of layers and steps: open gates as dots over the scores that they were chosen by.

    Args:
        model: transformed, after some training steps.
        last: how many steps are shown, at most.

    Returns:
        A matplotlib figure; `.savefig("history.png")` writes it.

    Raises:
        StateError: there is no step to show yet.
        ImportError: matplotlib is missing.
    """
    figure_class, log_norm = _matplotlib()
    choices = list(started_session(model).scheduler.history)[-last:]
    if len(choices) < 2:
        raise StateError("nothing to plot yet: train for a step or more first")
    names = started_session(model).gates.names
    rows = {name: row for row, name in enumerate(names)}
    figure = figure_class(figsize=(min(16, 4 + len(choices) / 40), 1.5 + 0.16 * len(names)), layout="constrained")
    axes = figure.subplots()
    scores = [[_shown(choice.scores[row]) for choice in choices] for row in range(len(names))]
    first, end = choices[0].step, choices[-1].step
    known = [score for row in scores for score in row if score == score]
    norm = log_norm(min(known), max(known)) if known and min(known) < max(known) else None
    image = axes.imshow(
        scores, aspect="auto", extent=(first - 0.5, end + 0.5, len(names) - 0.5, -0.5), cmap="Blues", norm=norm
    )
    if known:
        figure.colorbar(image, ax=axes, label="score")
    dots = [(choice.step, rows[name]) for choice in choices for name in choice.open]
    axes.scatter([step for step, _ in dots], [row for _, row in dots], s=6, marker="s", c="tab:orange", label="open")
    axes.set_yticks(range(len(names)), names, fontsize=6)
    axes.set_xlabel("step")
    axes.legend(loc="upper right")
    return figure


def plot_memory(samples: Sequence[tuple[float, int]], marks: Sequence[tuple[float, str]] = ()) -> Figure:
    """The memory of a training step over time.

    Args:
        samples: (seconds, bytes over weights) in order of time.
        marks: (seconds, what begins then), for example ``(0.8, "backward")``.
    """
    if not samples:
        raise StateError("nothing to plot: no sample of the step's memory")
    figure_class, _ = _matplotlib()
    figure = figure_class(figsize=(8, 3), layout="constrained")
    axes = figure.subplots()
    seconds, nbytes = zip(*samples, strict=True)
    axes.fill_between(seconds, [value / 2**20 for value in nbytes], step="post", alpha=0.5)
    for start, text in marks:
        axes.axvline(start, color="tab:orange", linewidth=1)
        axes.text(start, axes.get_ylim()[1], f" {text}", va="top", fontsize=8)
    axes.set_xlabel("seconds")
    axes.set_ylabel("MiB over weights")
    axes.set_ylim(bottom=0)
    return figure


def _shown(score: float) -> float:
    return score if 0 < score < _MEASURED else float("nan")


def _matplotlib() -> tuple[Any, Any]:
    try:
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'slimfit_fx[plot]'") from error
    return Figure, LogNorm
