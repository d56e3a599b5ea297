"""Recipes, data, models and options that cannot work say so, and name the way out."""

from __future__ import annotations

import pytest
import torch
from recipe_runs import questions, run, saved, texts, variant

from examples.recipes import config as recipe_config
from examples.recipes import data as recipe_data
from examples.recipes import run as recipe

pytestmark = pytest.mark.usefixtures("datasets_cache")


def test_an_unknown_recipe_lists_the_recipes():
    with pytest.raises(SystemExit, match="no recipe 'cola': choose one of cifar10, .*glue-cola"):
        recipe.main(["cola"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rate": 1}, r"unknown fields \['rate'\]"),
        ({"kind": "translation"}, "kind 'translation' is unknown"),
        ({"metrics": ["bleu"]}, "metrics of text classification are accuracy, f1, matthews"),
        ({"columns": {"text": "sentence"}}, "columns of text classification are text, label"),
        ({"length": 0}, "needs a length"),
        ({"stride": 128}, "lower stride"),
    ],
)
def test_a_damaged_recipe_is_named(fields, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        recipe_config.load_recipe(variant(tmp_path, "glue-cola", **fields))


def test_a_recipe_that_is_no_object_is_named(tmp_path):
    for text, message in (("{", "not JSON"), ("[]", "a JSON object, got list"), ("{}", "missing fields")):
        (tmp_path / "own.json").write_text(text)
        with pytest.raises(SystemExit, match=message):
            recipe_config.load_recipe(str(tmp_path / "own.json"))


def test_data_out_of_reach_names_the_way_out(monkeypatch):
    def unreachable(*_):
        raise ConnectionError("Couldn't reach the hub\nand more")

    monkeypatch.setattr(recipe_data, "load_dataset", unreachable)
    with pytest.raises(
        SystemExit, match="nyu-mll/glue cannot be loaded: Couldn't reach the hub\nPass .* --data FOLDER"
    ):
        recipe.main(["glue-cola"])


def test_a_folder_without_data_says_what_it_should_have(tmp_path):
    settings = recipe_config.load_recipe("glue-cola")
    with pytest.raises(SystemExit, match="no such folder"):
        recipe_data.load_data(settings, tmp_path / "nowhere")
    with pytest.raises(SystemExit, match=r"no data found; a folder is what DatasetDict.save_to_disk wrote, or"):
        recipe_data.load_data(settings, tmp_path)
    for name in ("train.csv", "validation.parquet"):
        (tmp_path / name).touch()
    with pytest.raises(SystemExit, match="several formats"):
        recipe_data.load_data(settings, tmp_path)


def test_a_missing_column_or_split_lists_those_there(tmp_path):
    settings = recipe_config.load_recipe("glue-cola")
    saved(tmp_path / "pair", texts("glue-rte", 4), validation=texts("glue-rte", 4))
    with pytest.raises(SystemExit, match="no column 'sentence' for text; it has sentence1, sentence2, label"):
        recipe_data.load_data(settings, tmp_path / "pair")
    saved(tmp_path / "half", texts("glue-cola", 4))
    with pytest.raises(SystemExit, match="no split 'validation'; it has train"):
        recipe_data.load_data(settings, tmp_path / "half")


@pytest.mark.parametrize(
    ("name", "labels"), [("glue-cola", [-1, 0]), ("glue-cola", ["a", "b"]), ("glue-stsb", ["a", "b"])]
)
def test_labels_that_cannot_be_learned_are_named(name, labels, tmp_path):
    data = saved(tmp_path / "data", {**texts(name, 2), "label": labels}, validation=texts(name, 2))
    with pytest.raises(SystemExit, match="labels"):
        run(name, tmp_path, data, "nowhere")


def test_answers_of_another_form_are_named(tmp_path):
    data = saved(tmp_path / "data", {**questions(2), "answers": ["maria", ""]}, validation=questions(2))
    with pytest.raises(SystemExit, match="a list `text` and a list `answer_start`"):
        run("squad-v2", tmp_path, data, "nowhere")


def test_a_model_out_of_reach_names_the_way_out(tmp_path):
    data = saved(tmp_path / "data", texts("glue-cola", 8), validation=texts("glue-cola", 2))
    with pytest.raises(SystemExit, match=r"--model FOLDER"):
        run("glue-cola", tmp_path, data, str(tmp_path / "nowhere"))


def test_impossible_options_are_named(bert_folder, tmp_path):
    data = saved(tmp_path / "data", texts("glue-cola", 8), validation=texts("glue-cola", 2))
    for option, message in (
        ("--batch=9", "8 rows do not fill a batch of 9"),
        ("--option=freeze_rate=2", "freeze_rate"),
        ("--resume", "no checkpoint in --output None"),
        *([] if torch.cuda.is_available() else [("--precision=fp16", "fp16 needs a GPU")]),
    ):
        with pytest.raises(SystemExit, match=message):
            run("glue-cola", tmp_path, data, bert_folder, option, length=8)
