"""The data of a recipe: from the hub, or from a local folder, with columns named by what they are to the task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, load_dataset, load_from_disk

from .config import Recipe

# By split.
Data = dict[str, Dataset]

FORMATS = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json"}
LAYOUTS = (
    "a folder is what DatasetDict.save_to_disk wrote, or has the files train.* and validation.* "
    "(.parquet, .csv, .json or .jsonl), or, for images, a subfolder for each class in train/ and in validation/"
)


def load_data(recipe: Recipe, folder: Path | None) -> Data:
    """The split `train` and those to evaluate on, with the columns of the recipe, named by role."""
    data = read_hub(recipe) if folder is None else read_folder(recipe, folder)
    evaluation = recipe.evaluation
    if folder is not None and not set(evaluation) & set(data):
        evaluation = ["validation"]  # one's own files need not repeat the hub's names of splits
    for split in ("train", *evaluation):
        if split not in data:
            raise SystemExit(f"{folder or recipe.data} has no split {split!r}; it has {', '.join(data)}")
    return {split: by_role(data[split], split, recipe.columns) for split in ("train", *evaluation)}


def read_hub(recipe: Recipe) -> Data:
    try:
        return splits(load_dataset(recipe.data, recipe.subset))
    except (OSError, ValueError) as error:
        raise SystemExit(
            f"{recipe.data} cannot be loaded: {first_line(error)}\n"
            f"Pass a local copy with --data FOLDER; {LAYOUTS}. A data set with terms of use needs `hf auth login`."
        ) from error


def read_folder(recipe: Recipe, folder: Path) -> Data:
    if not folder.is_dir():
        raise SystemExit(f"--data {folder}: there is no such folder")
    if (folder / "dataset_dict.json").exists():
        return splits(load_from_disk(str(folder)))
    files = split_files(folder, {"train", "validation", *recipe.evaluation})
    if files:
        formats = {FORMATS[Path(path).suffix] for paths in files.values() for path in paths}
        if len(formats) > 1:
            raise SystemExit(f"--data {folder}: the splits are in several formats, {sorted(formats)}: leave one")
        # without this, the words "None" and "NA" in a sentence's place would be read as no sentence
        options: dict[str, Any] = {"keep_default_na": False} if formats == {"csv"} else {}
        return splits(load_dataset(formats.pop(), data_files=files, **options))
    if recipe.kind == "image classification" and (folder / "train").is_dir():
        images = splits(load_dataset("imagefolder", data_dir=str(folder)))
        names = {role: name for role, name in recipe.columns.items() if role != name}
        return {split: part.rename_columns(names) for split, part in images.items()}
    raise SystemExit(f"--data {folder}: no data found; {LAYOUTS}")


def splits(loaded: Any) -> Data:
    return {str(split): part for split, part in loaded.items()}


def split_files(folder: Path, names: set[str]) -> dict[str, list[str]]:
    """Files by split: train.parquet, or the hub's train-00000-of-00002.parquet."""
    files: dict[str, list[str]] = {}
    for path in sorted(folder.iterdir()):
        split = path.stem.split("-")[0]
        if path.suffix in FORMATS and split in names:
            files.setdefault(split, []).append(str(path))
    return files


def by_role(data: Dataset, split: str, columns: dict[str, str]) -> Dataset:
    """The columns that the task reads, under the names of their roles."""
    for role, column in columns.items():
        if column not in data.column_names:
            raise SystemExit(
                f"split {split!r} has no column {column!r} for {role}; it has {', '.join(data.column_names)}. "
                "Rename one, or copy the recipe's JSON file, change its columns, and pass its path."
            )
    renamed = {column: role for role, column in columns.items() if column != role}
    return data.select_columns(list(columns.values())).rename_columns(renamed)


def class_count(data: Data) -> int:
    """How many classes the labels have; raises if they are no class numbers."""
    labels = {value for split in data.values() for value in split.unique("label")}
    wrong = [value for value in labels if not isinstance(value, int) or value < 0]
    if wrong:
        raise SystemExit(f"labels are the numbers of classes, from 0; there are {wrong[:3]} (-1 often means hidden)")
    feature = data["train"].features["label"]
    return len(feature.names) if isinstance(feature, ClassLabel) else max(labels) + 1


def number_count(data: Data) -> int:
    """How many numbers a label has: one; raises if it is no number."""
    dtype = data["train"].features["label"].dtype
    if not dtype.startswith(("float", "int", "uint")):
        raise SystemExit(f"labels of a regression are numbers; the column for label has {dtype}s")
    return 1


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
