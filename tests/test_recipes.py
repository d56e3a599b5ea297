"""The paper's recipes: their numbers, and each kind of task from end to end on tiny data, models and steps."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers
from recipe_runs import datasets, images, make_vit, questions, run, saved, texts

import slimfit_fx
from examples.recipes import config as recipe_config
from examples.recipes import data as recipe_data
from examples.recipes import run as recipe
from examples.recipes import tasks as recipe_tasks

BERT, VIT = "google-bert/bert-base-cased", "google/vit-base-patch16-224-in21k"
# data, model, freezing rate, learning rate, batch, length in tokens or pixels
PAPER = {
    "glue-cola": ("nyu-mll/glue", BERT, 0.90, 8e-5, 32, 128),
    "glue-mnli": ("nyu-mll/glue", BERT, 0.80, 4e-5, 32, 128),
    "glue-mrpc": ("nyu-mll/glue", BERT, 0.90, 1.25e-4, 32, 128),
    "glue-qnli": ("nyu-mll/glue", BERT, 0.95, 5e-5, 32, 128),
    "glue-qqp": ("nyu-mll/glue", BERT, 0.80, 5e-5, 32, 128),
    "glue-rte": ("nyu-mll/glue", BERT, 0.90, 1.2e-4, 16, 128),
    "glue-sst2": ("nyu-mll/glue", BERT, 0.95, 8e-5, 32, 128),
    "glue-stsb": ("nyu-mll/glue", BERT, 0.85, 8e-5, 32, 128),
    "squad-v2": ("rajpurkar/squad_v2", "google-bert/bert-base-uncased", 0.80, 1.8e-4, 128, 384),
    "cifar10": ("uoft-cs/cifar10", VIT, 0.90, 7.5e-5, 32, 224),
    "cifar100": ("uoft-cs/cifar100", VIT, 0.75, 5.5e-5, 32, 224),
    "imagenet": ("ILSVRC/imagenet-1k", VIT, 0.95, 5e-5, 128, 384),
}
HEAD_ALWAYS_OPEN = {"glue-stsb", "cifar10", "cifar100", "imagenet"}


def test_every_recipe_of_the_paper_is_there():
    assert recipe_config.recipe_names() == sorted(PAPER)


@pytest.mark.parametrize("name", PAPER)
def test_the_hyperparameters_are_the_papers(name):
    settings = recipe_config.load_recipe(name)
    size = settings.length or settings.image_size
    numbers = (settings.freeze_rate, settings.learning_rate, settings.batch, size)
    assert (settings.data, settings.model, *numbers) == PAPER[name]
    assert (settings.epochs, settings.weight_decay, settings.warmup_steps) == (3, 0.01, 0)
    assert (settings.optimizer, settings.schedule) == ("adamw_torch", "linear")
    assert settings.head_always_open == (name in HEAD_ALWAYS_OPEN)
    assert name.removeprefix("glue-") == (settings.subset or name)
    assert settings.stride == (128 if name == "squad-v2" else 0)


@pytest.fixture(scope="module")
def vit_folder(tmp_path_factory) -> str:
    return make_vit(tmp_path_factory.mktemp("vit"))


pytestmark = pytest.mark.usefixtures("datasets_cache")


def test_a_sentence(bert_folder, tmp_path):
    data, out = saved(tmp_path / "data", texts("glue-cola"), validation=texts("glue-cola", 11)), tmp_path / "out.json"
    options = ["--steps=40", "--learning-rate=1e-2", "--option=freeze_rate=0.5", "--json", str(out)]
    result = run("glue-cola", tmp_path, data, bert_folder, *options, length=8)
    assert result["metrics"]["validation"]["matthews"] > 0.9
    written = json.loads(out.read_text())
    assert written["method"] == "slimfit_fx"
    assert written["steps"] == 40
    assert written["settings"]["learning_rate"] == 1e-2
    assert written["data"] == data
    assert written["saved_bytes"] > 0
    assert written["graphs"] == 1
    assert written["step_seconds"] > 0
    assert written["peak_bytes"] >= 0
    assert written["versions"]["torch"] == torch.__version__


def test_a_number_for_a_pair_and_a_run_that_is_resumed(bert_folder, tmp_path):
    """The run that goes on from a checkpoint ends like the one that was not interrupted."""
    data, output = saved(tmp_path / "data", texts("glue-stsb"), validation=texts("glue-stsb", 11)), tmp_path / "run"
    options = ["--steps=40", "--save-steps=20", "--learning-rate=1e-2", "--option=freeze_rate=0.5"]
    whole = run("glue-stsb", tmp_path, data, bert_folder, *options, "--output", str(output), length=8)
    scores = whole["metrics"]["validation"]
    assert scores.keys() == {"pearson", "spearman"}
    assert min(scores.values()) > 0.8  # ranks of equal sentences differ by rounding
    with pytest.raises(SystemExit, match="earlier run: pass --resume"):
        run("glue-stsb", tmp_path, data, bert_folder, *options, "--output", str(output), length=8)
    half = tmp_path / "half"
    shutil.copytree(output / "checkpoint-20", half / "checkpoint-20")
    options += ["--resume", "--output", str(half)]
    assert run("glue-stsb", tmp_path, data, bert_folder, *options, length=8)["steps"] == 40
    assert (half / "model.safetensors").read_bytes() == (output / "model.safetensors").read_bytes()
    with pytest.raises(SystemExit, match="the end of its run"):
        run("glue-stsb", tmp_path, data, bert_folder, *options, length=8)


def test_questions(bert_folder, tmp_path):
    data = saved(tmp_path / "data", questions(), validation=questions(6))
    result = run("squad-v2", tmp_path, data, bert_folder, "--precision=bf16", length=24, stride=8)
    scores = result["metrics"]["validation"]
    assert result["graphs"] == 1
    assert scores.keys() == {
        "exact_match", "f1", "answerable_exact_match", "answerable_f1", "unanswerable_accuracy"
    }  # fmt: skip
    assert all(0 <= score <= 1 for score in scores.values())


def test_images(vit_folder, tmp_path):
    data = saved(tmp_path / "data", images(64), test=images(11))
    options = ["--steps=40", "--learning-rate=1e-2", "--option=freeze_rate=0.5"]
    result = run("cifar10", tmp_path, data, vit_folder, *options, image_size=16)
    assert result["metrics"]["test"]["accuracy"] > 0.9
    assert result["graphs"] == 1


def test_a_folder_of_images_at_a_larger_size(vit_folder, tmp_path):
    """ImageNet's recipe at twice the size of the model, without slimfit_fx; what is saved can be loaded."""
    for split, rows in {"train": 16, "validation": 5}.items():
        for row, (picture, label) in enumerate(zip(*images(rows).values(), strict=True)):
            path = tmp_path / "data" / split / ("dark", "bright")[label] / f"{row}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)
    options = ["--eager-baseline", "--precision=bf16", "--workers=1", "--output", str(tmp_path / "run")]
    result = run("imagenet", tmp_path, str(tmp_path / "data"), vit_folder, *options, image_size=32)
    assert result["method"] == "eager"
    assert result["options"]["precision"] == "bf16"
    assert result["metrics"]["validation"].keys() == {"accuracy"}
    trained = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "run")
    assert trained.config.image_size == 32
    assert trained(torch.zeros(1, 3, 32, 32)).logits.shape == (1, 2)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "run", backend="pil")
    assert list(processor.image_mean) == [0.5] * 3


