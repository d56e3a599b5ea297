"""Choices: what they may come to, which roles they are for, what they come to in a graph, and how JSON has them."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest
import torch
import transformers
from helpers import handed_over, run, transformed
from torch import nn

import slimfit_fx
from slimfit_fx import Config, ConfigError
from slimfit_fx.codecs import (
    BitMask,
    Choice,
    Codec,
    Derivative,
    Quantize,
    Recompute,
    TopK,
    WhenFrozen,
)
from slimfit_fx.compiler import pipeline

INT8 = Quantize(8, 32)
NESTED = [
    Recompute(None),
    Recompute(WhenFrozen(INT8)),
    Derivative(None, Recompute(INT8)),
    Derivative(INT8, Recompute(WhenFrozen(INT8))),
    Derivative(INT8, WhenFrozen(None)),
    WhenFrozen(INT8),
]


def test_a_choice_is_no_codec():
    for kind in (Recompute, Derivative, WhenFrozen):
        assert issubclass(kind, Choice)
        assert not issubclass(kind, Codec)
        assert not {"encode", "decode", "nbytes", "error_bound"} & set(dir(kind))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WhenFrozen(Recompute()), "WhenFrozen.codec takes a Codec or None, for example .*got Recompute"),
        (lambda: WhenFrozen(WhenFrozen()), "WhenFrozen.codec takes a Codec or None"),
        (lambda: WhenFrozen(codec=Derivative()), "WhenFrozen.codec takes a Codec or None"),
        (lambda: WhenFrozen(Recompute(None)), "Recompute is decided earlier: give it the WhenFrozen as its otherwise"),
        (lambda: Derivative(codec=Derivative()), "Derivative.codec takes a Codec or None"),
        (lambda: Derivative(codec=Recompute()), "Derivative.codec takes a Codec or None"),
        (lambda: Derivative(otherwise=Derivative()), "Derivative.otherwise takes a Codec or Recompute or WhenFrozen"),
        (lambda: Recompute(otherwise=Derivative()), "Derivative is decided earlier: give it the Recompute"),
        (lambda: Recompute(Recompute()), "Recompute.otherwise takes a Codec or WhenFrozen or None"),
        (lambda: Recompute("int8"), r"for example slimfit_fx.codecs.Quantize\(8\); got 'int8'"),
        (lambda: Recompute(Quantize), "got <class"),
        (lambda: WhenFrozen(0), "got 0"),
        (lambda: Recompute(BitMask()), "Recompute.otherwise: bits does not encode floats"),
        (lambda: Derivative(BitMask()), "Derivative.codec: bits does not encode floats"),
        (lambda: WhenFrozen(BitMask()), "WhenFrozen.codec: bits does not encode floats"),
    ],
)
def test_what_a_choice_cannot_come_to_is_named_when_it_is_made(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    ("role", "choice", "message"),
    [
        ("softmax output", WhenFrozen(), "WhenFrozen finds nothing to do there"),
        ("linear input", WhenFrozen(), "WhenFrozen finds nothing to do there"),
        ("attention operand", Derivative(), "Derivative finds nothing to do there"),
        ("convolution input", Derivative(None), "Derivative finds nothing to do there"),
        ("softmax output", Recompute(WhenFrozen()), "WhenFrozen finds nothing to do there"),
        ("dropout mask", Derivative(), "does not encode bool"),
        ("dropout mask", Recompute(), "does not encode bool"),
        ("indices", WhenFrozen(), "does not encode int64"),
    ],
)
def test_roles_that_a_choice_is_not_for(role, choice, message):
    with pytest.raises(ConfigError, match=re.escape(f"codecs[{role!r}]: ") + ".*" + message):
        Config(codecs={role: choice})
    Config(codecs={"blocks": choice})  # a module has tensors of many roles


def test_a_codec_without_a_decoder_is_refused_when_it_is_made():
    @dataclass(frozen=True)
    class Half(Codec):
        def encode(self, x):
            return (x,)

    with pytest.raises(TypeError, match="decode"):
        Half()  # pyright: ignore[reportAbstractUsage]


class Block(nn.Module):
    """A transformer block: attention, an activation function, a norm that trains."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.LayerNorm(32), nn.RMSNorm(32)
        self.project, self.out, self.up, self.down = (nn.Linear(*s) for s in ((32, 96), (32, 32), (32, 64), (64, 32)))

    def forward(self, x):
        query, key, value = self.project(self.first(x)).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        weights = torch.softmax(query @ key.transpose(-1, -2) / 8**0.5, -1)
        x = x + self.out((weights @ value).transpose(1, 2).flatten(2))
        return self.last(x + self.down(nn.functional.gelu(self.up(x))))


def check(model: nn.Module, inputs: dict, regions: str, codecs: dict, bound: float = 0.05, **config) -> list:
    """Gradients near the exact ones, bytes as reported, nothing left undecided; returns the plan's rows."""
    config = {"always_open": (), "freeze_rate": 0.0, "regions": regions, **config}
    exact, slim = (transformed(model, codecs=each, **config) for each in ({}, codecs))
    (_, expected), (_, found) = run(exact, inputs), run(slim, inputs)
    whole = torch.stack([gradient.norm() for gradient in expected.values() if gradient is not None]).norm()
    for name, gradient in expected.items():
        if gradient is not None and gradient.norm() > 1e-4 * whole:  # a key's bias has none but for rounding
            assert (found[name] - gradient).norm() <= bound * gradient.norm(), name
    report = slimfit_fx.report(slim)
    assert report.saved_bytes_after == handed_over(slim(**inputs), slim, inputs)
    assert all(row.undecided is None for row in report.plan.saved if row.form not in ("rebuilt", "recomputed"))
    return report.plan.saved


