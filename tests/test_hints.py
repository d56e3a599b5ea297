"""Hints: one sentence for what will hurt, before it does; once, and nothing where all is well."""

from __future__ import annotations

import logging

import pytest
import torch
import transformers
from torch import nn

import slimfit_fx
from slimfit_fx.compiler.origin import Origin
from slimfit_fx.hints import Hints
from slimfit_fx.runtime.recompiles import limit_is_near, sizes_change
from slimfit_fx.scheduling.fused import not_fused

SMALL = dict(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)


@pytest.fixture
def hints(caplog):
    """The hints so far."""
    caplog.set_level(logging.WARNING, logger="slimfit_fx")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "slimfit_fx"]


def bert(kind=transformers.BertForSequenceClassification, **options):
    return kind(transformers.BertConfig(**{**SMALL, **options})).train()


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 3))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, *shapes: tuple[int, ...]) -> None:
    for shape in shapes:
        model(torch.randn(*shape)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    ("kind", "config", "fitting"),
    [
        (transformers.BertForSequenceClassification, dict(num_labels=3), "single_label_classification"),
        (transformers.BertForSequenceClassification, dict(num_labels=1), "regression"),
        (transformers.BertForMultipleChoice, {}, None),
        (transformers.BertForTokenClassification, dict(num_labels=3), None),
        (transformers.BertForMaskedLM, {}, None),
        (transformers.BertModel, {}, None),
        (transformers.BertForSequenceClassification, dict(problem_type="multi_label_classification"), None),
    ],
)
def test_a_problem_type_that_the_forward_sets(kind, config, fitting, hints):
    slimfit_fx.transform(bert(kind, **config), mode="eager")
    if fitting is None:
        assert not hints()
    else:
        (text,) = hints()
        assert text.startswith("Everything will be compiled twice: BertForSequenceClassification sets")
        assert f'model.config.problem_type = "{fitting}"' in text


def test_the_problem_type_costs_what_the_hint_says():
    """Twice as many graphs without it, as the sentence says; as many as ever with what it advises."""
    inputs = {"input_ids": torch.ones(2, 4, dtype=torch.long), "labels": torch.tensor([0, 1])}
    graphs = []
    for problem_type in (None, "single_label_classification"):
        torch._dynamo.reset()
        model = slimfit_fx.transform(bert(problem_type=problem_type), mode="eager")
        for _ in range(3):
            model(**inputs).loss.backward()
        graphs.append(len(slimfit_fx.graphs(model)))
    assert graphs == [2, 1]


def test_another_familys_forward_and_a_wrapped_model(hints):
    config = transformers.LlamaConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, num_labels=2
    )
    slimfit_fx.transform(nn.Sequential(transformers.LlamaForSequenceClassification(config)), mode="eager")
    assert any("LlamaForSequenceClassification sets its config.problem_type" in text for text in hints())


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.mix = nn.Embedding(50, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.mix(self.embed(x)))


def test_a_large_embedding_that_trains(hints):
    model = bert(problem_type="single_label_classification", vocab_size=4096)
    slimfit_fx.transform(model, mode="eager")
    (text,) = hints()
    assert text.startswith("bert.embeddings.word_embeddings has 8")
    assert f"take {3 * 4 * 4096 * 16 / 2**10:.1f} KiB" in text
    assert "model.get_input_embeddings().requires_grad_(False)" in text


@pytest.mark.parametrize(
    ("make", "way"),
    [
        (lambda: nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 8)), "model.get_submodule('0').requires_grad_(False)"),
        (Tied, "model.embed.requires_grad_(False). That freezes head.weight, too, which it shares."),
    ],
)
def test_how_to_freeze_it(make, way, hints):
    slimfit_fx.transform(make(), mode="eager")
    (text,) = hints()
    assert text.endswith(way + ("" if "too" in way else "."))


@pytest.mark.parametrize(
    ("make", "config"),
    [
        (lambda: nn.Sequential(nn.Embedding(50, 8, sparse=True), nn.Linear(8, 8)), {}),
        (lambda: nn.Sequential(nn.Embedding(50, 8).requires_grad_(False), nn.Linear(8, 8)), {}),
        (lambda: nn.Sequential(nn.Embedding(8, 8), nn.Linear(8, 64)), {}),
        (lambda: nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 8)), {"policy": "static", "always_open": ["1"]}),
        (mlp, {}),
    ],
    ids=["sparse", "frozen", "small", "static", "none"],
)
def test_no_word_of_embeddings_that_cost_little(make, config, hints):
    slimfit_fx.transform(make(), mode="eager", **config)
    assert not hints()


