"""The paper's recipes: their numbers, and each kind of task from end to end on tiny data, models and steps."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))

datasets = pytest.importorskip("datasets")
pytest.importorskip("sklearn")

import recipe  # noqa: E402
import recipe_config  # noqa: E402
import recipe_data  # noqa: E402
import recipe_images  # noqa: E402
import recipe_questions  # noqa: E402
import recipe_tasks  # noqa: E402
from PIL import Image  # noqa: E402

import slimfit_fx  # noqa: E402

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


# --- tiny models and data -------------------------------------------------------------------------------------------

WORDS = ["good", "bad", "film", "song", "who", "wrote", "sang", "the", "a", "answer", "maria", "paul", "?", "."]


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    config = transformers.BertConfig(
        vocab_size=len(WORDS) + 5, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(folder)
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def vit_folder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("vit")
    config = transformers.ViTConfig(
        image_size=16, patch_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    torch.manual_seed(0)
    transformers.ViTModel(config).save_pretrained(folder)
    transformers.ViTImageProcessorPil().save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def _caches_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


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


# --- each kind of task ----------------------------------------------------------------------------------------------


def run(name: str, folder: Path, data: str, model: str, *options: str, **fields) -> dict:
    """A short run of a recipe, some fields changed; in the interpreter and without codecs: that is captured soonest."""
    command = [variant(folder, name, **fields), "--data", data, "--model", model]
    return recipe.main([*command, "--option=mode=eager", "--preset=exact", "--steps=2", "--batch=8", *options])


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


# --- baselines, precision, other layouts of data --------------------------------------------------------------------


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


# --- images ---------------------------------------------------------------------------------------------------------


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


# --- windows of a context -------------------------------------------------------------------------------------------


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


# --- bad input ------------------------------------------------------------------------------------------------------


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
