"""The pipeline: one list that order, switches, log, traces, files, cache key and the docs' picture read."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import add_pass, transformed
from torch import nn

import slimfit_fx
from slimfit_fx import ConfigError
from slimfit_fx.compiler import pipeline
from slimfit_fx.inspection.gradient_difference import gradient_errors
from slimfit_fx.sizes import size_text

ROOT = Path(__file__).parent.parent
OPTIONAL = [entry.name for entry in pipeline.PIPELINE if entry.optional]


class Net(nn.Module):
    """A GELU and a norm: something for every pass."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.head = nn.Linear(36, 100), nn.LayerNorm(100), nn.Linear(100, 3)

    def forward(self, x):
        return self.head(F.dropout(self.norm(F.gelu(self.first(x))), 0.1)).square().sum()


X = torch.linspace(-1, 1, 7 * 36).view(7, 36)


def step(model):
    torch.manual_seed(0)
    model(X).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# the list


def test_every_pass_has_a_name_and_a_summary():
    listed = [entry.name for entry in pipeline.PIPELINE]
    assert len(listed) == len(set(listed))
    for entry in pipeline.PIPELINE:
        assert 20 < len(entry.summary) < 200, entry.name
        assert (ROOT / "passes" / f"{entry.name}.py").exists()
    files = {path.stem for path in (ROOT / "passes").glob("*.py")} - {"__init__"}
    assert files == set(listed)  # what is no pass lives elsewhere


def test_the_picture_in_the_docs_is_the_list():
    text = (ROOT / "docs" / "architecture.md").read_text()
    assert re.findall(r"passes/(\w+) ", text[text.index("## Data flow") :].partition("\n## ")[0]) == [
        entry.name for entry in pipeline.PIPELINE
    ]


def test_the_cache_key_knows_which_passes_run(monkeypatch):
    key = pipeline.pipeline_key(())
    assert key != pipeline.pipeline_key(("rebuild",))
    add_pass(monkeypatch, lambda split, plan: None)
    assert key != pipeline.pipeline_key(())


# switches


@pytest.mark.parametrize("mode", ["eager", pytest.param("inductor", marks=pytest.mark.inductor)])
@pytest.mark.parametrize("name", OPTIONAL)
@pytest.mark.parametrize("preset", ["balanced", "tight", "paper"])
def test_gradients_are_right_and_bytes_true_without_a_pass(name, preset, mode):
    if mode == "inductor" and preset != "tight":
        pytest.skip("one preset in generated code")
    exact = step(transformed(Net(), preset="exact", freeze_rate=0, mode=mode))
    model = transformed(Net(), preset=preset, freeze_rate=0, mode=mode, disable_passes=[name])
    found = step(model)
    errors = gradient_errors(exact, found)
    assert all(error.cosine > 0.9 for error in errors.values())


def test_a_disabled_pass_does_not_run():
    kept = transformed(Net(), preset="balanced", disable_passes="rebuild")
    step(kept)
    rebuilt = transformed(Net(), preset="balanced")
    step(rebuilt)
    forms = [{row.form for row in slimfit_fx.report(model).plan.saved} for model in (kept, rebuilt)]
    assert "rebuilt" not in forms[0] and "rebuilt" in forms[1]
    assert slimfit_fx.report(kept).saved_bytes_after > slimfit_fx.report(rebuilt).saved_bytes_after


@pytest.mark.parametrize(
    ("disabled", "match"),
    [
        (["rebuilt"], "Did you mean 'rebuild'"),
        (["compress"], "'compress' is needed for right gradients and bytes.*'rebuild'"),
        ("gate_dynamic", "is needed"),
        ([3], "takes names of passes"),
    ],
)
def test_passes_that_cannot_be_disabled(disabled, match):
    model = Net()
    with pytest.raises(ConfigError, match=match):
        slimfit_fx.transform(model, mode="eager", disable_passes=disabled)
    slimfit_fx.transform(model, mode="eager")  # nothing is left behind


def test_disabled_passes_survive_json():
    config = slimfit_fx.Config(disable_passes=["rebuild"])
    assert slimfit_fx.Config.from_json(config.to_json()) == config


