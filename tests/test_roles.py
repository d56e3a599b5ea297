"""What saved tensors are called, by what the graphs do with them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import slimfit_fx
from slimfit_fx.presets import PRESETS
from slimfit_fx.runtime.registry import session_of

aten = torch.ops.aten


def roles(model: nn.Module, *inputs: Tensor, autocast: bool = False) -> dict[str, str]:
    """The role of what each module makes that is saved for the backward, logits among it."""
    options = {"preset": "exact", "always_open": (), "disable_passes": "chunk_loss"}
    slimfit_fx.transform(model.train(), mode="eager", **options)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model(*inputs)
    rows = slimfit_fx.report(model).rows
    return {row["module"]: row["role"] for row in rows if row["bytes"] and row["role"] not in ("statistics", "gates")}


class Classifier(nn.Module):
    def __init__(self, cap: float | None = None):
        super().__init__()
        self.head = nn.Linear(8, 50)
        self.cap = cap

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        logits = self.head(x)
        if self.cap:
            logits = self.cap * torch.tanh(logits / self.cap)
        return F.cross_entropy(logits.float(), y)


@pytest.mark.parametrize("cap", [None, 30.0])
@pytest.mark.parametrize("autocast", [False, True])
def test_logits_are_known_behind_conversions_and_soft_caps(cap, autocast):
    found = roles(Classifier(cap), torch.randn(4, 8), torch.randint(50, (4,)), autocast=autocast)
    assert found["head"] in ("logits", "activation output"), "the cap's tanh is saved in the place of logits"
    assert PRESETS["balanced"].codecs.get("logits") is None


class RootMeanSquare(nn.Module):
    """As transformers writes it out."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


@pytest.mark.parametrize("norm", [RootMeanSquare, lambda: nn.RMSNorm(8), lambda: nn.LayerNorm(8)])
def test_norm_inputs_are_known_and_what_is_added_to_them(norm):
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.branch, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
            self.norms = nn.ModuleList([norm(), norm()])

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            x = x + self.branch(self.norms[0](x))
            return self.last(self.norms[1](x))

    found = roles(Residual(), torch.randn(16, 8), autocast=True)
    assert {found.pop(name) for name in found.keys() & {"first", "branch", ""}} == {"norm input"}
    assert set(found.values()) <= {"linear input"}


def test_repeated_keys_and_values_are_attention_operands():
    class Grouped(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 8), nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (layer(x).unflatten(-1, (-1, 8)).transpose(1, 2) for layer in (self.q, self.k, self.v))
            k, v = (t[:, :, None].expand(-1, -1, 2, -1, -1).reshape(q.shape) for t in (k, v))
            return F.scaled_dot_product_attention(q, k, v)

    found = roles(Grouped(), torch.randn(2, 4, 16))
    assert found == dict.fromkeys(("", "k", "v"), "attention operand"), "q is transposed outside of its module"


class Fused(nn.Module):
    """A GPU's attention, which there are no kernels for on a CPU: its graphs can be looked at all the same."""

    def __init__(self, attention):
        super().__init__()
        self.i, self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(5))
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        x = self.i(x)
        q, k, v = (layer(x).unflatten(-1, (2, 8)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.o(self.attention(q, k, v)[0].transpose(1, 2).flatten(2))


@pytest.mark.parametrize(
    ("attention", "dtype"),
    [
        (lambda q, k, v: aten._scaled_dot_product_flash_attention(q, k, v, 0.1), torch.bfloat16),
        (lambda q, k, v: aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.1), torch.float32),
        (lambda q, k, v: aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.1), torch.bfloat16),
    ],
    ids=["flash", "efficient", "cudnn"],
)
def test_what_a_gpus_attention_saves(attention, dtype):
    model = slimfit_fx.transform(Fused(attention).to(dtype).train(), mode="eager", always_open=())
    with pytest.raises(NotImplementedError):
        model(torch.randn(2, 4, 16, dtype=dtype))
    _, backward = slimfit_fx.graphs(model)[-1]
    assert any("attention" in str(node.target) for node in backward.graph.nodes)
    saved = [row for capture in session_of(model).captures for row in capture.plan.saved]
    operands = [row for row in saved if row.role == "attention operand"]
    assert len(operands) == 4, "query, key, value and the result"
    assert [row.form.partition(",")[0] for row in operands] == ["int8", "int8", "int8", "rebuilt"]
    assert {row.role for row in saved if "int" in row.dtype} == {"indices"}, "seeds of the kernel's dropout"
