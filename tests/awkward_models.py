"""Two blocks of many architectures, at sizes that divide nothing, without dropout unless the name says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm
import torch
import transformers
from torch import Tensor, nn

Built = tuple[nn.Module, Callable[[], dict[str, Any]]]

SIZES: dict[str, Any] = dict(
    hidden_size=36, num_hidden_layers=2, num_attention_heads=2, intermediate_size=100, vocab_size=50
)
ROTARY: dict[str, Any] = dict(num_key_value_heads=1, head_dim=18, pad_token_id=0, attn_implementation="sdpa")
NO_DROPOUT: dict[str, Any] = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def text(batch: int = 3, length: int = 17) -> dict[str, Tensor]:
    return {
        "input_ids": torch.randint(2, 50, (batch, length)),
        "attention_mask": torch.ones(batch, length, dtype=torch.long),
    }


def classifier(name: str, **options: Any) -> Built:
    """An encoder with a head for classes."""
    config = getattr(transformers, f"{name}Config")(**{**SIZES, "pad_token_id": 0, **options})
    config.problem_type = "single_label_classification"  # else the first forward sets it: a recompile
    model = getattr(transformers, f"{name}ForSequenceClassification")(config)
    return model, lambda: {**text(), "labels": torch.randint(0, 2, (3,))}


def decoder(name: str, batch: int = 2, length: int = 17, **options: Any) -> Built:
    """A language model."""
    config_class = {"Gemma3": "Gemma3TextConfig"}.get(name, f"{name}Config")
    model_class = {"GPT2": "GPT2LMHeadModel"}.get(name, f"{name}ForCausalLM")
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**{**SIZES, **options}))
    return model, lambda: {**(words := text(batch, length)), "labels": words["input_ids"], "use_cache": False}


def translator(name: str, **options: Any) -> Built:
    """An encoder and a decoder."""
    config = getattr(transformers, f"{name}Config")(vocab_size=50, d_model=36, decoder_start_token_id=0, **options)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    return model, lambda: {**text(), "labels": torch.randint(2, 50, (3, 8)), "use_cache": False}


def pictures(name: str, size: int, batch: int = 2, **options: Any) -> Built:
    """A model of timm."""
    model = timm.create_model(name, num_classes=3, **options)
    return model, lambda: {"x": torch.randn(batch, 3, size, size)}


def vit() -> Built:
    """197 tokens, as in the published sizes."""
    config = transformers.ViTConfig(image_size=224, patch_size=16, **{**SIZES, **NO_DROPOUT})
    model = transformers.ViTForImageClassification(config)
    return model, lambda: {"pixel_values": torch.randn(1, 3, 224, 224), "labels": torch.randint(0, 2, (1,))}


TIMM_VIT: dict[str, Any] = dict(img_size=32, patch_size=8, embed_dim=36, depth=2, num_heads=2)
MODELS: dict[str, Callable[[], Built]] = {
    "bert": lambda: classifier("Bert", **NO_DROPOUT),
    "bert with dropout": lambda: classifier("Bert"),
    "roberta": lambda: classifier("Roberta", **NO_DROPOUT),
    "distilbert": lambda: classifier(
        "DistilBert", dim=36, n_layers=2, n_heads=2, hidden_dim=100, dropout=0.0, attention_dropout=0.0,
        seq_classif_dropout=0.0,
    ),
    "modernbert": lambda: classifier("ModernBert", global_attn_every_n_layers=2),
    "gpt2": lambda: decoder("GPT2", n_embd=36, n_layer=2, n_head=2, embd_pdrop=0.0, resid_pdrop=0.0, attn_pdrop=0.0),
    "llama": lambda: decoder("Llama", intermediate_size=688, **ROTARY),
    "gemma3": lambda: decoder("Gemma3", **ROTARY),
    "qwen3": lambda: decoder("Qwen3", length=7, **ROTARY),
    "opt": lambda: decoder("OPT", ffn_dim=100, word_embed_proj_dim=36, dropout=0.0, pad_token_id=0),
    "t5": lambda: translator("T5", d_ff=100, d_kv=18, num_layers=2, num_heads=2, dropout_rate=0.0),
    "vit": vit,
    "timm vit": lambda: pictures("vit_tiny_patch16_224", 32, **TIMM_VIT),
    "deit3": lambda: pictures("deit3_small_patch16_224", 32, **TIMM_VIT),
    "beit": lambda: pictures("beit_base_patch16_224", 32, **TIMM_VIT),
    "convnext": lambda: pictures("convnext_atto", 32, depths=(1, 1, 1, 1), dims=(9, 10, 18, 36)),
    "swin": lambda: pictures(
        "swin_tiny_patch4_window7_224", 32, img_size=32, window_size=4, embed_dim=18, depths=(1, 1), num_heads=(1, 2),
        drop_path_rate=0.0,
    ),
}  # fmt: skip
