"""What the recipes make of images, of positions and of long contexts."""

from __future__ import annotations

import random

import pytest
import torch
from recipe_runs import datasets, questions, variant

from examples.recipes import config as recipe_config
from examples.recipes import images as recipe_images
from examples.recipes import questions as recipe_questions

pytestmark = pytest.mark.usefixtures("datasets_cache")


def test_a_random_box_is_a_part_of_the_image():
    random.seed(0)
    for width, height in ((40, 30), (30, 40), (7, 7)):
        for _ in range(200):
            left, upper, right, lower = recipe_images.random_box(width, height)
            assert 0 <= left < right <= width + 1e-9
            assert 0 <= upper < lower <= height + 1e-9
            assert (right - left) * (lower - upper) >= 0.0799 * width * height
    assert recipe_images.random_box(1000, 1) == (499.5, 0, 500.5, 1)
    assert recipe_images.middle_box(4, 2) == (1, 0, 3, 2)


def test_positions_are_stretched():
    """Class token kept; of a grid that rises from left to right, each column between its neighbours."""
    grid = torch.arange(3.0).expand(3, 3).reshape(1, 9, 1)
    table = torch.cat([torch.full((1, 1, 1), 7.0), grid], dim=1)
    stretched = recipe_images.stretch(table, 37)
    assert stretched[0, 0] == 7
    columns = stretched[0, 1:, 0].reshape(6, 6)
    assert torch.allclose(columns, columns[0].expand(6, 6), atol=1e-6)
    assert (columns[0].diff() > 0).all()


def test_windows_point_to_the_answer(bert_folder, tmp_path):
    """Of the windows of a context, those that have the answer say where, the others that they have none."""
    settings = recipe_config.load_recipe(variant(tmp_path, "squad-v2", length=24, stride=8))
    data = {"train": datasets.Dataset.from_dict(questions(2))}
    task = recipe_questions.question_task(settings, data, bert_folder)
    spans = [row["input_ids"][row["start_positions"] : row["end_positions"] + 1] for row in task.train]
    found = [task.processor.decode(span) for span in spans]
    assert found.count("maria") >= 1
    assert set(found) == {"maria", "[CLS]"}
    assert len(found) > 4  # several windows for each of the two questions
    assert set(found[len(found) // 2 :]) == {"[CLS]"}  # the second one has no answer
