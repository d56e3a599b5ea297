"""Errors on their way to the user: ours arrive as ours, torch's as torch's, and say where and what to do."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from helpers import add_pass, loss_of, replace_pass, run, transformed
from slimfit_fx.passes.make_plan import make_plan
from torch import nn
from torch._dynamo.exc import TensorifyScalarRestartAnalysis
from torch._subclasses.fake_tensor import DynamicOutputShapeException

import slimfit_fx
from slimfit_fx import BackendError, ConfigError, ModelError, SlimFitError, StateError
from slimfit_fx.runtime.registry import session_of

X = torch.linspace(-1, 1, 32).view(4, 8)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(F.gelu(self.first(x)))


def broken(*arguments, **_):
    node = next(iter(arguments[0].graph.nodes)) if hasattr(arguments[0], "graph") else None
    raise DynamicOutputShapeException(f"a fault of ours at {node}")


@pytest.mark.parametrize("way", ["transform", "blocks", "named backend"])
@pytest.mark.parametrize("name", ["expose_gates", "gate_dynamic", "partition", "make_plan"])
def test_a_pass_that_fails_is_named(monkeypatch, name, way):
    """Dynamo would answer this exception of a backend with an eager run."""
    replace_pass(monkeypatch, name, broken)
    if way == "named backend":
        call = torch.compile(Net(), backend="slimfit_fx", mode="eager")
    else:
        call = transformed(Net(), regions="blocks" if way == "blocks" else "model")
    with pytest.raises(SlimFitError, match=f"could not compile a graph of .* nodes in the pass {name}") as error:
        call(X)
    assert isinstance(error.value, BackendError)
    assert "a fault of ours" in str(error.value)
    assert "slimfit_fx.undo(model)" in str(error.value)
    assert "mode='eager'" not in str(error.value)  # it is


def test_the_node_and_its_module_are_named(monkeypatch):
    def failing_pass(split, plan):
        for node in split.backward.graph.nodes:
            if "mm" in node.name:
                raise KeyError("meta")

    add_pass(monkeypatch, failing_pass)
    slim = transformed(Net())
    with pytest.raises(BackendError, match=r"in the pass failing_pass at %.*mm.* of (first|head): KeyError") as error:
        slim(X)
    assert isinstance(error.value.__cause__, KeyError)
    monkeypatch.undo()
    with pytest.raises(BackendError):
        add_pass(monkeypatch, failing_pass)
        slim(X)
    monkeypatch.undo()
    slim(X).sum().backward()  # nothing is lost


def test_dynamos_own_control_flow_is_no_failure(monkeypatch):
    """A pass of torch's that runs within ours may ask Dynamo to trace the graph anew."""
    asked = []

    def once(*arguments):
        if not asked:
            asked.append(True)
            raise TensorifyScalarRestartAnalysis
        make_plan(*arguments)

    replace_pass(monkeypatch, "make_plan", once)
    transformed(Net())(X).sum().backward()
    assert asked


@pytest.mark.parametrize("mode", ["inductor", "eager"])
def test_advice_fits_the_mode(mode, monkeypatch):
    replace_pass(monkeypatch, "make_plan", broken)
    with pytest.raises(BackendError) as error:
        transformed(Net(), mode=mode)(X)
    assert ("mode='eager'" in str(error.value)) == (mode == "inductor")


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"options": {"polcy": "random"}}, ConfigError, "Did you mean 'policy'"),
        ({"options": {"freeze_rate": 2}}, ConfigError, "freeze_rate"),
        ({"options": {"regions": "blocks"}}, ConfigError, "needs slimfit_fx.transform"),
        ({"mode": "max-autotune"}, ConfigError, "unknown mode 'max-autotune'; known: 'inductor', 'eager'"),
        ({"options": {"always_open": ["frist"], "mode": "eager"}}, ConfigError, "matches no trained parameter"),
    ],
)
def test_errors_of_the_named_backend_are_ours(options, error, match):
    compiled = torch.compile(Net(), backend="slimfit_fx", **options)
    for _ in range(2):
        with pytest.raises(error, match=match) as found:
            compiled(X)
        assert isinstance(found.value, SlimFitError)
        assert type(found.value).__name__ == error.__name__


def test_a_function_is_no_module():
    compiled = torch.compile(lambda x: F.gelu(x), backend="slimfit_fx")
    with pytest.raises(BackendError, match="compiles modules"):
        compiled(X)


