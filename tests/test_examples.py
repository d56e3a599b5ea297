"""The examples run from end to end on tiny data, models and steps."""

from __future__ import annotations

import csv
import gzip
import json
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers

from examples.shared import comparison, memory
from examples.text import finetune as finetune_text
from examples.vision import finetune as finetune_vision


@pytest.fixture
def text_arguments(tiny_bert) -> list[str]:
    """A tiny model, and sentences of which one word decides."""
    rows = [{"text": f"{word} film", "label": int(word == "good")} for word in ("good", "bad")] * 60
    data = tiny_bert / "data.csv"
    with data.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows(rows)
    command = ["--model", str(tiny_bert), "--csv", str(data), "--device=cpu", "--batch=8", "--length=6"]
    return [*command, "--json", str(tiny_bert / "out.json")]


@pytest.mark.parametrize("method", [["--mode=eager", "--freeze-rate=0.5"], ["--eager-baseline"]])
def test_text(text_arguments, method, tiny_bert, capsys):
    command = [*text_arguments, "--steps=25", "--learning-rate=3e-2", *method]
    command += ["--option=catch_up=0.5", "--option=closed_state=none", "--plot", str(tiny_bert / "pictures")]
    result = finetune_text.main(command)
    assert result["test_accuracy"] > 0.9
    assert result["validation_accuracy"] > 0.9
    assert result["peak_bytes"] > 0
    pictures = {path.name for path in (tiny_bert / "pictures").iterdir()}
    assert pictures == ({"memory.png"} if "--eager-baseline" in method else {"memory.png", "history.png"})
    assert json.loads((tiny_bert / "out.json").read_text())["steps"] == 25
    assert ("layers open." in capsys.readouterr().out) == ("--eager-baseline" not in method)


def test_a_comparison_runs_both_alike_in_fresh_processes(text_arguments, monkeypatch, capsys, tiny_bert):
    """The processes are played by calls in this one."""
    started, compiled = [], []

    def play(command, env):
        started.append(env)
        assert command[:3] == [sys.executable, "-m", "examples.text.finetune"]
        finetune_text.main(command[3:])
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(comparison.subprocess, "run", play)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(self))
    results = finetune_text.main([*text_arguments, "--compare", "--steps=3", "--mode=eager"])
    assert list(results) == ["torch.compile", "slimfit_fx"]
    plain, slim = results.values()
    assert len(compiled) == 1
    assert (plain["baseline"], slim["baseline"]) == (True, False)
    assert [result["learning_rate"] for result in (slim, plain)] == plain["learning_rates"] == slim["learning_rates"]
    own = {"baseline", "learning_rate", "json", "loss", "step_seconds", "first_step_seconds", "saved_bytes"}
    own |= {"peak_bytes", "test_accuracy"}
    assert {key: value for key, value in plain.items() if key not in own} == {
        key: value for key, value in slim.items() if key not in own
    }
    for environment in started:
        assert memory.ENVIRONMENT.items() <= environment.items()
    assert len({environment["TORCHINDUCTOR_CACHE_DIR"] for environment in started}) == 2
    text = capsys.readouterr().out
    assert "3 steps each (0.4 epochs), learning rates 0.0001 and 0.0004, on cpu." in text
    assert len((tiny_bert / "out.json").read_text().splitlines()) == 2


def test_the_table_of_a_comparison():
    common = {"steps": 60, "epochs": 0.4, "device": "cpu"}
    plain = {**common, "saved_bytes": 200 << 20, "peak_bytes": 500 << 20, "step_seconds": 1.0, "learning_rate": 1e-4}
    slim = {**common, "saved_bytes": 50 << 20, "peak_bytes": 300 << 20, "step_seconds": 0.75, "learning_rate": 4e-4}
    plain |= {"first_step_seconds": 50, "test_accuracy": 0.812}
    slim |= {"first_step_seconds": 40, "test_accuracy": 0.8}
    lines = [line.split() for line in comparison.table({"torch.compile": plain, "slimfit_fx": slim}).splitlines()]
    assert lines[0] == ["torch.compile", "slimfit_fx", "ratio"]
    assert [line[-5:] for line in lines[2:4]] == [
        ["200", "MiB", "50", "MiB", "0.25x"],
        ["500", "MiB", "300", "MiB", "0.60x"],
    ]
    assert lines[6] == ["test", "accuracy", "81.2%", "80.0%"]


