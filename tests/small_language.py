"""A small language model whose head and loss come in many forms, and its gradients."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import slimfit_fx

WIDTH, WORDS = 44, 333  # words: no multiple of a part
IDS = torch.randint(0, WORDS, (3, 38), generator=torch.Generator().manual_seed(1))


class Language(nn.Module):
    """An embedding, a layer, and a head with whatever is between it and the loss."""

    def __init__(self, bias=False, cap=0.0, scale=1.0, pad=False, tied=False, answer="loss", **loss: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(WORDS, WIDTH)
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=bias)
        if tied:
            self.head.weight = self.words.weight
        self.cap, self.scale, self.pad, self.answer, self.loss = cap, scale, pad, answer, loss

    def forward(self, ids, labels=None):
        logits = self.head(F.gelu(self.layer(self.words(ids))))
        scores = self.scale * logits if self.scale != 1 else logits
        if self.cap:
            scores = torch.tanh(scores / self.cap) * self.cap
        if labels is None:
            return logits
        scores = scores.float()
        if self.pad:
            labels = F.pad(labels, (0, 1), value=self.loss.get("ignore_index", -100))
            labels = labels[..., 1:].contiguous().view(-1)
        else:
            scores, labels = scores[..., :-1, :].contiguous(), labels[..., 1:].reshape(-1)
        loss = F.cross_entropy(scores.view(-1, WORDS), labels, **self.loss)
        if self.answer == "tuple":
            return loss, logits
        if self.answer == "dict":
            return {"loss": loss, "logits": logits}
        if self.answer == "accuracy":
            return loss, (logits.argmax(-1) == ids).float().mean()
        return loss


def gradients(model: nn.Module, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, a sum if there are several, and the gradients that there are."""
    model.zero_grad()
    inputs = inputs or {"ids": IDS, "labels": IDS}
    outputs = model(**inputs)
    loss = outputs if isinstance(outputs, Tensor) else outputs[0] if isinstance(outputs, tuple) else outputs["loss"]
    (loss * torch.linspace(0.5, 1.5, loss.numel()).view(loss.shape)).sum().backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(found: tuple[Tensor, dict], expected: tuple[Tensor, dict], tolerance: float = 2e-6) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=tolerance, atol=tolerance)
    assert found[1].keys() == expected[1].keys()
    whole = sum(float(gradient.square().sum()) for gradient in expected[1].values()) ** 0.5
    for name, exact in expected[1].items():
        error = (found[1][name] - exact).norm()
        assert error <= tolerance * max(float(exact.norm()), 1e-4 * whole), (name, float(error / exact.norm()))


def in_parts(model: nn.Module) -> bool:
    """Whether the head's loss is made in parts; then nothing as large as a part of the logits is saved."""
    report = slimfit_fx.report(model)
    if not report.plan.heads:
        return False
    assert "logits" not in {row["role"] for row in report.rows}
    assert max(row["bytes"] for row in report.rows) < IDS.numel() * WORDS * 4 / 4
    return True