@pytest.mark.parametrize("regions", ["model", "blocks"])
def test_lengths_that_change(regions, hints):
    model = slimfit_fx.transform(mlp(), mode="eager", regions=regions)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, fused=True)
    train(model, optimizer, (4, 3, 8), (4, 3, 8))
    assert not hints()
    train(model, optimizer, (4, 5, 8), (4, 7, 8), (2, 9, 8))
    (text,) = hints()
    assert text.startswith("Inputs change in size, so ")
    assert "drop_last=True" in text


def test_lengths_that_change_under_torch_compile(hints):
    plain = mlp()
    model = torch.compile(plain, backend="slimfit_fx", options={"mode": "eager"})
    train(model, torch.optim.SGD(plain.parameters(), 0.1, fused=True), (4, 3, 8), (4, 5, 8), (4, 7, 8))
    assert [text[:21] for text in hints()] == ["Inputs change in size"]


def test_a_size_that_was_announced_is_no_news(hints):
    model = slimfit_fx.transform(mlp(), mode="eager")
    for length in (3, 5, 7):
        x = torch.randn(4, length, 8)
        torch._dynamo.mark_dynamic(x, 1)
        model(x).sum().backward()
    assert not hints()


class Switched(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x, kind: str = ""):
        return self.layer(x) * len(kind)


def test_the_recompile_limit_is_near(hints):
    model, counts = slimfit_fx.transform(Switched(), mode="eager"), []
    with torch._dynamo.config.patch(recompile_limit=4):
        for kind in "abcd":
            model(torch.randn(2, 8), kind).sum().backward()
            counts.append(len(hints()))
    assert counts == [0, 0, 1, 1]
    (text,) = hints()
    assert text.startswith("The model is compiled again, as graph 3 of at most 4: one that was made for args[1] ==")
    assert "torch.compile gives up, which is a BackendError" in text


def test_other_reasons_are_not_sizes():
    assert sizes_change(Origin(changed="L['kind'] == 'a'")) is None
    assert sizes_change(Origin()) is None
    assert limit_is_near(Origin(number="0/7")) is None


OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, 0.1),
    "Adam": lambda p: torch.optim.Adam(p, 0.1, fused=False),
    "SGD": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_that_could_be_fused(name, hints):
    model = slimfit_fx.transform(mlp(), mode="eager")
    for _ in range(2):
        train(model, OPTIMIZERS[name](model.parameters()), (4, 8), (4, 8))
    (text,) = hints()
    assert text.startswith(f"{name} makes temporaries")
    assert f"torch.optim.{name}(..., fused=True)" in text


class Own(torch.optim.AdamW):
    pass


@pytest.mark.parametrize(
    "make",
    [
        *(lambda p, k=k: getattr(torch.optim, k)(p, 0.1, fused=True) for k in OPTIMIZERS),
        lambda p: torch.optim.AdamW(p, 0.1, foreach=True),
        lambda p: torch.optim.SGD(p, 0.1, differentiable=True),
        lambda p: torch.optim.Rprop(p, 0.1),
        lambda p: torch.optim.LBFGS(p),
        lambda p: Own(p, 0.1),
    ],
)
def test_optimizers_that_are_well(make):
    optimizer = make(list(mlp().parameters()))
    assert not_fused(optimizer) is None


def test_parameters_that_no_fused_kernel_takes():
    sparse = nn.Embedding(4, 2, sparse=True)
    sparse(torch.tensor([1])).sum().backward()
    assert not_fused(torch.optim.SGD(sparse.parameters(), 0.1)) is None
    for options in (dict(dtype=torch.complex64), dict(device="meta")):
        parameter = nn.Parameter(torch.zeros(2, **options))
        assert not_fused(torch.optim.SGD([parameter], 0.1)) is None


def test_a_run_that_is_well_is_silent(hints):
    model = bert(problem_type="single_label_classification")
    slimfit_fx.transform(model, mode="eager")
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
    for _ in range(3):
        model(input_ids=torch.ones(2, 4, dtype=torch.long), labels=torch.tensor([0, 1])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not hints()


def test_an_optimizer_of_another_model_is_no_business_of_ours(hints):
    slimfit_fx.transform(mlp(), mode="eager")
    other = mlp()
    train(other, torch.optim.AdamW(other.parameters()), (4, 8))
    assert not hints()


def test_a_hint_that_fails_stops_nothing(hints):
    def fails():
        raise AttributeError("a model of another kind")

    given = Hints()
    given.give("kind", fails)
    given.give("kind", lambda: "a sentence")
    given.give("kind", lambda: "another")
    assert hints() == ["a sentence"]


def test_configs_of_any_shape_are_taken(hints):
    model = mlp()
    for model.config in ({"problem_type": None}, None, type("Config", (), {"problem_type": None})(), "text"):
        slimfit_fx.undo(slimfit_fx.transform(model, mode="eager"))
    assert not hints()