def test_a_run_that_fails_ends_the_comparison(text_arguments, monkeypatch):
    monkeypatch.setattr(comparison.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=-9))
    with pytest.raises(SystemExit, match="killed by signal 9"):
        finetune_text.main([*text_arguments, "--compare"])


@pytest.mark.parametrize("method", ["--baseline", "--eager-baseline"])
def test_a_comparison_has_both_methods_already(method):
    with pytest.raises(SystemExit):
        finetune_text.parse(["--compare", method])


def test_the_peak_is_the_largest_of_the_steps_but_the_first(monkeypatch):
    """With the states that the optimizer had before the step: they are not in what the step adds."""
    weight = torch.nn.Parameter(torch.zeros(256))
    optimizer = torch.optim.AdamW([weight])
    found = memory.StepMemory(torch.device("cpu"), optimizer)
    measured = iter([(5, 900), (1, 100), (3, 50), (2, 80)])

    class Memory:
        def start(self):
            self.saved, self.most = next(measured)

        def current(self):
            return self.saved

        def peak(self):
            return self.most

    found._memory = Memory()
    for _ in range(4):
        found.begin()
        found.after_forward()
        weight.grad = torch.ones(256)
        optimizer.step()
        found.end()
    assert found.result() == {"saved_bytes": 2, "peak_bytes": 100 + 2 * 1024 + 4}


def test_the_split_is_fixed_stratified_and_disjoint(tmp_path):
    data = tmp_path / "data.csv"
    data.write_text("text,label\n" + "".join(f"sentence {i},{i % 2}\n" for i in range(853)))
    options = finetune_text.parse(["--csv", str(data)])
    splits = finetune_text.load_splits(options)
    assert splits == finetune_text.load_splits(options)
    texts = [text for rows in splits.values() for text, _ in rows]
    assert len(set(texts)) == len(texts)
    for part, size in finetune_text.SIZES.items():
        assert len(splits[part]) == pytest.approx(size / 10, abs=2)
        assert sum(label for _, label in splits[part]) == pytest.approx(size / 20, abs=2)


def write_idx(path: Path, values: np.ndarray) -> None:
    """The format of MNIST's files: a magic number, the sizes, the bytes; gzipped."""
    header = struct.pack(f">i{values.ndim}i", 0x800 + values.ndim, *values.shape)
    path.write_bytes(gzip.compress(header + values.astype(np.uint8).tobytes()))


def test_vision(tmp_path):
    """A ViT learns to tell bright images from dark ones."""
    config = transformers.ViTConfig(
        image_size=28, patch_size=14, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    torch.manual_seed(0)
    transformers.ViTModel(config).save_pretrained(tmp_path)
    for part in ("train", "t10k"):
        labels = np.arange(64) % 2
        write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", np.ones((64, 28, 28)) * labels[:, None, None] * 255)
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", labels)
    command = ["--model", str(tmp_path), "--data", str(tmp_path), "--image-size=28", "--device=cpu", "--mode=eager"]
    result = finetune_vision.main([*command, "--steps=20", "--batch=8", "--learning-rate=1e-2", "--freeze-rate=0.5"])
    assert result["test_accuracy"] > 0.9


def test_missing_data_is_named(tmp_path):
    with pytest.raises(SystemExit, match="apt-get install dataset-fashion-mnist"):
        finetune_vision.main(["--data", str(tmp_path)])
