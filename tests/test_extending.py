"""The examples of docs/extending.md do what they say."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import torch
from torch import nn

import slimfit_fx
from slimfit_fx.compiler import pipeline

TEXT = (Path(__file__).parent.parent / "docs" / "extending.md").read_text()
CODEC, POLICY, PASS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def run(example: str, path: Path):
    """The example as an imported module."""
    path.write_text(example)
    spec = importlib.util.spec_from_file_location(f"extending_{path.stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_they_are_short():
    for example in (CODEC, POLICY, PASS):
        assert len(example.splitlines()) < 40


def test_codec(tmp_path):
    codec = run(CODEC, tmp_path / "codec.py").BFloat16()
    x = torch.randn(5, 7) * 100
    assert ((codec.decode(codec.encode(x), x.shape, x.dtype) - x).double().abs() <= codec.error_bound(x)).all()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
    slimfit_fx.transform(model, mode="eager", preset="exact", always_open=[".*"], codecs={"activation input": codec})
    x = torch.randn(64, 8)
    model(x).square().sum().backward()
    (row,) = [row for row in slimfit_fx.report(model).plan.saved if row.role == "activation input"]
    assert row.stored * 2 == row.nbytes > 0
    assert "bfloat16" in row.form


def test_policy(tmp_path, monkeypatch):
    monkeypatch.setitem(slimfit_fx.POLICIES, "longest-closed", None)  # taken away again after the test
    run(POLICY, tmp_path / "policy.py")
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    slimfit_fx.transform(model, mode="eager", policy="longest-closed", freeze_rate=0.75, always_open=[])
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    trained = []
    for _ in range(8):
        model(torch.randn(2, 4)).sum().backward()
        trained.append(list(slimfit_fx.gates(model).open))
        optimizer.step()
        optimizer.zero_grad()
    assert {name for names in trained[:4] for name in names} == set(slimfit_fx.gates(model))
    assert trained[:4] == trained[4:]


class Router(nn.Module):
    """Each token goes on with the two largest of its projections."""

    def __init__(self) -> None:
        super().__init__()
        self.score, self.out = nn.Linear(8, 16), nn.Linear(2, 1)

    def forward(self, x):
        values, indices = self.score(x).topk(2)
        return self.out(values * torch.gather(x, 1, indices % 8)).sum()


def test_pass(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "PIPELINE", list(pipeline.PIPELINE))
    x = torch.randn(64, 8, requires_grad=True)

    def gradients():
        torch.manual_seed(0)
        model = Router()
        slimfit_fx.transform(model, mode="eager", preset="exact", always_open=[".*"])
        x.grad = None
        model(x).backward()
        rows = slimfit_fx.report(model).plan.saved
        return [x.grad, *(p.grad for p in model.parameters())], [r for r in rows if r.dtype == "int64" and r.nbytes]

    before, wide = gradients()
    run(PASS, tmp_path / "narrow.py")
    after, narrow = gradients()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert sum(row.nbytes for row in wide) > 0
    assert [row.stored * 2 for row in narrow] == [row.stored for row in wide]
    assert {row.form for row in narrow} == {"int32"}
