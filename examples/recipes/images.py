"""Image classification: views of an image as tensors, and models at another image size than they were trained at."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel

from .config import Recipe
from .data import Data, class_count
from .tasks import Task, pretrained, pretrained_model, score

# From an image of any size to one of so many pixels a side.
View = Callable[[Image.Image, int], Image.Image]
# left, upper, right, lower
Box = tuple[float, float, float, float]

# The customary parts that images are augmented by; the paper's notes name none.
SMALLEST_PART = 0.08  # of the image's area
LONGEST_SIDE = 4 / 3  # of the other side


def image_task(recipe: Recipe, data: Data, name: str) -> Task:
    """A class for an image: random parts, half of them mirrored, in training; the middle in evaluation."""
    classes = class_count(data)
    processor = pretrained(AutoImageProcessor, name, backend="pil")
    model = pretrained_model(
        AutoModelForImageClassification,
        name,
        num_labels=classes,
        problem_type="single_label_classification",
        ignore_mismatched_sizes=True,
    )
    model = at_size(model, recipe.image_size)
    to_model = partial(
        to_tensors,
        size=recipe.image_size,
        mean=np.asarray(processor.image_mean, np.float32),
        deviation=np.asarray(processor.image_std, np.float32),
    )
    rows = {
        split: part.with_transform(partial(to_model, view=random_view if split == "train" else middle_view))
        for split, part in data.items()
    }
    return Task(model, rows["train"], lambda trainer: score(trainer, rows, recipe.metrics), processor)


def to_tensors(
    rows: Mapping[str, list[Any]], view: View, size: int, mean: np.ndarray, deviation: np.ndarray
) -> dict[str, list[Any]]:
    """Images of any size and colours to tensors [3, size, size], normalised."""
    views = [np.asarray(view(image.convert("RGB"), size), np.float32) / 255 for image in rows["image"]]
    pixels = [torch.from_numpy((pixels - mean) / deviation).permute(2, 0, 1) for pixels in views]
    return {"pixel_values": pixels, "labels": rows["label"]}


def middle_view(image: Image.Image, size: int) -> Image.Image:
    """The largest square in the middle."""
    return image.resize((size, size), Image.Resampling.BILINEAR, box=middle_box(image.width, image.height))


def random_view(image: Image.Image, size: int) -> Image.Image:
    view = image.resize((size, size), Image.Resampling.BILINEAR, box=random_box(image.width, image.height))
    return view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.random() < 0.5 else view


def random_box(width: int, height: int) -> Box:
    """A part of random area, shape and place; the middle of an image so narrow that no part of ten fits in it."""
    for _ in range(10):
        area = width * height * random.uniform(SMALLEST_PART, 1)
        shape = math.exp(random.uniform(-math.log(LONGEST_SIDE), math.log(LONGEST_SIDE)))
        wide, high = math.sqrt(area * shape), math.sqrt(area / shape)
        if wide <= width and high <= height:
            left, upper = random.uniform(0, width - wide), random.uniform(0, height - high)
            return left, upper, left + wide, upper + high
    return middle_box(width, height)


def middle_box(width: int, height: int) -> Box:
    side = min(width, height)
    left, upper = (width - side) / 2, (height - side) / 2
    return left, upper, left + side, upper + side


def at_size(model: PreTrainedModel, size: int) -> PreTrainedModel:
    """The model for square images of `size` pixels: its table of positions, stretched, once and for all steps."""
    if model.config.image_size == size:
        return model
    config = copy.deepcopy(model.config)
    config.image_size = size
    resized, state = type(model)(config), model.state_dict()
    for name, tensor in resized.state_dict().items():
        if tensor.shape == state[name].shape:
            continue
        if not name.endswith("position_embeddings"):
            raise SystemExit(
                f"{type(model).__name__} takes images of {model.config.image_size} pixels and cannot be changed to "
                f"{size} ({name} has no grid of positions): copy the recipe with another image_size, or pass --model"
            )
        state[name] = stretch(state[name], tensor.shape[1])
    resized.load_state_dict(state)
    return resized


def stretch(table: Tensor, length: int) -> Tensor:
    """Positions [1, t + g * g, d] to [1, length, d], where the first t, of class tokens, stay as they are."""
    old, new = math.isqrt(table.shape[1]), math.isqrt(length)
    tokens, grid = table[:, : table.shape[1] - old**2], table[:, table.shape[1] - old**2 :]
    grid = grid.reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    return torch.cat([tokens, grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)
