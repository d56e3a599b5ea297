"""What a recipe is: one JSON file in `configs/`, or one of your own."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent / "configs"


@dataclass(frozen=True)
class Kind:
    """What a kind of task reads and reports: columns by role, fields of `Recipe` that it cannot do without, metrics."""

    roles: tuple[str, ...]
    sizes: tuple[str, ...]
    metrics: tuple[str, ...]
    optional_roles: tuple[str, ...] = ()


KINDS = {
    "text classification": Kind(("text", "label"), ("length",), ("accuracy", "f1", "matthews"), ("second_text",)),
    "text regression": Kind(("text", "label"), ("length",), ("pearson", "spearman"), ("second_text",)),
    "question answering": Kind(("question", "context", "answers"), ("length", "stride"), ("exact_match", "f1")),
    "image classification": Kind(("image", "label"), ("image_size",), ("accuracy",)),
}


@dataclass(frozen=True)
class Recipe:
    """A task and its hyperparameters.

    Attributes:
        kind: one of `KINDS`.
        model: a name on the hub, or a folder, for `from_pretrained`.
        data: a name on the hub for `load_dataset`, with `subset` if the data set has several.
        evaluation: the splits that are scored after training.
        columns: from the roles of the kind to what the data set calls them.
        head_always_open: whether the classification head is trained at every step, or takes turns like any layer.
        optimizer, schedule: `optim` and `lr_scheduler_type` of transformers' `TrainingArguments`.
        max_grad_norm: 0 clips nothing.
        length: tokens that a text, or a window of one, is padded or cut to.
        stride: tokens that neighbouring windows of one context share.
        image_size: pixels of a side.
    """

    kind: str
    model: str
    data: str
    evaluation: list[str]
    columns: dict[str, str]
    metrics: list[str]
    freeze_rate: float
    head_always_open: bool
    learning_rate: float
    batch: int
    epochs: int
    optimizer: str
    schedule: str
    warmup_steps: int
    weight_decay: float
    max_grad_norm: float
    subset: str | None = None
    length: int = 0
    stride: int = 0
    image_size: int = 0


def recipe_names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def load_recipe(name: str, **overrides: object) -> Recipe:
    """A shipped recipe by its name, or one's own by its path; `overrides` that are None change nothing."""
    path = Path(name) if name.endswith(".json") else FOLDER / f"{name}.json"
    if not path.is_file():
        raise SystemExit(
            f"there is no recipe {name!r}: choose one of {', '.join(recipe_names())}, or pass the path of a .json file"
        )
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise SystemExit(f"{path} is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise SystemExit(f"{path}: a recipe is a JSON object, got {type(fields).__name__}")
    known = dataclasses.fields(Recipe)
    unknown = fields.keys() - {field.name for field in known}
    missing = {field.name for field in known if field.default is dataclasses.MISSING} - fields.keys()
    if unknown or missing:
        raise SystemExit(
            f"{path}: unknown fields {sorted(unknown)}, missing fields {sorted(missing)}; "
            f"a recipe has {', '.join(field.name for field in known)}"
        )
    recipe = Recipe(**{**fields, **{key: value for key, value in overrides.items() if value is not None}})
    _check(recipe, path)
    return recipe


def _check(recipe: Recipe, path: Path) -> None:
    """Raises for what would otherwise come to light after loading, or as an error of another library."""
    if recipe.kind not in KINDS:
        raise SystemExit(f"{path}: kind {recipe.kind!r} is unknown: choose one of {', '.join(KINDS)}")
    kind = KINDS[recipe.kind]
    if not set(kind.roles) <= recipe.columns.keys() <= {*kind.roles, *kind.optional_roles}:
        raise SystemExit(
            f"{path}: columns of {recipe.kind} are {', '.join(kind.roles)}; "
            f"may be: {', '.join(kind.optional_roles) or 'none'}; got {', '.join(recipe.columns)}"
        )
    if not recipe.metrics or not set(recipe.metrics) <= set(kind.metrics):
        raise SystemExit(f"{path}: metrics of {recipe.kind} are {', '.join(kind.metrics)}; got {recipe.metrics}")
    for size in (*kind.sizes, "batch", "epochs"):
        if getattr(recipe, size) < 1:
            raise SystemExit(f"{path}: {recipe.kind} needs a {size} of at least 1")
    if recipe.length and recipe.stride >= recipe.length:
        raise SystemExit(f"{path}: windows of {recipe.length} tokens cannot share {recipe.stride}: lower stride")
