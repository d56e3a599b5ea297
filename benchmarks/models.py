"""The models of the benchmarks: their architecture with random weights, and a batch of random inputs for each.

models.json says what there is; a family is a kind of transformers model with its inputs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

Inputs = dict[str, torch.Tensor]
CLASSES = 2
# "length" is tokens, for images pixels a side
MODELS: Mapping[str, dict[str, Any]] = json.loads((Path(__file__).parent / "models.json").read_text())


def build(
    name: str, batch: int | None = None, length: int | None = None, overrides: Mapping[str, Any] | None = None
) -> tuple[nn.Module, Inputs]:
    """The model `name` in training mode and one batch; what is None is as in models.json, `overrides` are fields of
    its transformers config."""
    entry = MODELS[name]
    config = {**entry.get("config", {}), **(overrides or {})}
    return FAMILIES[entry["family"]](batch or entry["batch"], length or entry["length"], config)


def _bert(batch: int, length: int, config: dict[str, Any]) -> tuple[nn.Module, Inputs]:
    """A classifier with dropout 0.1; BERT-base where `config` says nothing else."""
    from transformers import BertConfig, BertForSequenceClassification

    model = BertForSequenceClassification(
        BertConfig(
            num_labels=CLASSES,  # type: ignore[call-arg]  (a field of every config, passed on)
            problem_type="single_label_classification",
            max_position_embeddings=max(512, length),
            **config,
        )
    )
    inputs = {
        "input_ids": torch.randint(0, model.config.vocab_size, (batch, length)),
        "attention_mask": torch.ones(batch, length, dtype=torch.long),
        "labels": torch.randint(0, CLASSES, (batch,)),
    }
    return model.train(), inputs


def _vit(batch: int, size: int, config: dict[str, Any]) -> tuple[nn.Module, Inputs]:
    """An image classifier on images of `size` pixels a side; ViT-B/16 where `config` says nothing else."""
    from transformers import ViTConfig, ViTForImageClassification

    model = ViTForImageClassification(
        ViTConfig(
            image_size=size,
            num_labels=CLASSES,  # type: ignore[call-arg]
            problem_type="single_label_classification",
            **config,
        )
    )
    inputs = {"pixel_values": torch.randn(batch, 3, size, size), "labels": torch.randint(0, CLASSES, (batch,))}
    return model.train(), inputs


def _llama(batch: int, length: int, config: dict[str, Any]) -> tuple[nn.Module, Inputs]:
    """A language model that learns its own input, shifted by one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(max_position_embeddings=length, use_cache=False, **config))
    tokens = torch.randint(0, model.config.vocab_size, (batch, length))
    return model.train(), {"input_ids": tokens, "labels": tokens.clone()}


FAMILIES: Mapping[str, Callable[[int, int, dict[str, Any]], tuple[nn.Module, Inputs]]] = {
    "bert": _bert,
    "vit": _vit,
    "llama": _llama,
}
