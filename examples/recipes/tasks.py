"""What each kind of task makes of its data: a model, rows of tensors to train on, and a way to score the result."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from scipy import stats
from sklearn import metrics
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, Trainer

from .config import Recipe
from .data import Data, class_count, first_line, number_count

# By split and metric; shares, not percents.
Scores = dict[str, dict[str, float]]

METRICS: dict[str, Callable[[np.ndarray, np.ndarray], Any]] = {
    "accuracy": metrics.accuracy_score,
    "f1": metrics.f1_score,
    "matthews": metrics.matthews_corrcoef,
    "pearson": lambda labels, outputs: stats.pearsonr(labels, outputs)[0],
    "spearman": lambda labels, outputs: stats.spearmanr(labels, outputs)[0],
}


@dataclass
class Task:
    """`train` has rows of equal shapes, so that one graph serves all batches; `processor` is saved with the model."""

    model: PreTrainedModel
    train: Dataset
    evaluate: Callable[[Trainer], Scores]
    processor: Any


def text_task(recipe: Recipe, data: Data, name: str) -> Task:
    """A class, or a number, for a sentence or a pair."""
    regression = recipe.kind == "text regression"
    outputs = number_count(data) if regression else class_count(data)
    tokenizer = pretrained(AutoTokenizer, name)
    model = pretrained_model(
        AutoModelForSequenceClassification,
        name,
        num_labels=outputs,
        # a model that has to find out its problem type does so in its first forward, and is compiled twice
        problem_type="regression" if regression else "single_label_classification",
        ignore_mismatched_sizes=True,
    )

    def encode(rows: Mapping[str, list[Any]]) -> dict[str, Any]:
        texts = [rows[role] for role in ("text", "second_text") if role in recipe.columns]
        tokens = tokenizer(*texts, padding="max_length", truncation=True, max_length=recipe.length)
        return {**tokens, "labels": [float(label) for label in rows["label"]] if regression else rows["label"]}

    rows = {
        split: part.map(encode, batched=True, remove_columns=part.column_names).with_format("torch")
        for split, part in data.items()
    }
    return Task(model, rows["train"], lambda trainer: score(trainer, rows, recipe.metrics), tokenizer)


def score(trainer: Trainer, data: Data, names: Iterable[str]) -> Scores:
    """Metrics on all splits but `train`, of the class with the largest logit, or of a single output as a number."""
    scores: Scores = {}
    for split in [split for split in data if split != "train"]:
        result = trainer.predict(data[split])  # type: ignore[arg-type]  (a datasets.Dataset is one to Trainer)
        outputs = np.asarray(result.predictions)
        values = outputs[:, 0] if outputs.shape[1] == 1 else outputs.argmax(1)
        scores[split] = {name: float(METRICS[name](np.asarray(result.label_ids).ravel(), values)) for name in names}
    return scores


def pretrained_model(loader: Any, name: str, **options: Any) -> PreTrainedModel:
    """In float32, whatever the weights are stored in: autocast lowers the precision of a training run."""
    return pretrained(loader, name, dtype=torch.float32, **options)


def pretrained(loader: Any, name: str, **options: Any) -> Any:
    """`loader.from_pretrained`, with a way out where the name leads nowhere."""
    try:
        return loader.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        raise SystemExit(
            f"{name} cannot be loaded by {loader.__name__}: {first_line(error)}\n"
            "Pass a local copy, as save_pretrained writes it, with --model FOLDER."
        ) from error
