"""Question answering: contexts cut into windows that overlap, spans to train on, answers from the windows' logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import AutoModelForQuestionAnswering, AutoTokenizer, Trainer

from .answers import OUTSIDE, Window, find_answer, find_tokens, score_answers
from .config import Recipe
from .data import Data
from .tasks import Scores, Task, pretrained, pretrained_model

# What a window has that is not for the model.
KEYS = ["row", "places"]


def question_task(recipe: Recipe, data: Data, name: str) -> Task:
    """A span of a context, or none, for a question."""
    check_answers(data)
    tokenizer = pretrained(AutoTokenizer, name)
    if not tokenizer.is_fast:
        raise SystemExit(f"{name}: question answering needs a tokenizer that tells each token's place in the text")
    model = pretrained_model(AutoModelForQuestionAnswering, name)

    def cut(rows: Mapping[str, list[Any]], indices: list[int]) -> dict[str, Any]:
        """Windows of a batch of rows; `row` says of which row of the split each one is."""
        windows = tokenizer(
            [question.strip() for question in rows["question"]],
            rows["context"],
            truncation="only_second",
            padding="max_length",
            max_length=recipe.length,
            stride=recipe.stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        sources, offsets = windows.pop("overflow_to_sample_mapping"), windows.pop("offset_mapping")
        places = [
            [place if part == 1 else OUTSIDE for place, part in zip(offsets[i], windows.sequence_ids(i), strict=True)]
            for i in range(len(sources))
        ]
        return {**windows, "row": [indices[source] for source in sources], "places": places}

    def cut_and_mark(rows: Mapping[str, list[Any]], indices: list[int]) -> dict[str, Any]:
        windows = cut(rows, indices)
        answers = dict(zip(indices, rows["answers"], strict=True))
        spans = [mark(places, answers[row]) for row, places in zip(windows["row"], windows["places"], strict=True)]
        positions = {"start_positions": [start for start, _ in spans], "end_positions": [end for _, end in spans]}
        return {**{name: values for name, values in windows.items() if name not in KEYS}, **positions}

    options: dict[str, Any] = dict(batched=True, with_indices=True, remove_columns=data["train"].column_names)
    train = data["train"].map(cut_and_mark, **options).with_format("torch")
    windows = {split: part.map(cut, **options) for split, part in data.items() if split != "train"}

    def evaluate(trainer: Trainer) -> Scores:
        scores: Scores = {}
        for split, part in windows.items():
            answers = answer(trainer, data[split], part)
            scores[split] = score_answers(answers, [row["text"] for row in data[split]["answers"]])
        return scores

    return Task(model, train, evaluate, tokenizer)


def mark(places: list[tuple[int, int]], answers: Mapping[str, list[Any]]) -> tuple[int, int]:
    """Where in a window the first reference answer starts and ends; (0, 0) if it has none."""
    if not answers["text"]:
        return 0, 0
    begin = answers["answer_start"][0]
    return find_tokens(places, begin, begin + len(answers["text"][0]))


def answer(trainer: Trainer, rows: Dataset, windows: Dataset) -> list[str]:
    """An answer for each row."""
    inputs = windows.remove_columns(KEYS).with_format("torch")
    starts, ends = trainer.predict(inputs).predictions[:2]  # type: ignore[arg-type]
    by_row: dict[int, list[Window]] = {}
    for row, places, start, end in zip(windows["row"], windows["places"], starts, ends, strict=True):
        by_row.setdefault(row, []).append(Window(start, end, np.asarray(places)))
    return [find_answer(context, by_row[row]) for row, context in enumerate(rows["context"])]


def check_answers(data: Data) -> None:
    feature = data["train"].features["answers"]
    if not {"text", "answer_start"} <= set(feature if isinstance(feature, dict) else ()):
        raise SystemExit(
            f"answers have a list `text` and a list `answer_start`, both empty where there is none; got {feature}. "
            "A .csv file cannot hold them: use .json or .parquet."
        )
