"""Generated code on small models of awkward sizes: many architectures, each under the presets that try it most."""

from __future__ import annotations

import pytest
import torch
from awkward_models import MODELS
from differential import Subject, faults

pytestmark = pytest.mark.inductor

CELLS = [
    ("bert", "balanced", torch.bfloat16, "model"),
    ("bert with dropout", "tight", torch.float32, "model"),
    ("roberta", "paper", torch.float32, "blocks"),
    ("distilbert", "exact", torch.float32, "model"),
    ("modernbert", "balanced", torch.float32, "model"),
    ("gpt2", "tight", torch.float32, "model"),
    ("llama", "balanced", torch.float32, "model"),
    ("gemma3", "balanced", torch.float32, "blocks"),
    ("qwen3", "tight", torch.bfloat16, "model"),
    ("opt", "paper", torch.float32, "model"),
    ("t5", "balanced", torch.float32, "blocks"),
    ("vit", "tight", torch.float32, "model"),
    ("timm vit", "balanced", torch.bfloat16, "model"),
    ("deit3", "balanced", torch.float32, "model"),
    ("beit", "tight", torch.float32, "blocks"),
    ("convnext", "balanced", torch.float32, "model"),
    ("swin", "paper", torch.float32, "model"),
]


@pytest.mark.parametrize(("name", "preset", "dtype", "regions"), CELLS)
def test_compiled_model(name, preset, dtype, regions):
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    given = [
        {k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in inputs().items()}
        for _ in range(2)
    ]
    subject = Subject(model.to(dtype).train(), given, dtype, regions, random="dropout" in name)
    assert not faults(subject, preset)
