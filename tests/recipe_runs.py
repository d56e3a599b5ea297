"""Tiny models and data for the tests of the recipes, and short runs of them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image

# skips the tests that import this module, where the recipes' packages are missing
datasets = pytest.importorskip("datasets")
pytest.importorskip("sklearn")

from examples.recipes import config as recipe_config  # noqa: E402
from examples.recipes import run as recipe  # noqa: E402

WORDS = ["good", "bad", "film", "song", "who", "wrote", "sang", "the", "a", "answer", "maria", "paul", "?", "."]


def texts(name: str, rows: int = 64) -> dict[str, list]:
    """Rows with the columns of a text recipe: the first word of the first text decides the label."""
    settings = recipe_config.load_recipe(name)
    first, *second = [column for role, column in settings.columns.items() if role != "label"]
    good = [i % 2 for i in range(rows)]
    table = {first: [f"{('bad', 'good')[label]} film" for label in good]}
    table |= {column: ["the song"] * rows for column in second}
    return {**table, "label": [2.5 * label for label in good] if name == "glue-stsb" else good}


def questions(rows: int = 24) -> dict[str, list]:
    """Every second question has an answer; contexts take several windows of 24 tokens."""
    context = "the film . " * 8 + "maria wrote the song . " + "the film . " * 4
    found = {"text": ["maria"], "answer_start": [context.index("maria")]}
    nothing: dict[str, list] = {"text": [], "answer_start": []}
    return {
        "question": ["who wrote the song ?", " who sang ?"] * (rows // 2),
        "context": [context] * rows,
        "answers": [found, nothing] * (rows // 2),
    }


def images(rows: int, image: str = "img", label: str = "label") -> dict[str, list]:
    """Dark and bright squares."""
    pictures = [Image.new("RGB", (20, 16), (255 * (i % 2),) * 3) for i in range(rows)]
    return {image: pictures, label: [i % 2 for i in range(rows)]}


def saved(folder: Path, train: dict[str, list], **evaluation: dict[str, list]) -> str:
    parts = {"train": train, **evaluation}
    datasets.DatasetDict({name: datasets.Dataset.from_dict(rows) for name, rows in parts.items()}).save_to_disk(folder)
    return str(folder)


def variant(folder: Path, name: str, **fields) -> str:
    """The path of a shipped recipe with some fields changed."""
    path = folder / f"{name}.json"
    path.write_text(json.dumps({**dataclasses.asdict(recipe_config.load_recipe(name)), **fields}))
    return str(path)


def make_bert(folder: Path) -> str:
    """Saves a BERT of one layer and its tokenizer."""
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    config = transformers.BertConfig(
        vocab_size=len(WORDS) + 5, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(folder)
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return str(folder)


def make_vit(folder: Path) -> str:
    """Saves a ViT of one layer and its image processor."""
    config = transformers.ViTConfig(
        image_size=16, patch_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    torch.manual_seed(0)
    transformers.ViTModel(config).save_pretrained(folder)
    transformers.ViTImageProcessorPil().save_pretrained(folder)
    return str(folder)


def run(name: str, folder: Path, data: str, model: str, *options: str, **fields) -> dict:
    """A short run of a recipe, some fields changed; in the interpreter and without codecs: that is captured soonest."""
    command = [variant(folder, name, **fields), "--data", data, "--model", model]
    return recipe.main([*command, "--option=mode=eager", "--preset=exact", "--steps=2", "--batch=8", *options])
