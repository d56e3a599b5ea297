"""The options of the programs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from .optimizers import OPTIMIZERS


def parser(
    description: str | None, learning_rate: float, baseline_learning_rate: float, compared_steps: int
) -> argparse.ArgumentParser:
    """The options of a program with a training loop of its own.

    Args:
        description: what `--help` prints first.
        learning_rate, baseline_learning_rate: tuned for slimfit_fx, and for training every layer.
        compared_steps: how long each run of `--compare` is, if nothing else is asked for.
    """
    options = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    which = add_method_options(options)
    which.add_argument("--compare", action="store_true", help="both torch.compile and slimfit_fx, and a table")
    options.add_argument("--freeze-rate", type=float, default=0.9)
    options.add_argument("--policy", default="update")
    options.add_argument("--regions", default="blocks", choices=["model", "blocks"])
    options.add_argument(
        "--learning-rate",
        type=float,
        default=None,
        help=f"default: {learning_rate:g}, for the baselines {baseline_learning_rate:g}",
    )
    options.add_argument("--plot", type=Path, default=None, help="save pictures of the run in this folder")
    options.add_argument("--epochs", type=int, default=0, help=f"default: 1; with --compare {compared_steps} steps")
    options.add_argument("--steps", type=int, default=0, help="instead of whole epochs")
    options.add_argument("--no-validation", action="store_true", help="score the test set only")
    add_loop_options(options, batch=32)
    options.set_defaults(learning_rates=(learning_rate, baseline_learning_rate), compared_steps=compared_steps)
    return options


def add_loop_options(parser: argparse.ArgumentParser, batch: int) -> None:
    """Those of the training loop that every program has; `batch` is the default."""
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--optimizer", default="fused-adamw", choices=OPTIMIZERS, help="adamw8bit: needs torchao")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mode", default="inductor", choices=["inductor", "eager"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", default=None, help="append the result to this file")


def add_method_options(parser: argparse.ArgumentParser) -> Any:
    """How the model is trained: with slimfit_fx and which of its options, or without; returns the group of methods."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--baseline", action="store_true", help="plain torch.compile, every layer trains")
    which.add_argument("--eager-baseline", action="store_true", help="no compiler, every layer trains")
    add_config_options(parser)
    return which


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """How slimfit_fx transforms the model: a preset, and any other field of its configuration."""
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