@pytest.mark.parametrize(("name", "opened"), [("glue-stsb", ["classifier.weight"]), ("glue-cola", [])])
def test_the_head_is_always_trained_where_the_recipe_says_so(name, opened, bert_folder):
    model = transformers.AutoModelForSequenceClassification.from_pretrained(bert_folder)
    options = recipe.parse([name, "--option=freeze_rate=1", "--option=mode=eager"], None)
    recipe.transform(model, recipe_config.load_recipe(name), options)
    assert slimfit_fx.gates(model).open == opened


@pytest.mark.parametrize("suffix", ["csv", "json", "parquet"])
def test_files_of_splits(suffix, tmp_path):
    """With the names of the hub's files, and with one's own name for a split that has another there."""
    rows = datasets.Dataset.from_dict(
        {**texts("glue-mnli", 4), "premise": ["None", "NA", "good", "bad"], "more": [0] * 4}
    )
    for split in ("train-00000-of-00002", "train-00001-of-00002", "validation"):
        getattr(rows, f"to_{suffix}")(tmp_path / f"{split}.{suffix}")
    (tmp_path / "notes.json").write_text("{}")
    data = recipe_data.load_data(recipe_config.load_recipe("glue-mnli"), tmp_path)
    assert {split: len(part) for split, part in data.items()} == {"train": 8, "validation": 4}
    assert data["validation"].column_names == ["text", "second_text", "label"]
    assert data["validation"]["text"] == ["None", "NA", "good", "bad"]


def test_a_class_for_a_pair_and_the_baseline_is_compiled(bert_folder, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(self))
    data = saved(tmp_path / "data", texts("glue-qqp"), validation=texts("glue-qqp", 11))
    options = ["--baseline", "--steps=40", "--learning-rate=1e-2"]
    result = run("glue-qqp", tmp_path, data, bert_folder, *options, length=8)
    assert result["metrics"]["validation"].keys() == {"accuracy", "f1"}
    assert min(result["metrics"]["validation"].values()) > 0.9
    assert result["method"] == "torch.compile"
    assert len(compiled) == 1


def test_every_row_is_evaluated(bert_folder, tmp_path, monkeypatch):
    """Batches of training are all of one size; those of evaluation are not, or the last rows would be left out."""
    seen = []
    monkeypatch.setitem(recipe_tasks.METRICS, "accuracy", lambda labels, _: seen.append(len(labels)) or 0.0)
    data = saved(tmp_path / "data", texts("glue-sst2"), validation=texts("glue-sst2", 11))
    run("glue-sst2", tmp_path, data, bert_folder, "--eager-baseline", length=8)
    assert seen == [11]