# the log


def test_the_log_says_what_each_pass_did(caplog):
    with caplog.at_level(logging.INFO, "slimfit_fx.passes"):
        model = transformed(Net(), preset="balanced")
        step(model)
    lines = [record.getMessage() for record in caplog.records if record.name == "slimfit_fx.passes"]
    assert [line.split()[3].rstrip(":") for line in lines] == [entry.name for entry in pipeline.PIPELINE]
    number = r"graph \d+ \(model\) "
    assert all(re.match(number + r"\w+: [\d.]+ ms, \d+ nodes added, \d+ removed, saved .* -> ", line) for line in lines)
    by_name = {line.split()[3].rstrip(":"): line for line in lines}
    assert "1 nodes added, 0 removed, saved - -> -" in by_name["expose_gates"]
    before, after = by_name["compress"].partition("saved ")[2].split(" -> ")
    assert before != after == size_text(sum(row.stored for row in slimfit_fx.report(model).plan.saved))


def test_nothing_is_logged_or_looked_at_when_off(caplog, monkeypatch):
    monkeypatch.setattr("slimfit_fx.compiler.pass_log.trace_log", logging.Logger("nobody listens"))
    monkeypatch.setattr("slimfit_fx.compiler.pass_log.Moment.names", lambda _: pytest.fail("looked at"))
    step(transformed(Net()))
    assert not [record for record in caplog.records if record.name.startswith("slimfit_fx")]


def test_torch_logs_knows_the_logger():
    """A setting of torch's own: any importable name will do."""
    code = "import test_pipeline as t; t.step(t.transformed(t.Net()))"
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={**__import__("os").environ, "TORCH_LOGS": "+slimfit_fx", "PYTHONPATH": str(ROOT / "tests")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "gate_dynamic: " in found.stderr


# graphs before and after


def test_files_to_read(tmp_path, monkeypatch):
    monkeypatch.setenv("SLIMFIT_DEBUG", str(tmp_path / "debug"))
    step(transformed(Net(), preset="balanced"))
    (graph,) = (tmp_path / "debug").iterdir()
    assert re.fullmatch(r"graph_\d{3,}_model", graph.name)
    assert names(graph) == [f"{place:02}_{entry.name}" for place, entry in enumerate(pipeline.PIPELINE)]
    assert names(graph / "02_gate_dynamic") == ["joint.after.py", "joint.before.py"]
    assert names(graph / "03_partition") == ["backward.after.py", "forward.after.py", "joint.before.py"]
    gated = graph / "02_gate_dynamic"
    assert "save_if_open" not in (gated / "joint.before.py").read_text()
    assert "save_if_open" in (gated / "joint.after.py").read_text()
    (compress,) = graph.glob("*_compress")
    assert names(compress) == [
        *("backward.after.py", "backward.before.py", "forward.after.py", "forward.before.py"),
        *("plan.after.txt", "plan.before.txt"),
    ]
    assert "int8" in (compress / "plan.after.txt").read_text()


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SLIMFIT_DEBUG", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="SLIMFIT_DEBUG: cannot write .*Name another folder, or unset it"):
        step(transformed(Net()))


def test_tlparse_gets_every_graph(tmp_path):
    code = "import test_pipeline as t; t.step(t.transformed(t.Net()))"
    environment = {**__import__("os").environ, "TORCH_TRACE": str(tmp_path), "PYTHONPATH": str(ROOT / "tests")}
    subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True)
    text = "".join(path.read_text() for path in tmp_path.glob("*.log"))
    artifacts = [json.loads(entry) for entry in re.findall(r'\] (\{"artifact".*\})', text)]
    found = [entry["artifact"]["name"] for entry in artifacts if entry["artifact"]["name"].startswith("slimfit_fx")]
    for place, entry in enumerate(pipeline.PIPELINE):
        graphs = {"captured": ["captured"], "joint": ["joint"], "cut": []}.get(entry.on, ["forward", "backward"])
        for graph in graphs:
            assert f"slimfit_fx_{place:02}_{entry.name}_{graph}_before" in found
            assert f"slimfit_fx_{place:02}_{entry.name}_{graph}_after" in found
