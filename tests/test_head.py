"""The head is found through whatever is wrapped around a model."""

from __future__ import annotations

import warnings
from typing import Any

import peft
import pytest
import timm
import torch
import transformers
from torch import nn

import slimfit_fx
from slimfit_fx import Config, SlimFitWarning
from slimfit_fx.model.layers import find_layers

TINY: dict[str, Any] = dict(
    vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
)


def bert(kind=transformers.BertForSequenceClassification):
    return kind(transformers.BertConfig(**TINY))


def llama(kind):
    return kind(transformers.LlamaConfig(num_key_value_heads=2, pad_token_id=0, **TINY))


def vit(classes):
    return timm.models.VisionTransformer(
        img_size=16, patch_size=8, embed_dim=32, depth=1, num_heads=1, num_classes=classes
    )


def lora(model, targets, **options):
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, **options))


class Own(nn.Module):
    def __init__(self, body, name):
        super().__init__()
        self.body = body
        setattr(self, name, nn.Linear(32, 3))


class Parallel(nn.Module):
    """As DistributedDataParallel, and a module with losses or metrics beside the model."""

    def __init__(self, module):
        super().__init__()
        self.module, self.loss = module, nn.CrossEntropyLoss()

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


SAVED = "modules_to_save.default.weight"
PLAIN = lambda: nn.Sequential(nn.Linear(32, 32), nn.GELU())  # noqa: E731
HEADS = {
    "peft classifier": (lambda: lora(bert(), ["query"], task_type="SEQ_CLS"), f"base_model.model.classifier.{SAVED}"),
    "peft, no task": (lambda: lora(bert(), ["query"]), None),
    "peft, no task, head saved": (
        lambda: lora(bert(), ["query"], modules_to_save=["classifier"]),
        f"base_model.model.classifier.{SAVED}",
    ),
    "peft tokens": (
        lambda: lora(bert(transformers.BertForTokenClassification), ["query"], task_type="TOKEN_CLS"),
        f"base_model.model.classifier.{SAVED}",
    ),
    "peft answers": (
        lambda: lora(bert(transformers.BertForQuestionAnswering), ["query"], task_type="QUESTION_ANS"),
        f"base_model.model.qa_outputs.{SAVED}",
    ),
    "peft llama classifier": (
        lambda: lora(llama(transformers.LlamaForSequenceClassification), ["q_proj"], task_type="SEQ_CLS"),
        f"base_model.model.score.{SAVED}",
    ),
    "peft language model": (
        lambda: lora(llama(transformers.LlamaForCausalLM), ["q_proj"], task_type="CAUSAL_LM"),
        None,
    ),
    "peft language model, vocabulary saved": (
        lambda: lora(llama(transformers.LlamaForCausalLM), ["q_proj"], modules_to_save=["lm_head", "embed_tokens"]),
        None,
    ),
    "peft features": (
        lambda: lora(bert(transformers.BertModel), ["query"], task_type="FEATURE_EXTRACTION"),
        None,
    ),
    "own": (lambda: Own(bert(transformers.BertModel), "classifier"), "classifier.weight"),
    "own, another name": (lambda: Own(bert(transformers.BertModel), "to_labels"), "to_labels.weight"),
    "own, timm": (lambda: Own(vit(0), "to_labels"), "to_labels.weight"),
    "own, plain": (lambda: Own(PLAIN(), "fc"), "fc.weight"),
    "own around peft": (lambda: Own(lora(bert(transformers.BertModel), ["query"]), "to_labels"), "to_labels.weight"),
    "peft around own": (
        lambda: lora(Own(bert(transformers.BertModel), "to_labels"), ["query"], modules_to_save=["to_labels"]),
        f"base_model.model.to_labels.{SAVED}",
    ),
    "peft around plain": (
        lambda: lora(Own(PLAIN(), "fc"), ["body.0"], modules_to_save=["fc"]),
        f"base_model.model.fc.{SAVED}",
    ),
    "parallel": (lambda: Parallel(bert()), "module.classifier.weight"),
    "parallel peft": (
        lambda: Parallel(lora(bert(), ["query"], task_type="SEQ_CLS")),
        f"module.base_model.model.classifier.{SAVED}",
    ),
    "parallel timm": (lambda: Parallel(vit(3)), "module.head.weight"),
    "parallel own": (lambda: Parallel(Own(bert(transformers.BertModel), "to_labels")), "module.to_labels.weight"),
    "parallel plain": (lambda: Parallel(Own(PLAIN(), "fc")), "module.fc.weight"),
    "no head": (lambda: bert(transformers.BertModel), None),
    "timm without a head": (lambda: vit(0), None),
}


@pytest.mark.parametrize("name", HEADS)
def test_only_the_head_is_always_open(name):
    make, head = HEADS[name]
    layers = find_layers(make(), Config())
    assert [layer.name for layer in layers if layer.always_open] == ([] if head is None else [head])
    assert any(not layer.always_open for layer in layers)


@pytest.mark.parametrize("name", ["peft classifier", "peft, no task", "parallel peft"])
def test_adapters_are_frozen(name):
    slim = slimfit_fx.transform(HEADS[name][0](), mode="eager", freeze_rate=0.9)
    assert slimfit_fx.scheduler(slim).freeze_rate == 0.75  # 3 of 4 adapters: 0.9 of them, rounded down
    slim(input_ids=torch.ones(2, 5, dtype=torch.long)).logits.sum().backward()
    found = {n for n, p in slim.named_parameters() if p.grad is not None}
    assert found.isdisjoint(slimfit_fx.gates(slim).closed)
    assert found.issuperset(slimfit_fx.gates(slim).open)


@pytest.mark.parametrize("options", [{"freeze_rate": 0.9}, {"memory_budget": "1GiB"}, {"policy": "static"}])
def test_a_model_that_is_all_head_is_noticed(options):
    model = bert()
    model.bert.requires_grad_(False)
    with pytest.warns(SlimFitWarning, match="every layer of BertForSequenceClassification counts as its head"):
        slimfit_fx.transform(model, mode="eager", **options)


@pytest.mark.parametrize("options", [{"freeze_rate": 0}, {"always_open": ["classifier"]}])
def test_a_model_that_is_all_head_may_train(options):
    model = bert()
    model.bert.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", SlimFitWarning)
        slimfit_fx.transform(model, mode="eager", **options)
