"""A BERT that tests of regions share."""

from __future__ import annotations

from typing import Any

import torch
import transformers

SMALL: dict[str, Any] = dict(hidden_size=32, num_attention_heads=2, intermediate_size=64)


def bert(depth: int = 3):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, num_hidden_layers=depth, problem_type="single_label_classification", **SMALL
    )
    inputs = {
        "input_ids": torch.randint(2, 50, (4, 8)),
        "attention_mask": torch.ones(4, 8, dtype=torch.long),
        "labels": torch.randint(0, 2, (4,)),
    }
    return transformers.BertForSequenceClassification(config).train(), inputs
