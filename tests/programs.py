"""Generated models: hypothesis draws a program of layers, `Generated` runs it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

STEPS = (
    "linear",
    "linear_no_bias",
    "linear_2d",
    "projection",  # x @ w + b, as GPT-2 has it
    "gelu",
    "relu",
    "silu",
    "tanh",
    "dropout",
    "layer_norm",
    "rms_norm",
    "residual",
    "branch",  # one input, several linear layers
    "attention",
    "tied",  # the same weight twice
    "conv",
    "gated_unit",  # SwiGLU
    "math_attention",  # softmax(q k) v, operator by operator
    "squared_relu",
    "leaky_relu",
    "scaled",  # layer scale
)
# no powers of two, one that is a multiple of nothing but 4 and 43, a row longer than any group
AWKWARD: dict[str, Any] = dict(widths=(36, 100, 144, 172, 688), lengths=(1, 7, 8, 17, 197), batches=(1, 2, 3))


@dataclass(frozen=True)
class Program:
    """A model and its input: `steps` on x [batch, length, width]."""

    steps: tuple[str, ...]
    batch: int
    length: int
    width: int
    embedded: bool
    dtype: torch.dtype
    seed: int

    def model(self) -> Generated:
        torch._dynamo.reset()  # an example starts afresh
        torch.manual_seed(self.seed)
        return Generated(self).to(self.dtype).train()

    def inputs(self, seed: int = 0, batch: int | None = None, length: int | None = None) -> dict[str, Tensor]:
        """Other values for each seed, and of another size if one is given."""
        generator = torch.Generator().manual_seed(seed)
        size = (batch or self.batch, length or self.length)
        if self.embedded:
            return {"x": torch.randint(0, 11, size, generator=generator)}
        x = torch.randn(*size, self.width, generator=generator)
        return {"x": x.to(self.dtype).requires_grad_()}


def programs(
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16),
    widths: Sequence[int] = (4, 6, 8),
    lengths: Sequence[int] = (2, 3, 4, 5),
    batches: Sequence[int] = (2, 3, 4),
) -> st.SearchStrategy[Program]:
    return st.builds(
        Program,
        steps=st.lists(st.sampled_from(STEPS), min_size=1, max_size=6).map(lambda s: ("linear", *s)),
        batch=st.sampled_from(batches),
        length=st.sampled_from(lengths),
        width=st.sampled_from(widths),
        embedded=st.booleans(),
        dtype=st.sampled_from(dtypes),
        seed=st.integers(0, 100),
    )


class Generated(nn.Module):
    """Runs a program; the head makes the output depend on everything before it."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        width = program.width
        self.steps = program.steps
        self.embed = nn.Embedding(11, width) if program.embedded else None
        self.parts = nn.ModuleList(self._part(step, width) for step in program.steps)
        self.head = nn.Linear(width, 3)

    @staticmethod
    def _part(step: str, width: int) -> nn.Module:
        linear = lambda n: nn.ModuleList(nn.Linear(width, width) for _ in range(n))  # noqa: E731
        parts = {
            "linear": lambda: linear(1),
            "linear_no_bias": lambda: nn.ModuleList([nn.Linear(width, width, bias=False)]),
            "linear_2d": lambda: linear(1),
            "projection": lambda: nn.ParameterList([torch.randn(width, width) / width**0.5, torch.zeros(width)]),
            "layer_norm": lambda: nn.LayerNorm(width),
            "rms_norm": lambda: nn.RMSNorm(width),
            "branch": lambda: linear(3),
            "attention": lambda: linear(4),
            "tied": lambda: linear(1),
            "conv": lambda: nn.Conv1d(width, width, 3, padding=1),
            "gated_unit": lambda: linear(3),
            "math_attention": lambda: linear(4),
            "scaled": lambda: nn.ParameterList([torch.linspace(0.5, 1.5, width)]),
        }
        return parts.get(step, nn.Identity)()

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.embed is None else self.embed(x)
        first = x
        for step, part in zip(self.steps, self.parts, strict=True):
            x = self._run(step, part, x, first)
        return self.head(x)

    @staticmethod
    def _run(step: str, part: nn.Module, x: Tensor, first: Tensor) -> Tensor:
        if step in ("linear", "linear_no_bias"):
            return part[0](x)
        if step == "linear_2d":
            return part[0](x.reshape(-1, x.shape[-1])).view(x.shape)
        if step == "projection":
            return torch.addmm(part[1], x.reshape(-1, x.shape[-1]), part[0]).view(x.shape)
        if step in ("gelu", "relu", "silu", "tanh"):
            return getattr(torch if step == "tanh" else F, step)(x)
        if step == "dropout":
            return F.dropout(x, 0.3, training=True)
        if step in ("layer_norm", "rms_norm"):
            return part(x)
        if step == "residual":
            return x + first
        if step == "branch":
            return part[0](x) * part[1](x).sigmoid() + part[2](x)
        if step == "attention":
            heads = [layer(x).unflatten(-1, (2, -1)).transpose(1, 2) for layer in part[:3]]
            return part[3](F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))
        if step == "math_attention":
            q, k, v = (layer(x).unflatten(-1, (2, -1)).transpose(1, 2) for layer in part[:3])
            weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
            return part[3]((weights @ v).transpose(1, 2).flatten(2))
        if step == "squared_relu":
            return F.relu(x).square()
        if step == "leaky_relu":
            return F.leaky_relu(x, 0.2)
        if step == "scaled":
            return x * part[0]
        if step == "tied":
            return F.linear(part[0](x), part[0].weight)
        if step == "conv":
            return part(x.transpose(1, 2)).transpose(1, 2)
        return part[2](F.silu(part[0](x)) * part[1](x))
