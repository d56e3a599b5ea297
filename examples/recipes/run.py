"""Fine-tunes a model by one of the paper's recipes, with transformers' Trainer.

    python -m examples.recipes.run glue-cola                       data and model from the hub
    python -m examples.recipes.run glue-cola --baseline            plain torch.compile
    python -m examples.recipes.run glue-cola --eager-baseline      neither
    python -m examples.recipes.run cifar10 --data FOLDER --model FOLDER       without a hub

The recipes are the files of examples/recipes/configs; the path of a JSON file of the same form will do as well.
docs/recipes.md says more.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import platform
import tempfile
from typing import Any

import torch
from transformers import Trainer, TrainingArguments, set_seed

import slimfit_fx
from slimfit_fx.integrations import SlimFitCallback

from .config import Recipe, load_recipe
from .data import load_data
from .images import image_task
from .meter import StepMeter
from .options import find_checkpoint, parse, training_arguments
from .questions import question_task
from .tasks import Task, text_task

TASKS = {
    "text classification": text_task,
    "text regression": text_task,
    "question answering": question_task,
    "image classification": image_task,
}
PACKAGES = ("slimfit_fx", "torch", "transformers", "accelerate", "datasets")


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = parse(arguments, __doc__)
    recipe = load_recipe(options.recipe, batch=options.batch, learning_rate=options.learning_rate)
    checkpoint = find_checkpoint(options)
    with tempfile.TemporaryDirectory() as folder:
        trainer_arguments = training_arguments(recipe, options, options.output or folder)
        set_seed(options.seed)
        data = load_data(recipe, options.data)
        task = TASKS[recipe.kind](recipe, data, options.model or recipe.model)
        if len(task.train) < recipe.batch:
            raise SystemExit(f"{len(task.train)} rows do not fill a batch of {recipe.batch}: pass a smaller --batch")
        result = run(recipe, task, trainer_arguments, options, checkpoint)
    print(json.dumps(result["metrics"], indent=2))
    print(f"step {result['step_seconds']:.3f} s   peak over weights {result['peak_bytes'] / 2**20:.0f} MiB")
    if options.json:
        with options.json.open("a") as file:
            file.write(json.dumps(result, default=str) + "\n")
    return result


def run(
    recipe: Recipe, task: Task, arguments: TrainingArguments, options: argparse.Namespace, checkpoint: str | None
) -> dict[str, Any]:
    """Trains and evaluates; with --output, Trainer's checkpoints and the model are kept there."""
    model = task.model.to(arguments.device)  # type: ignore[arg-type]  (a wrapped method)
    slim = not (options.baseline or options.eager_baseline)
    if slim:
        transform(model, recipe, options)
    elif options.baseline:
        model.compile()
    meter = StepMeter()
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=task.train,
        processing_class=task.processor,
        callbacks=[meter, SlimFitCallback()] if slim else [meter],
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    if options.output:
        trainer.save_model(str(options.output))
    arguments.dataloader_drop_last = False  # in evaluation every row counts
    return {
        "recipe": options.recipe,
        "method": "slimfit_fx" if slim else "torch.compile" if options.baseline else "eager",
        "settings": dataclasses.asdict(recipe),
        "options": {key: value for key, value in vars(options).items() if key != "recipe"},
        "model": options.model or recipe.model,
        "data": str(options.data or recipe.data),
        "seed": options.seed,
        "device": device_name(arguments.device),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "steps": trainer.state.global_step,
        **meter.result(),
        **(slimfit_figures(model) if slim else {}),
        "metrics": task.evaluate(trainer),
    }


def transform(model: torch.nn.Module, recipe: Recipe, options: argparse.Namespace) -> None:
    """slimfit_fx with the recipe's freezing; --option goes before it."""
    fields: dict[str, Any] = {
        "preset": options.preset,
        "freeze_rate": recipe.freeze_rate,
        "always_open": None if recipe.head_always_open else (),  # None is the head
        "seed": options.seed,
    }
    try:
        slimfit_fx.transform(model, **{**fields, **dict(options.option)})
    except slimfit_fx.SlimFitError as error:
        raise SystemExit(str(error)) from error


def slimfit_figures(model: torch.nn.Module) -> dict[str, Any]:
    """Prints the report; what of it goes into the result."""
    report = slimfit_fx.report(model)
    print(report)
    return {"saved_bytes": report.saved_bytes_after, "graphs": len(slimfit_fx.graphs(model))}


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU {platform.machine()}, {torch.get_num_threads()} threads"


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
