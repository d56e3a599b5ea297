"""What saved tensors are called, by what the graphs do with them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import transformed
from torch import Tensor, nn

import slimfit_fx
from slimfit_fx.presets import PRESETS
from slimfit_fx.transform import session_of

aten = torch.ops.aten


def roles(model: nn.Module, *inputs: Tensor, autocast: bool = False) -> dict[str, str]:
    """The role of what each module makes that is saved for the backward."""
    slimfit_fx.transform(model.train(), mode="eager", preset="exact", always_open=())
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


class TwoBranches(nn.Module):
    """Something between linear layers, of a tensor with small elements."""

    def __init__(self, function):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 3)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.function(self.a(x), self.b(x)))


def weighted(scores: Tensor, values: Tensor) -> Tensor:
    return torch.softmax(scores, -1) @ values


CAUSAL = torch.ones(64, 64).tril() > 0
INFINITE = torch.zeros(64, 64).masked_fill(~CAUSAL, -torch.inf)
# what is read closely: by a division, a logarithm, a root, a comparison, or as a mask
CLOSE = {
    "denominator": lambda h, g: h / (g.abs() + 1e-3),
    "softplus as a denominator": lambda h, g: h / F.softplus(4 * g),
    "reciprocal": lambda h, g: h * (g * g + 1e-3).reciprocal(),
    "softsign": lambda h, g: h + F.softsign(20 * g),
    "logarithm": lambda h, g: h * torch.log(g * g + 1e-9),
    "log1p": lambda h, g: h + torch.log1p(g.tanh() * 0.9999),
    "root": lambda h, g: h + (g.abs() + 1e-6).sqrt(),
    "rsqrt of a variance": lambda h, g: h * torch.rsqrt((g - g.mean(-1, keepdim=True)).pow(2).mean(-1, True) + 1e-6),
    "reciprocal root": lambda h, g: h * torch.rsqrt(g * g + 1e-4),
    "power": lambda h, g: h + (g.abs() + 1e-6) ** 0.3,
    "negative power": lambda h, g: h * (g.abs() + 1e-2) ** -1.5,
    "power of a tensor": lambda h, g: torch.pow(g.abs() + 1e-3, h.sigmoid()),
    "atan2": torch.atan2,
    "acos": lambda h, g: h + torch.acos(torch.tanh(2 * g) * 0.9999),
    "hypot": torch.hypot,
    "exponential": lambda h, g: h * torch.exp(4 * g),
    "normal nll": lambda h, g: h * h / (2 * torch.exp(4 * g)) + 2 * g,
    "gaussian nll": lambda h, g: F.gaussian_nll_loss(h, torch.zeros(()), g * g, eps=1e-4, reduction="none"),
    "normalize": lambda h, g: h * F.normalize(g, dim=-1),
    "cosine similarity": lambda h, g: h * F.cosine_similarity(h, g, -1)[:, None],
    "weight norm": lambda h, g: torch._weight_norm(g, h[:, :1], 0),
    "standard deviation": lambda h, g: h / (5 + g).std(-1, keepdim=True) * g.var(0),
    "product": lambda h, g: h * (1 + g).prod(-1, keepdim=True),
    "cumulative product": lambda h, g: h * torch.cumprod(g, -1),
    "logsumexp": lambda h, g: h * torch.logsumexp(8 * g, -1, keepdim=True),
    "logcumsumexp": lambda h, g: h * torch.logcumsumexp(8 * g, -1),
    "entropy": lambda h, g: h * (torch.softmax(8 * g, -1) * torch.softmax(8 * g, -1).log()).sum(-1, keepdim=True),
    "kl": lambda h, g: F.kl_div(F.log_softmax(h, -1), F.softmax(8 * g, -1), reduction="none"),
    "small difference": lambda h, g: (100 + g - (100 + g).mean(-1, keepdim=True)) ** 2 + h,
    "squared error": lambda h, g: F.mse_loss(h, h.detach() + 0.01 * g.detach(), reduction="none") * 1e4 + g,
    "huber": lambda h, g: F.huber_loss(h, torch.zeros_like(h), reduction="none", delta=0.1) + g,
    "focal loss": lambda h, g: (
        h + (1 - g.sigmoid()) ** 2 * F.binary_cross_entropy_with_logits(4 * g, torch.ones_like(g), reduction="none")
    ),
    "bce of probabilities": lambda h, g: (
        h + F.binary_cross_entropy((6 * g).sigmoid(), h.detach() * 0, reduction="none")
    ),
    "max pooling": lambda h, g: h * F.max_pool1d(g, 4).repeat(1, 4),
    "largest": lambda h, g: h * g.amax(-1, keepdim=True) + torch.maximum(h, g),
    "leaky relu": lambda h, g: h * F.leaky_relu(g, 0.01),
    "hardswish": lambda h, g: h * F.hardswish(6 * g),
    "sign": lambda h, g: h * g.abs(),
    "routing": lambda h, g: (
        h
        * torch.zeros_like(g).scatter(
            1, *(lambda top: (top.indices, top.values / top.values.sum(-1, keepdim=True)))(g.softmax(-1).topk(4))
        )
    ),
    "masked scores": lambda h, g: weighted((h @ g.T).masked_fill(~CAUSAL, -torch.inf), g),
    "scores with where": lambda h, g: weighted(torch.where(CAUSAL, h @ g.T, -torch.inf), g),
    "scores with a mask added": lambda h, g: weighted(h @ g.T + INFINITE, g),
    "scores with a large negative mask": lambda h, g: weighted(h @ g.T + (1 - CAUSAL.float()) * -1e9, g),
    "fused attention with a float mask": lambda h, g: F.scaled_dot_product_attention(
        h[None, None], g[None, None], g[None, None], attn_mask=torch.where(CAUSAL, 0.0, -torch.inf)
    )[0, 0],
}


@pytest.mark.parametrize("name", CLOSE)
def test_what_the_backward_reads_closely_keeps_its_gradients(name):
    torch.manual_seed(0)
    model, x = TwoBranches(CLOSE[name]).train(), torch.randn(64, 32)
    expected = trained(model, x)
    for preset, tolerance in {"exact": 1e-4, "balanced": 0.05, "tight": 0.3, "paper": 0.3}.items():
        torch._dynamo.reset()
        found = trained(transformed(model, preset=preset, freeze_rate=0.0), x)
        for parameter, gradient in expected.items():
            assert (found[parameter] - gradient).norm() <= tolerance * gradient.norm(), (preset, parameter)


def trained(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(x).square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None and name != "head.bias"}
