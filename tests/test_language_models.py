"""Training of language models: tied embeddings, generation, checkpointing, adapters, batches of changing sizes."""

from __future__ import annotations

import pytest
import torch
import transformers
from helpers import no_recompile
from torch import nn
from training_loops import adamw, assert_same, transformed

import slimfit_fx


def tiny_llama() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=True, max_position_embeddings=32,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).train()


def tokens(batch: int = 2, length: int = 8) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 32, (batch, length), generator=torch.Generator().manual_seed(batch * length))
    return {"input_ids": ids, "labels": ids}


def language_loop(model, steps: int = 3, **inputs) -> None:
    optimizer = adamw([p for p in model.parameters() if p.requires_grad])
    for _ in range(steps):
        optimizer.zero_grad()
        model(**(inputs or tokens())).loss.backward()
        optimizer.step()


def train_open_and_frozen(model: nn.Module, **frozen_config) -> nn.Module:
    """Trains the model, a copy with all gates open, which must stay the same and is returned, and one half frozen."""
    slim, frozen = transformed(model), transformed(model, freeze_rate=0.5, **frozen_config)
    for each in (model, slim, frozen):
        language_loop(each)
    assert_same(slim, model, 1e-4)
    assert slimfit_fx.scheduler(frozen).state.step == 3
    return slim


def test_tied_embeddings_and_generation():
    model = tiny_llama()
    slim = transformed(model)
    language_loop(model)
    language_loop(slim)
    assert_same(slim, model, 1e-4)
    prompt = tokens()["input_ids"]
    generated = [m.eval().generate(prompt, max_new_tokens=4, do_sample=False) for m in (model, slim)]
    assert torch.equal(*generated)
    slim.train()
    language_loop(slim, 1)


def test_checkpointed_blocks_of_transformers():
    model = tiny_llama()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    train_open_and_frozen(model, preset="balanced")


def test_adapters_are_layers():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.0, init_lora_weights=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny_llama(), config)
    slim = train_open_and_frozen(model)
    assert all("lora" in name for name in slimfit_fx.gates(slim).names)
    assert len(slimfit_fx.gates(slim)) == 8


def test_changing_batches_recompile_once():
    slim = transformed(tiny_llama(), freeze_rate=0.5)
    for batch, length in ((2, 8), (3, 9)):
        language_loop(slim, 1, **tokens(batch, length))
    with no_recompile():
        for batch, length in ((4, 11), (5, 6), (2, 8)):
            language_loop(slim, 1, **tokens(batch, length))