@pytest.mark.parametrize("regions", ["model", "blocks"])
@pytest.mark.parametrize("choice", NESTED, ids=repr)
def test_each_choice_comes_to_a_codec(choice, regions):
    torch.manual_seed(0)
    model, inputs = nn.Sequential(Block(), Block()), {"input": torch.randn(2, 16, 32)}
    rows = check(model, inputs, regions, {".": choice})
    chosen = [row for row in rows if row.choice == choice]
    assert {"softmax output", "activation input", "norm input"} <= {row.role for row in chosen}
    assert all(row.codec is None or type(row.codec) is Quantize for row in rows)


def test_the_plan_has_what_is_wanted_and_what_is_used():
    torch.manual_seed(0)
    wanted = {"norm input": WhenFrozen(INT8), "activation input": Derivative(INT8), "softmax output": Recompute(TopK())}
    rows = check(Block(), {"x": torch.randn(2, 16, 32)}, "model", wanted)
    found = {row.role: row for row in rows if not row.dynamic}
    for role, choice in wanted.items():
        assert found[role].choice == choice
    assert found["norm input"].form == "int8, group 32"
    assert found["activation input"].form == "derivative, int8, group 32"
    assert found["activation input"].codec == INT8
    assert found["softmax output"].form == Recompute().label


@pytest.mark.parametrize("otherwise", [None, INT8, WhenFrozen(INT8)], ids=repr)
def test_what_is_saved_as_a_source_is_not_computed_again(otherwise):
    """A block's input, an activation of an earlier graph, is the source of query, key and value, and of itself."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50,
        num_hidden_layers=2,
        hidden_size=32,
        num_attention_heads=2,
        intermediate_size=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="eager",
    )
    model, inputs = transformers.BertModel(config), {"input_ids": torch.randint(2, 50, (4, 8))}
    choice = Recompute(otherwise)
    wanted = dict.fromkeys(("linear input", "attention operand"), choice)
    if isinstance(otherwise, WhenFrozen):  # by name it is not for these roles
        wanted = {"layer": choice}
    rows = check(model, inputs, "blocks", wanted)
    assert [row.form for row in rows if row.role == "attention operand"].count("recomputed") >= 6
    sources = {row.form for row in rows if row.role == "linear input" and row.stored and not row.dynamic}
    assert sources == {"" if otherwise is None else "int8, group 32"}


@dataclass(frozen=True)
class InEightBits(Choice):
    """A choice of a user's: 8 bits for large tensors."""

    least: int = 64
    codec: Codec = INT8

    @property
    def default(self) -> None:
        return None


def decide_size(split, plan):
    for row in plan.saved:
        if isinstance(row.undecided, InEightBits):
            row.decide(row.undecided.codec if row.nbytes >= row.undecided.least else None)


def test_a_choice_of_ones_own_takes_a_pass(monkeypatch):
    model, inputs = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 8)), {"input": torch.randn(4, 8)}
    codecs = {"activation input": InEightBits()}
    entries, forms = pipeline.PIPELINE, []
    before = [entry.name for entry in entries].index("compress")
    for passes in ([], [pipeline.Pass(decide_size, "split")]):
        monkeypatch.setattr(pipeline, "PIPELINE", [*entries[:before], *passes, *entries[before:]])
        torch._dynamo.reset()
        rows = check(model, inputs, "model", codecs)
        forms += [row.form for row in rows if row.role == "activation input"]
    assert forms == ["", "int8, group 32"]
    assert Config.from_json(Config(codecs=codecs).to_json()).codecs == codecs
    with pytest.raises(ConfigError, match=r"InEightBits.codec takes a Codec, for example"):
        InEightBits(codec=None)


@pytest.mark.parametrize(
    ("disabled", "forms"),
    [
        ("save_derivatives", {"activation input": "int8, group 32", "softmax output": "recomputed"}),
        ("rebuild", {"activation input": "derivative, int8, group 32", "softmax output": "largest 50%"}),
        ("keep_trained", {"norm input": "", "softmax output": "recomputed"}),
        (["save_derivatives", "rebuild", "keep_trained"], {"activation input": "", "norm input": ""}),
    ],
    ids=str,
)
def test_what_choices_come_to_without_their_pass(disabled, forms):
    torch.manual_seed(0)
    pruned = WhenFrozen(TopK(0.1))
    wanted = {
        "norm input": pruned,
        "activation input": Derivative(INT8, INT8 if disabled == "save_derivatives" else Recompute(None)),
        "softmax output": Recompute(TopK(0.5)),
    }
    bound = 0.05 if "rebuild" not in disabled else 0.5  # half of the softmax is missing then
    rows = check(Block(), {"x": torch.randn(2, 16, 32)}, "model", wanted, bound, disable_passes=disabled)
    found = {row.role: row.form for row in rows if not row.dynamic}
    assert {role: found[role] for role in forms} == forms


@pytest.mark.parametrize(("codec", "noted"), [(TopK(0.5), True), (None, False)])
def test_verify_says_what_it_does_not_judge(codec, noted):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32), nn.Linear(32, 8))
    found = slimfit_fx.verify(
        model,
        torch.randn(8, 32),
        loss=lambda outputs: outputs.square().mean(),
        mode="eager",
        preset="exact",
        always_open=[],
        codecs={"norm input": WhenFrozen(codec)},
    )
    assert any("is pruned" in note for note in found.notes) == noted
