"""The options of `run.py`, and what they and a recipe make of transformers' `TrainingArguments`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from examples.shared.options import add_method_options

from .config import Recipe, recipe_names


def parse(arguments: list[str] | None, description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help=f"one of {', '.join(recipe_names())}, or the path of a .json file")
    parser.add_argument("--data", type=Path, default=None, help="a local folder instead of the hub")
    parser.add_argument("--model", default=None, help="another name or folder for from_pretrained")
    add_method_options(parser)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=0, help="instead of the recipe's epochs")
    parser.add_argument("--batch", type=int, default=None, help="instead of the recipe's")
    parser.add_argument("--learning-rate", type=float, default=None, help="instead of the recipe's")
    parser.add_argument("--workers", type=int, default=0, help="processes that load batches; images want some")
    parser.add_argument("--output", type=Path, default=None, help="folder for checkpoints and the trained model")
    parser.add_argument("--save-steps", type=int, default=500, help="steps from checkpoint to checkpoint")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --output")
    parser.add_argument("--json", type=Path, default=None, help="append the result to this file")
    return parser.parse_args(arguments)


def training_arguments(recipe: Recipe, options: argparse.Namespace, folder: str | Path) -> TrainingArguments:
    if options.precision == "fp16" and not torch.cuda.is_available():
        raise SystemExit("--precision fp16 needs a GPU; on a CPU take bf16")
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=recipe.epochs,
        max_steps=options.steps or -1,
        per_device_train_batch_size=recipe.batch,
        per_device_eval_batch_size=recipe.batch,
        learning_rate=recipe.learning_rate,
        optim=recipe.optimizer,
        lr_scheduler_type=recipe.schedule,
        warmup_steps=recipe.warmup_steps,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        bf16=options.precision == "bf16",
        fp16=options.precision == "fp16",
        use_cpu=not torch.cuda.is_available(),
        seed=options.seed,
        dataloader_drop_last=True,  # batches of one size, so that one graph serves them all
        dataloader_num_workers=options.workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        save_strategy="steps" if options.output else "no",
        save_steps=options.save_steps,
        save_total_limit=2,
        logging_steps=50,
        report_to=[],
    )
    if arguments.n_gpu > 1:
        raise SystemExit("several GPUs are visible and a recipe uses one: set CUDA_VISIBLE_DEVICES=0")
    return arguments


def find_checkpoint(options: argparse.Namespace) -> str | None:
    """The newest checkpoint in --output with --resume; without, there must be none."""
    found = get_last_checkpoint(str(options.output)) if options.output and options.output.is_dir() else None
    if options.resume and found is None:
        raise SystemExit(f"--resume: no checkpoint in --output {options.output}: leave out --resume to begin")
    if found is None:
        return None
    if not options.resume:
        raise SystemExit(f"{found} is of an earlier run: pass --resume to go on with it, or --output another folder")
    state = TrainerState.load_from_json(str(Path(found) / "trainer_state.json"))
    if state.global_step >= (options.steps or state.max_steps):
        raise SystemExit(f"{found} is the end of its run: pass --output another folder, or more --steps")
    return found
