"""No group reaches over rows that are scaled apart: each norm's gradients are right whatever its rows' magnitudes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import handed_over, loss_of, reference, run, transformed
from torch import Tensor, nn

import slimfit_fx
from slimfit_fx.inspection.gradient_difference import gradient_errors

WIDTHS = (32, 36, 96, 144, 160)


class Tokens(nn.Module):
    """A residual block over tokens; the first is nearly constant, as a class token at its start."""

    def __init__(self, width: int, norm: nn.Module) -> None:
        super().__init__()
        self.token = nn.Parameter(1e-6 * torch.randn(1, 1, width))
        self.embed, self.norm, self.mix, self.head = (
            nn.Linear(16, width),
            norm,
            nn.Linear(width, width),
            nn.Linear(width, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat([self.token.expand(len(x), -1, -1), self.embed(x)], 1)
        return self.head(h + self.mix(self.norm(h)))[:, 0]


class Heads(nn.Module):
    """Queries that are normalised by head, of heads of very different magnitude."""

    def __init__(self, width: int, norm: nn.Module) -> None:
        super().__init__()
        self.query, self.norm, self.head = nn.Linear(16, 4 * width), norm, nn.Linear(4 * width, 3)
        self.query.weight.data *= torch.logspace(-5, 1, 4).repeat_interleave(width)[:, None]
        self.query.bias.data *= torch.logspace(-5, 1, 4).repeat_interleave(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.gelu(self.norm(self.query(x).unflatten(-1, (4, -1))).flatten(-2)))


class Patches(nn.Module):
    """The patches of an image as tokens: a norm reads across the channels of a convolution's output."""

    def __init__(self, width: int, norm: nn.Module) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Conv2d(1, width, 4, 4), norm, nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        image = x.repeat(1, 1, 2)[:, None, :8, :28].contiguous()
        scale = torch.logspace(-5, 1, 7)
        return self.head(F.gelu(self.norm((self.embed(image) * scale).flatten(2).transpose(1, 2))))


class Channels(nn.Module):
    """Channels of very different magnitude, normalised one by one or in groups of two."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.into, self.norm, self.out = nn.Conv1d(9, 8, 3, padding=1, bias=False), norm, nn.Conv1d(8, 3, 1)
        self.into.weight.data *= torch.logspace(-5, 1, 4).repeat_interleave(2)[:, None, None]

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.gelu(self.norm(self.into(x))))


def layer_norm(width: int) -> nn.Module:
    return nn.LayerNorm(width, eps=1e-12)


def rms_norm(width: int) -> nn.Module:
    return nn.RMSNorm(width, eps=1e-12)


CASES = {
    **{f"{kind.__name__} {norm.__name__} {width}": (kind, norm, width)
       for kind in (Tokens, Heads, Patches) for norm in (layer_norm, rms_norm) for width in WIDTHS},
}  # fmt: skip


def check(model: nn.Module, preset: str) -> None:
    x = torch.randn(6, 9, 16)
    _, exact = run(reference(model), {"x": x})
    slim = transformed(model.train(), preset=preset, freeze_rate=0.0)
    _, found = run(slim, {"x": x})
    whole = sum(g.double().square().sum() for g in exact.values()).sqrt()
    errors = gradient_errors(found, exact)
    for name, gradient in exact.items():
        if gradient.norm() > 1e-9 * whole:
            assert errors[name].relative < 0.05, f"{name} of norm {gradient.norm():.1e}"
    outputs = slim(x)
    assert slimfit_fx.report(slim).saved_bytes_after == handed_over(outputs, slim, {"x": x})
    loss_of(outputs).backward()


@pytest.mark.parametrize("case", CASES)
def test_rows_of_a_norm(case):
    kind, norm, width = CASES[case]
    torch.manual_seed(0)
    check(kind(width, norm(width)), "balanced")


@pytest.mark.parametrize(
    "norm",
    [nn.BatchNorm1d(8, eps=1e-12), nn.GroupNorm(4, 8, eps=1e-12), nn.InstanceNorm1d(8, eps=1e-12, affine=True)],
    ids=lambda norm: type(norm).__name__,
)
@pytest.mark.parametrize("preset", ["balanced", "tight"])
def test_channels_of_a_norm(norm, preset):
    torch.manual_seed(0)
    check(Channels(norm), preset)
