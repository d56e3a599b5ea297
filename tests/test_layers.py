from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import transformers
from torch import nn

from slimfit_fx import Config, ConfigError, ModelError
from slimfit_fx.model.layers import find_head, find_layers

TINY: dict[str, Any] = dict(
    vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8
)


@pytest.fixture
def bert():
    return transformers.BertForSequenceClassification(transformers.BertConfig(**TINY))


def names(layers):
    return [layer.name for layer in layers]


def test_matrices_and_norm_weights_are_layers_biases_are_not(bert):
    found = names(find_layers(bert, Config()))
    assert "bert.encoder.layer.0.attention.self.query.weight" in found
    assert "bert.encoder.layer.0.output.LayerNorm.weight" in found
    assert not [name for name in found if name.endswith("bias")]


def test_bert_base_has_the_papers_count_of_layers():
    """102 layers in BERT-base for classification (paper, section 4)."""
    with torch.device("meta"):
        model = transformers.BertForSequenceClassification(transformers.BertConfig())
    assert len(find_layers(model, Config())) == 102


def test_the_head_is_always_open(bert):
    assert [layer.name for layer in find_layers(bert, Config()) if layer.always_open] == ["classifier.weight"]
    vit = timm.models.VisionTransformer(img_size=16, patch_size=8, embed_dim=8, depth=1, num_heads=1)
    assert [layer.name for layer in find_layers(vit, Config()) if layer.always_open] == ["head.weight"]


def test_a_language_models_output_embedding_is_no_fresh_head():
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_key_value_heads=1, **TINY))
    assert find_head(model, [name for name, _ in model.named_parameters()]) == []


def test_granularity(bert):
    modules = find_layers(bert, Config(granularity="module"))
    assert "bert.encoder.layer.1.output.dense" in names(modules)
    blocks = {layer.name: layer for layer in find_layers(bert, Config(granularity="block"))}
    assert len(blocks["bert.encoder.layer.1"].parameters) == 8
    every = sorted(name for layer in find_layers(bert, Config()) for name in layer.parameters)
    for layers in (modules, blocks.values()):
        assert sorted(name for layer in layers for name in layer.parameters) == every


def test_patterns(bert):
    layers = find_layers(bert, Config(never_gate=("embeddings",), always_open=("query", "classifier")))
    assert not [name for name in names(layers) if "embeddings" in name]
    assert {layer.name for layer in layers if layer.always_open} == {
        "bert.encoder.layer.0.attention.self.query.weight",
        "bert.encoder.layer.1.attention.self.query.weight",
        "classifier.weight",
    }


@pytest.mark.parametrize("field", ["never_gate", "always_open"])
def test_a_pattern_that_matches_nothing(bert, field):
    with pytest.raises(ConfigError, match=f"{field}: 'classifer' matches no trained parameter"):
        find_layers(bert, Config(**{field: ("classifer",)}))


def test_frozen_parameters_have_no_gate(bert):
    bert.bert.requires_grad_(False)
    assert names(find_layers(bert, Config())) == ["classifier.weight"]


@pytest.mark.parametrize("model", [nn.ReLU(), nn.Linear(2, 2).requires_grad_(False), nn.BatchNorm1d(2, affine=False)])
def test_nothing_to_freeze(model):
    with pytest.raises(ModelError, match="has no layer to freeze"):
        find_layers(model, Config())
