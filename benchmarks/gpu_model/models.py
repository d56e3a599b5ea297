"""The models that code is generated for, on the meta device, each with a batch.

`small` ones have every operator of the real ones and compile fast; the real ones are those of the table. BERT has
dropout and no attention mask, the ViT is timm's, whose query, key and value are one linear layer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Inputs = dict[str, torch.Tensor]
_kept: list[torch.library.Library] = []  # what they define goes when they go


@dataclass(frozen=True)
class Model:
    """A model by its sizes.

    Attributes:
        family: "bert", "vit" or "llama".
        layers: of the whole model.
        length: tokens, or pixels a side.
        config: fields of the family's configuration.
    """

    family: str
    layers: int
    length: int
    config: Mapping[str, Any]

    def build(self, batch: int, layers: int | None = None, device: str = "meta") -> tuple[nn.Module, Inputs]:
        """The model in training mode, with another number of layers if asked for, and a batch of inputs."""
        _import_torchvision()
        with torch.device(device):
            model, inputs = _FAMILIES[self.family](batch, self.length, layers or self.layers, dict(self.config))
        return model.train(), inputs


def _bert(batch: int, length: int, layers: int, config: dict[str, Any]) -> tuple[nn.Module, Inputs]:
    from transformers import BertConfig, BertForSequenceClassification

    kind: dict[str, Any] = {
        "num_labels": 2,
        "problem_type": "single_label_classification",
        "attn_implementation": "sdpa",
    }
    kind["use_cache"] = False  # else checkpointing logs a warning, at which Dynamo breaks the graph
    model = BertForSequenceClassification(BertConfig(num_hidden_layers=layers, **{**kind, **config}))
    return model, {"input_ids": _tokens(batch, length), "labels": torch.randint(0, 2, (batch,))}


def _vit(batch: int, length: int, layers: int, config: dict[str, Any]) -> tuple[nn.Module, Inputs]:
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(img_size=length, depth=layers, **config)
    return model, {"x": torch.randn(batch, 3, length, length)}


def _llama(batch: int, length: int, layers: int, config: dict[str, Any]) -> tuple[nn.Module, Inputs]:
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama import modeling_llama

    # None: causal attention without a mask, as an eager run finds out by reading the positions. What is traced, or
    # stands on the meta device, cannot be read, and would have a mask, and so another kernel.
    setattr(modeling_llama, "create_causal_mask", lambda *_, **__: None)  # noqa: B010
    kind: dict[str, Any] = {"use_cache": False, "attn_implementation": "sdpa", "max_position_embeddings": length}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **kind, **config))
    return model, {"input_ids": _tokens(batch, length), "labels": _tokens(batch, length)}


def _tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(2, 50, (batch, length))


@functools.cache
def _import_torchvision() -> None:
    """timm and transformers import it. Its CUDA build does not load next to a CPU torch: its operators' names do."""
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _kept.append(library)


_FAMILIES: Mapping[str, Callable[[int, int, int, dict[str, Any]], tuple[nn.Module, Inputs]]] = {
    "bert": _bert,
    "vit": _vit,
    "llama": _llama,
}
_SMALL_TEXT = {"hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 512}
SMALL: Mapping[str, Model] = {
    "bert": Model("bert", 2, 32, {**_SMALL_TEXT, "vocab_size": 1000}),
    "vit": Model("vit", 2, 64, {"embed_dim": 128, "num_heads": 2, "num_classes": 10}),
    "llama": Model("llama", 2, 64, {**_SMALL_TEXT, "num_key_value_heads": 1, "vocab_size": 1000}),
}
# for the interpreter: operators that a CPU has, nothing random
TINY = Model(
    "bert",
    1,
    8,
    {
        "hidden_size": 16,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "vocab_size": 60,
        "max_position_embeddings": 8,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "attn_implementation": "eager",
    },
)
# the sizes of Llama 3.2 1B, its vocabulary cut from 128,256 to 32,000
_LLAMA_1B = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
}
REAL: Mapping[str, Model] = {
    "bert-base-128": Model("bert", 12, 128, {}),
    "bert-base-384": Model("bert", 12, 384, {}),
    "vit-b16-224": Model("vit", 12, 224, {}),
    "vit-b16-384": Model("vit", 12, 384, {}),
    "llama-1b-2048": Model("llama", 16, 2048, _LLAMA_1B),
}
