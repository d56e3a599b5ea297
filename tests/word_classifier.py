"""A model that tests of verify share, and a batch for it."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Classifier(nn.Module):
    """Embeds words, looks at them, and returns a mapping with a loss, a tuple or a tensor."""

    def __init__(self, returns: str = "loss", dropout: float = 0.0) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(11, 16), nn.LayerNorm(16)
        self.up, self.down, self.head = nn.Linear(16, 36), nn.Linear(36, 16), nn.Linear(16, 3)
        self.dropout, self.returns = nn.Dropout(dropout), returns
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, words: Tensor, labels: Tensor | None = None) -> object:
        self.calls.add_(1)
        x = self.norm(self.embed(words))
        logits = self.head(x + self.dropout(self.down(nn.functional.gelu(self.up(x))))).mean(1)
        if self.returns == "tensor":
            return logits
        loss = nn.functional.cross_entropy(logits, labels)
        return Output(loss, logits) if self.returns == "loss" else (loss, logits)


class Output(dict):
    """As transformers' ModelOutput: a dict with attributes."""

    def __init__(self, loss: Tensor, logits: Tensor) -> None:
        super().__init__(loss=loss, logits=logits)
        self.loss = loss


def batch(size: int = 4) -> dict[str, Tensor]:
    return {"words": torch.randint(0, 11, (size, 7)), "labels": torch.randint(0, 3, (size,))}
