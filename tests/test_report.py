from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import slimfit_fx
from slimfit_fx.graph.plan import GatedGradient, Plan, SavedTensor
from slimfit_fx.inspection.report import Report
from slimfit_fx.model.layers import Layer


@pytest.fixture
def report():
    layers = [Layer("block.q.weight", ("block.q.weight",)), Layer("block.k.weight", ("block.k.weight",))]
    plan = Plan(
        [
            SavedTensor("kept", "block", "linear input", (2, 1024), "float32", (0, 1), 8192, stored=2048, form="int8"),
            SavedTensor("mask", "block.dropout", "dropout mask", (2, 1024), "bool", (), 2048),
            SavedTensor("weight", "", "parameter", (4, 4), "float32", (), 0),
        ],
        [GatedGradient(0, 0, True), GatedGradient(1, 1, False)],
    )
    return Report(plan, layers, [False, False])


def test_bytes(report):
    assert report.saved_bytes_before == 8192 + 2048
    assert report.saved_bytes_after == 2048
    assert Report(report.plan, report.layers, [False, True]).saved_bytes_after == 2048 + 2048


def test_rows(report):
    assert report.rows[0] == {
        "module": "block",
        "role": "linear input",
        "shape": [2, 1024],
        "dtype": "float32",
        "kind": "dynamic",
        "layers": ["block.q.weight", "block.k.weight"],
        "stored_as": "int8",
        "bytes": 8192,
        "bytes_stored": 2048,
        "bytes_now": 0,
    }
    assert [total["role"] for total in report.by_role()] == ["linear input", "dropout mask", "parameter"]


def test_table(report):
    text = report.table()
    row = next(line for line in text.splitlines() if "q.weight, k.weight" in line)
    assert row.split()[-8:] == ["k.weight", "int8", "8.0", "KiB", "2.0", "KiB", "0", "B"]
    assert "total" in text
    for text in (report.table(), str(report)):
        assert "0 of 2 layers open.\nComputed, then dropped when closed (1): block.k.weight." in text


def test_json(report):
    parsed = json.loads(report.to_json())
    assert parsed["rows"] == report.rows
    assert parsed["saved_bytes_after"] == 2048
    assert parsed["by_role"] == report.by_role()
    assert parsed["by_block"] == report.by_block()


def test_modules_and_roles_of_a_real_model():
    torch.manual_seed(0)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x):
            return x + self.down(nn.functional.dropout(nn.functional.gelu(self.up(self.norm(x))), 0.5))

    model = slimfit_fx.transform(nn.Sequential(nn.Linear(8, 8), Block()), mode="eager", preset="exact", always_open=())
    model(torch.randn(2, 3, 8))
    found = {(row["module"], row["role"], row["kind"]) for row in slimfit_fx.report(model).rows if row["bytes"]}
    assert found >= {
        ("0", "norm input", "static"),
        ("1.up", "activation input", "static"),
        ("1.up", "linear input", "dynamic"),
        ("1.down", "feed-forward input", "dynamic"),
        ("1", "dropout mask", "static"),
    }