def test_the_named_backend_takes_a_mode():
    model = Net()
    torch.compile(model, backend="slimfit_fx", mode="eager")(X).sum().backward()
    assert session_of(model).config == slimfit_fx.Config(mode="eager")
    with pytest.raises(StateError, match="with other options"):
        torch.compile(model, backend="slimfit_fx", options={"freeze_rate": 0.5})(X[:3])


class Between(nn.Module):
    """Between graph breaks, a piece without layers whose operator depends on data: Longformer's kind."""

    def __init__(self, *, with_layer: bool):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head, self.with_layer = nn.Linear(8, 8), nn.Linear(8, 3), with_layer

    def forward(self, x):
        hidden = F.gelu(self.first(x))
        hidden = self.piece(hidden, x)
        torch._dynamo.graph_break()
        return self.head(hidden)

    def piece(self, hidden, x):
        longest = (x > 0).sum(1).max()
        torch._dynamo.graph_break()
        kept = (torch.arange(longest, device=x.device) < 3).sum()
        return (self.first(hidden) if self.with_layer else hidden) * kept


@pytest.mark.parametrize("way", ["transform", "named backend"])
def test_a_piece_without_layers_may_run_eagerly(way):
    plain = Between(with_layer=False)
    slim = copy.deepcopy(plain)
    options = dict(mode="eager", preset="exact", always_open=())
    if way == "transform":
        call = slimfit_fx.transform(slim, **options)
    else:
        call = torch.compile(slim, backend="slimfit_fx", options=options)
        call(X)
    slimfit_fx.gates(slim).set(["head.weight"])
    torch.manual_seed(0)
    loss_of(call(X)).backward()
    _, expected = run(plain, {"x": X})
    assert slim.first.weight.grad is None
    torch.testing.assert_close(slim.head.weight.grad, expected["head.weight"])


def test_an_operator_of_a_graph_with_layers_that_depends_on_data_is_named():
    slim = transformed(Between(with_layer=True), always_open=())
    with pytest.raises(BackendError, match="depends on data.*_local_scalar_dense") as error:
        slim(X)
    assert "torch.compiler.disable" in str(error.value)


@pytest.mark.parametrize("bag", [False, True])
def test_embeddings_with_sparse_gradients_have_no_gate(bag):
    class Sparse(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.words = nn.EmbeddingBag(9, 8, sparse=True) if bag else nn.Embedding(9, 8, sparse=True)
            self.head = nn.Linear(8, 3)

        def forward(self, i):
            return self.head(self.words(i))

    i = torch.arange(20).view(4, 5) % 9
    plain = Sparse()
    slim = transformed(plain, always_open=())
    assert slimfit_fx.gates(slim).names == ("head.weight",)
    plain(i).sum().backward()
    slim(i).sum().backward()
    assert slim.words.weight.grad.is_sparse
    torch.testing.assert_close(slim.words.weight.grad.to_dense(), plain.words.weight.grad.to_dense())


def test_torchs_own_errors_stay_torchs():
    """A program that no backend compiles: the error is the one that torch.compile has."""

    class Bad(Net):
        def forward(self, x):
            return super().forward(x) @ torch.ones(7, 7)

    errors = []
    for slim in (False, True):
        torch._dynamo.reset()
        model = Bad()
        if slim:
            slimfit_fx.transform(model, mode="eager")
        else:
            model.compile(backend="aot_eager")
        with pytest.raises(RuntimeError) as error:
            model(X)
        errors.append(error)
    assert errors[0].type is errors[1].type
    assert not isinstance(errors[1].value, SlimFitError)


def test_lazy_modules_have_no_layers_yet():
    with pytest.raises(ModelError, match=r"0\.weight has no shape yet: call the model on a batch"):
        slimfit_fx.transform(nn.Sequential(nn.LazyLinear(3)))


def test_a_parameter_without_elements_has_no_gate_and_a_gradient():
    class Empty(Net):
        def __init__(self):
            super().__init__()
            self.rest = nn.Parameter(torch.ones(0, 8))

        def forward(self, x):
            return super().forward(x) + (x @ self.rest.T).sum()

    slim = transformed(Empty())
    assert "rest" not in slimfit_fx.gates(slim)
    slim(X).sum().backward()
    assert slim.rest.grad.shape == (0, 8)


def test_nothing_is_logged_by_dynamo_in_a_common_run(caplog):
    with caplog.at_level(logging.WARNING, logger="torch._dynamo"):
        transformed(Net())(X).sum().backward()
    assert not caplog.records
