"""The harness: suites name what there is, a cell is measured, tables and plots show what came out and what failed."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config

import slimfit_fx
from benchmarks import accuracy, floor, largest_batch, measure, methods, models, run, scaling, show

ROOT = Path(__file__).parent.parent
TINY = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 30}
SUITES = sorted((ROOT / "benchmarks" / "suites").glob("*.json"))


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_a_suite_names_what_there_is(path):
    cells = list(run.cells(json.loads(path.read_text())))
    assert cells
    for cell in cells:
        options = measure.parse(run.flags(cell))
        assert options.method in methods.METHODS
        assert options.model in models.MODELS
        assert dict(options.config) == cell.get("config", {})
    assert len({json.dumps(cell, sort_keys=True) for cell in cells}) == len(cells)


def test_the_suite_for_a_gpu_is_ready():
    """One command runs it where there is one: each method prepares each kind of model, and each optimizer is there."""
    suite = json.loads((ROOT / "benchmarks" / "suites" / "gpu.json").read_text())
    cells = list(run.cells(suite))
    assert {models.MODELS[cell["model"]]["family"] for cell in cells} == {"bert", "vit", "llama"}
    assert {cell["precision"] for cell in cells} == set(measure.PRECISIONS)
    assert {"compile", "balanced"} <= {cell["method"] for cell in cells}
    for name, method in sorted({(cell["model"], cell["method"]) for cell in cells}):
        config = {**TINY, "num_key_value_heads": 1} if models.MODELS[name]["family"] == "llama" else TINY
        model, _ = models.build(name, batch=2, length=32, overrides=config)
        with (
            functorch_config.patch(activation_memory_budget=1.0),
            inductor_config.patch(post_grad_fusion_options={}),
        ):
            model = methods.prepare(model, method)
        assert any(parameter.requires_grad for parameter in model.parameters()), (name, method)


@pytest.mark.parametrize("method", methods.METHODS)
def test_a_method_prepares_a_model(method):
    model, _ = models.build("minilm", batch=2, length=4, overrides=TINY)
    everything = sum(parameter.requires_grad for parameter in model.parameters())
    with (
        functorch_config.patch(activation_memory_budget=1.0),
        inductor_config.patch(post_grad_fusion_options={}),
    ):
        model = methods.prepare(model, method)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert any("classifier" in name for name in trained)
    fewer = method in ("bitfit", "lisa") or "fixed" in methods.METHODS[method]
    assert (len(trained) < everything) == fewer or "lora" in method
    if "lora" in method:
        assert all("lora_" in name or "classifier" in name for name in trained)


@pytest.mark.parametrize("name", models.MODELS)
def test_a_model_gives_a_loss(name):
    config = {**TINY, "num_key_value_heads": 1} if models.MODELS[name]["family"] == "llama" else TINY
    model, inputs = models.build(name, batch=2, length=32, overrides=config)
    assert model(**inputs).loss.isfinite()


def test_products_left_are_two_thirds_and_what_trains():
    """A linear layer's three products are of one size; the input of the model's first needs no gradient."""
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    slim = slimfit_fx.transform(model.train(), mode="eager", always_open=())
    for trained in ([], ["1.weight"], slimfit_fx.gates(slim).names):
        slimfit_fx.gates(slim).set(trained)
        slim(torch.randn(5, 8)).sum().backward()
        assert floor.flops_left(slim) == pytest.approx((4 + 3 + len(trained)) / (4 + 3 + 4))


@pytest.mark.parametrize("method", ["eager", "balanced"])
def test_a_cell_is_measured(method, capsys):
    command = [method, "--model=minilm", "--batch=4", "--length=8", "--optimizer=adamw", "--steps=2", "--device=cpu"]
    command += [f"--config={name}={value}" for name, value in TINY.items()]
    command += ['--option=mode="eager"', "--option=freeze_rate=0.5"] if method == "balanced" else []
    figures = measure.measure(measure.parse(command))
    weights = figures["weight_bytes"]
    assert weights < figures["total_bytes"] <= figures["total_bytes_max"]
    states = figures["optimizer_bytes"] + figures["optimizer_bytes_to_come"]
    assert 1.7 * weights < states < 2 * weights  # which include buffers
    if method == "eager":
        assert figures["optimizer_bytes_to_come"] == 0
        assert figures["gradient_bytes"] <= weights
        assert figures["optimizer_bytes"] > 1.9 * figures["gradient_bytes"]
    else:
        assert figures["gradient_bytes"] < 0.9 * weights
        assert figures["predicted_bytes"] > 0
        assert 2 / 3 < figures["flops_left"] < 1
    assert json.loads(json.dumps(figures))["model"] == "minilm"


def fake(method, number, **figures):
    cell = {"model": "bert4", "method": method, "round": number}
    names = [name for name, *_ in show.COLUMNS]
    return {"cell": cell, **dict.fromkeys(names, 2**20), **figures}


def test_a_table_has_ratios_within_rounds_and_failures():
    cells = [fake("compile", 0, step_seconds=2.0), fake("balanced", 0, step_seconds=1.0)]
    cells += [fake("compile", 1, step_seconds=6.0), fake("balanced", 1, step_seconds=3.0)]
    cells += [{"cell": {"model": "bert4", "method": "fp8", "round": 0}, "error": "boom"}]
    ((setting, group),) = show.settings(cells).items()
    text = show.table(group)
    assert setting == "bert4"
    assert "2.00 s (0.50x)" in text
    assert text.splitlines()[-2].count(" MiB") == sum("bytes" in name for name, *_ in show.COLUMNS)
    assert "failed: boom" in text
    axes = show.plot(setting, group).axes[0]
    assert {label.get_text() for label in axes.texts} == {"compile", "balanced"}


def test_a_line_holds_everything_else_still_and_has_the_baseline_beside_it(tmp_path):
    suite = json.loads((ROOT / "benchmarks" / "suites" / "cpu-scaling.json").read_text())
    cells = [{"cell": cell, **dict.fromkeys(scaling.FIGURES, 2.0**20)} for cell in run.cells(suite)]
    cells[-1] = {"cell": cells[-1]["cell"], "error": "boom"}
    lines = list(scaling.lines(cells))
    assert {line.axis: [value for value, _, _ in line.points] for line in lines} == {
        "layers": [2, 6, 12],
        "width": [192, 384, 768],
        "batch": [8, 16, 32, 64],
        "length": [48, 128, 256, 512],
        "freezing rate": [0.0, 0.5, 0.75, 0.9, 0.95],
    }
    for line in lines:
        for value, base, entry in line.points:
            where = scaling.place(entry["cell"])
            assert where == {**line.fixed, line.axis: value}
            assert scaling.place(base["cell"]).items() < where.items()
        assert "1 MiB (1.00x)" in scaling.table(line)
    scaling.show.save(scaling.plot(lines), tmp_path / "pictures", "scaling")
    assert (tmp_path / "pictures" / "scaling.svg").exists()


def test_a_suite_goes_on_where_it_was_interrupted(tmp_path, monkeypatch):
    suite, out, asked = tmp_path / "suite.json", tmp_path / "out.json", []
    grid = {"model": "bert4", "method": ["compile", "fp8"]}
    suite.write_text(json.dumps({"rounds": 2, "grids": [grid]}))

    def measured(cell):
        asked.append(cell["method"])
        if len(asked) == 2:
            raise KeyboardInterrupt
        return {"error": "boom"} if cell["method"] == "fp8" else {"step_seconds": 1.0}

    monkeypatch.setattr(run, "measured", measured)
    command = [str(suite), "--out", str(out)]
    with pytest.raises(KeyboardInterrupt):
        run.main(command)
    run.main(command)
    assert asked == ["compile", "fp8", "fp8", "compile", "fp8"]
    run.main([*command, "--retry"])
    assert asked[5:] == ["fp8", "fp8"]


def test_a_process_that_was_killed_says_so(monkeypatch):
    done = SimpleNamespace(returncode=-9, stderr="a warning", stdout="")
    monkeypatch.setattr(run.subprocess, "run", lambda *_, **__: done)
    assert run.measured_once({"method": "eager"}, "") == {"error": "killed by signal 9"}


def test_accuracy_tries_each_rate_once_and_goes_on_with_the_best(tmp_path, monkeypatch):
    asked, out = [], tmp_path / "out.json"

    def trained(wanted, _):
        asked.append((wanted["learning_rate"], wanted["seed"]))
        return {"validation_accuracy": 1 - abs(wanted["learning_rate"] - 2e-4), "test_accuracy": 0.5}

    monkeypatch.setattr(accuracy, "trained", trained)
    command = ["balanced", "--rates", "1e-4", "2e-4", "4e-4", "--out", str(out)]
    accuracy.main(command)
    assert asked == [(1e-4, 0), (2e-4, 0), (4e-4, 0), (2e-4, 1), (2e-4, 2)]
    accuracy.main(command)
    assert len(asked) == 5
    assert "50.0, 50.0, 50.0" in accuracy.table(json.loads(out.read_text())["runs"])


def test_accuracy_is_shown_against_memory(tmp_path, capsys):
    runs = [
        {**run, "optimizer": "adamw", "learning_rate": 1e-4, "seed": seed, "validation_accuracy": 0.5, **test}
        for run in (
            {"method": "compile", "option": {}},
            {"method": "balanced", "option": {"catch_up": 0.5}},
            {"method": "lisa", "option": {}},
        )
        for seed, test in enumerate([{"test_accuracy": 0.83}, {"test_accuracy": 0.85}])
    ]
    cells = [
        {"cell": {"method": "compile", "optimizer": "adamw"}, "total_bytes_max": 2**20, "optimizer_bytes_to_come": 0},
        {
            "cell": {"method": "balanced", "option": {"catch_up": 0.5}, "optimizer": "adamw"},
            "total_bytes_max": 0,
            "optimizer_bytes_to_come": 2**19,
        },
        {"cell": {"method": "lisa", "optimizer": "adamw"}, "error": "boom"},
    ]
    result, memory = tmp_path / "accuracy.json", tmp_path / "memory.json"
    result.write_text(json.dumps({"runs": runs}))
    memory.write_text(json.dumps({"cells": cells}))
    accuracy.main(["--show", str(result), "--memory", str(memory), "--plot", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert "84.0 ± 1.4" in lines[2] and "1 MiB" in lines[2]
    assert "MiB" not in lines[4]
    assert (tmp_path / "accuracy.svg").exists()
    axes = accuracy.plot(runs, accuracy.total_peaks(memory)).axes[0]
    assert {text.get_text() for text in axes.texts} == {"compile", "balanced catch_up=0.5"}


def test_an_accuracy_run(tiny_bert):
    data = tiny_bert / "data.csv"
    data.write_text("text,label\n" + "".join(f"{word} film,{int(word == 'good')}\n" for word in ["good", "bad"] * 60))
    wanted = {"method": "balanced", "option": {"mode": "eager"}, "optimizer": "adamw", "learning_rate": 1e-2, "seed": 1}
    arguments = ["--model", str(tiny_bert), "--csv", str(data), "--device=cpu", "--steps=3", "--batch=8", "--length=6"]
    result = accuracy.trained(wanted, arguments)
    assert 0 <= result["test_accuracy"] <= 1
    assert result["steps"] == 3


@given(st.integers(0, 5000), st.integers(1, 300), st.integers(1, 10**6), st.integers(1, 64), st.booleans())
@example(base=0, slope=3, limit=75, start=25, dies=True)
def test_the_largest_batch_is_found(base, slope, limit, start, dies):
    """For an even growth, whether a batch that is too large is measured or dies."""
    tried = {}

    def peak(batch):
        total = base + slope * batch
        return None if dies and total > limit else total

    found = largest_batch.largest_batch(peak, limit, start, tried)
    answer = max(0, limit - base) // slope
    assert found <= answer <= found + max(1, found // 50)
    assert len(tried) <= 25
