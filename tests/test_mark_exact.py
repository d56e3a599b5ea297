"""What no codec may change: gradients through divisions, logarithms, comparisons and masks, under every preset."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import transformers
from helpers import gradients, handed_over, transformed
from torch import Tensor, nn

import slimfit_fx


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
    "weight norm": lambda h, g: torch.ops.aten._weight_norm(g, h[:, :1], 0),
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


@pytest.mark.parametrize("preset", ["balanced", "tight", "paper"])
def test_a_float_mask_is_no_attention_operand(preset):
    """Gemma 3 saves its mask, [batch, 1, query, key] with minus infinity: in 8 bits every group of it becomes NaN."""
    torch.manual_seed(0)
    config = transformers.Gemma3TextConfig(
        vocab_size=50,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=64,
        sliding_window=8,
        pad_token_id=0,
    )
    model = transformers.Gemma3ForCausalLM(config).train()
    tokens = torch.randint(3, 50, (3, 16))
    inputs = {"input_ids": tokens, "labels": tokens, "use_cache": False}
    slim = transformed(model, preset=preset, freeze_rate=0.0)
    for trained_model in (model, slim):
        trained_model(**inputs).loss.backward()
    masks = [row for row in slimfit_fx.report(slim).rows if row["shape"] == [3, 1, 16, 16]]
    assert {(row["role"], row["stored_as"]) for row in masks} == {("float mask", "")}
    assert all(p.grad.isfinite().all() for p in slim.parameters())
    if preset == "balanced":
        expected, found = gradients(model), gradients(slim)
        for name in expected:
            assert (expected[name] - found[name]).norm() <= 0.1 * expected[name].norm(), name


def test_keys_that_nothing_trains_are_no_masks():
    """As with adapters on query and value alone."""
    model = slimfit_fx.transform(Frozen().train(), mode="eager", always_open=())
    model(torch.randn(2, 4, 16)).sum().backward()
    found = [row for row in slimfit_fx.report(model).rows if row["bytes"] and row["role"] != "statistics"]
    assert "float mask" not in {row["role"] for row in found}
    assert sum(row["stored_as"].startswith("int8") for row in found if row["role"] == "attention operand") >= 3


class Frozen(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))
        self.k.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (2, 8)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Normalized(nn.Sequential):
    def __init__(self):
        parts = [
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3),
            nn.LeakyReLU(),
            nn.Conv2d(8, 8, 3),
        ]
        super().__init__(*parts)


def test_comparisons_are_saved_as_bits_and_what_is_compared_in_eight():
    """ReLU's sign behind a norm is a comparison of a number that the backward computes again."""
    torch.manual_seed(0)
    model, x = Normalized().train(), torch.randn(4, 3, 16, 16)
    expected = trained(model, x)
    slim = transformed(model, preset="balanced", freeze_rate=0.0, always_open=())
    found = trained(slim, x)
    plain = transformed(model, freeze_rate=0.0, always_open=())
    plain(x)
    for name, gradient in expected.items():
        if not name.endswith("0.bias") and not name.endswith("3.bias"):  # zero, behind a norm
            assert (found[name] - gradient).norm() <= 0.05 * gradient.norm(), name
    rows = [row for row in slimfit_fx.report(slim).rows if row["bytes_stored"] > 500]
    assert slimfit_fx.report(slim).saved_bytes_before == slimfit_fx.report(plain).saved_bytes_before
    assert {row["stored_as"] for row in rows if row["dtype"] == "bool"} == {"bits"}
    assert all(row["stored_as"].startswith("int8") for row in rows if row["dtype"] == "float32")
    assert slimfit_fx.report(slim).saved_bytes_after == handed_over(slim(x), slim, {"x": x})


class Powers(nn.Module):
    """A product of activations: its derivative leaves the range of the activation's own."""

    def __init__(self, function):
        super().__init__()
        self.a, self.head, self.function = nn.Linear(32, 32), nn.Linear(32, 3), function

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.function(4 * self.a(x)))


@pytest.mark.parametrize(
    "function",
    [lambda x: F.gelu(x) ** 2, lambda x: F.silu(x) ** 2, lambda x: F.elu(x, 3.0), F.hardswish, F.softplus, F.mish],
    ids=["squared gelu", "squared silu", "elu", "hardswish", "softplus", "mish"],
)
def test_fixed_point_holds_the_derivative_that_it_stores(function):
    torch.manual_seed(0)
    model, x = Powers(function).train(), torch.randn(64, 32)
    expected = trained(model, x)
    found = trained(transformed(model, preset="tight", freeze_rate=0.0), x)
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 0.2 * gradient.norm(), name
