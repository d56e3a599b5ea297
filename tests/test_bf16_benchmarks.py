"""The benchmarks of bf16 activations: errors beside bf16's own, training runs, and the codec that they try."""

from __future__ import annotations

import pytest
import torch
import transformers

from benchmarks import bf16_error, bf16_training
from benchmarks.outliers import Outliers
from slimfit_fx import Config


@pytest.mark.parametrize("row", [688, 192, 197, 36, 7])
@pytest.mark.parametrize("kept", [1, 2])
def test_outliers_are_kept_and_the_step_is_that_of_the_rest(kept, row):
    codec = Outliers(4, 64, kept)
    size = codec._layout((row,)).size
    x = torch.randn(16, row, generator=torch.Generator().manual_seed(row)).bfloat16()
    x[:, :: max(row // 3, 1)] *= 50
    decoded = codec.decode(codec.encode(x), x.shape, x.dtype)
    groups, error = (
        torch.nn.functional.pad(tensor.double(), (0, -row % size)).unflatten(-1, (-1, size))
        for tensor in (x, decoded.double() - x.double())
    )
    order = groups.abs().sort(-1, descending=True)
    largest = order.indices[..., :kept]
    assert not error.gather(-1, largest).any()
    step = order.values[..., kept : kept + 1] / 7 * (1 + 2**-7)
    assert (error.abs() <= step / 2 + 2**-8 * groups.abs()).all()


def test_an_error_stands_beside_that_of_bf16(monkeypatch):
    def tiny(batch, length):
        config = transformers.BertConfig(
            vocab_size=30,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=128,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            problem_type="single_label_classification",
        )
        tokens = torch.randint(30, (batch, length))
        return transformers.BertForSequenceClassification(config), {"input_ids": tokens, "labels": tokens[:, 0] % 2}

    monkeypatch.setitem(bf16_error.MODELS, "tiny", tiny)
    monkeypatch.setitem(bf16_error.SIZES, "tiny", (4, 16))
    rows = list(bf16_error.measure("tiny", "^linear input int[68], group (128|64)$|^tight $", autocast=True))
    itself, tight, eight, six = rows
    assert itself["role"] == "bf16 itself"
    assert 1e-3 < itself["median"] < itself["largest"] < 0.3
    assert tight["bytes_stored"] < tight["bytes"] / 3
    assert eight["bits"] == 8 + 16 / 64  # rows of 64 are groups of 64
    assert six["bits"] == 6 + 16 / 64
    assert 2 < six["median"] / eight["median"] < 8  # a quarter of the levels
    for row in (eight, six):
        assert row["share_of_bf16s"]["median"] == pytest.approx(row["median"] / itself["median"], rel=1.0)
        assert row["against_float32"]["median"] < 1.5 * (row["median"] + itself["median"])
    assert bf16_error.table(rows).count("| tiny") == 4


def test_a_training_run(tiny_bert):
    data = tiny_bert / "data.csv"
    data.write_text("text,label\n" + "".join(f"{word} film,{int(word == 'good')}\n" for word in ["good", "bad"] * 60))
    arguments = ["--model", str(tiny_bert), "--csv", str(data)]
    results = [bf16_training.train(Config(preset="balanced"), 0, 3, arguments) for _ in range(2)]
    assert results[0] == results[1]
    assert 0 < results[0]["loss"] < 2
    assert 0 <= results[0]["accuracy"] <= 1
