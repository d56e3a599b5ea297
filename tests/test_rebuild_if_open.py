"""Inputs of linear layers that are rebuilt only while a gate is open: the same gradients, nothing for closed layers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import count_calls, no_recompile, run, transformed
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import slimfit_fx

ROWS_IF_OPEN = torch.ops.slimfit_fx.rows_if_open.default
WIDTH, HIDDEN = 36, 52


class Forms(nn.Module):
    """Every form in which a rebuilt tensor may reach a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.rms = nn.LayerNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.query, self.key = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.gate, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.flat, self.mixed = nn.Linear(WIDTH, WIDTH), nn.Linear(17, 17)
        self.padded, self.head = nn.Linear(WIDTH + HIDDEN, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))

    def features(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Shared(Forms):
    """One norm's output feeds two layers."""

    def features(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.query(x) * torch.sigmoid(self.key(x))


class Gelu(Forms):
    def features(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Product(Forms):
    """SwiGLU: two sources."""

    def features(self, x: Tensor) -> Tensor:
        x = self.rms(x)
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Flat(Forms):
    """A row per token, and back."""

    def features(self, x: Tensor) -> Tensor:
        rows = self.norm(x.reshape(-1, WIDTH))
        return self.flat(F.gelu(self.query(rows).view(x.shape)).flatten(0, 1)).view(x.shape)


class Heads(Forms):
    """Heads whose number is left to torch."""

    def features(self, x: Tensor) -> Tensor:
        heads = F.gelu(self.query(self.norm(x))).view(x.shape[0], x.shape[1], -1, 9)
        return self.flat(torch.tanh(heads).view(*x.shape[:2], -1))


class HeadsInFront(Forms):
    """As some models write it: the sequence behind the heads, its length left to torch."""

    def features(self, x: Tensor) -> Tensor:
        rows = F.gelu(self.query(self.norm(x))).view(x.shape[0], -1, 4, WIDTH // 4)
        return self.flat(rows.view(x.shape[0], -1, WIDTH)).view(x.shape)


class Mixed(Forms):
    """Over tokens, as MLP-Mixer does: the input is transposed."""

    def features(self, x: Tensor) -> Tensor:
        return self.mixed(F.gelu(self.query(self.norm(x))).transpose(1, 2)).transpose(1, 2)


class Part(Forms):
    """A part of the channels, scaled by a number and by a vector."""

    def features(self, x: Tensor) -> Tensor:
        return self.flat(2 * F.gelu(self.up(x))[..., :WIDTH] + self.norm.weight)


class FirstToken(Forms):
    """The layer reads one token of those that are saved: to copy all would take more than to write one."""

    def features(self, x: Tensor) -> Tensor:
        return self.flat(self.norm(x)[:, 0])


FORMS = [Shared, Gelu, Product, Flat, Heads, HeadsInFront, Mixed, Part]


def counted(model: nn.Module) -> int:
    return sum(count_calls(backward, ROWS_IF_OPEN) for _, backward in slimfit_fx.graphs(model))


def errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Relative, by name; both have the same gradients."""
    assert {n for n, g in found.items() if g is None} == {n for n, g in expected.items() if g is None}
    pairs = ((name, found[name], gradient) for name, gradient in expected.items() if gradient is not None)
    return {name: float((a - b).norm() / b.norm().clamp_min(1e-12)) for name, a, b in pairs}


def both(form: type[Forms], **options) -> tuple[nn.Module, nn.Module]:
    """With the pass, and without it."""
    options = {"preset": "balanced", "freeze_rate": 0.0, "always_open": (), **options}
    return transformed(form(), **options), transformed(form(), disable_passes="rebuild_if_open", **options)


def compare(pair: tuple[nn.Module, nn.Module], inputs: dict[str, Tensor], names: list[str] | None = None) -> None:
    """Gradients, one by one, with the layers in `names` open, or all."""
    found = []
    for model in pair:
        if names is not None:
            slimfit_fx.gates(model).set(names)
        found.append(run(model, inputs))
    (one, gradients), (other, expected) = found
    assert torch.equal(one, other)
    assert max(errors(gradients, expected).values()) < 1e-5


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mode", ["eager", pytest.param("inductor", marks=pytest.mark.inductor)])
def test_gradients_are_the_same_for_every_set_of_gates(form, mode):
    pair, inputs = both(form, mode=mode), {"x": torch.randn(3, 17, WIDTH)}
    compare(pair, inputs)
    assert counted(pair[0]) > 0 == counted(pair[1])
    names = list(slimfit_fx.gates(pair[0]))
    with no_recompile():
        for chosen in ([], names[:1], names[1:], names[::2], names):
            compare(pair, inputs, chosen)


@pytest.mark.parametrize("preset", ["balanced", "tight", "paper"])
@pytest.mark.parametrize("form", [Gelu, Product])
@pytest.mark.inductor
def test_bf16(form, preset):
    pair, inputs = both(form, mode="inductor", preset=preset), {"x": torch.randn(3, 17, WIDTH)}
    with torch.autocast("cpu", torch.bfloat16):
        compare(pair, inputs)
        compare(pair, inputs, [])


@pytest.mark.parametrize("form", [Shared, Gelu, Flat, Heads, HeadsInFront])
@pytest.mark.inductor
def test_dynamic_sizes(form):
    pair = both(form, mode="inductor")
    for batch, length in ((3, 17), (5, 9), (2, 30), (1, 7), (4, 1)):
        inputs = {"x": torch.randn(batch, length, WIDTH)}
        compare(pair, inputs)
        compare(pair, inputs, list(slimfit_fx.gates(pair[0]))[:1])
    assert counted(pair[0]) > 0


@pytest.mark.parametrize("shape", [(1, 17, WIDTH), (3, 1, WIDTH), (1, 1, WIDTH), (5, WIDTH), (2, 3, 5, WIDTH)])
def test_shapes(shape):
    pair, inputs = both(Gelu), {"x": torch.randn(shape)}
    compare(pair, inputs)
    compare(pair, inputs, [])


class Elements(TorchDispatchMode):
    """How many numbers `erf` is computed of."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.erf.default:
            self.count += result.numel()
        return result


def test_nothing_is_rebuilt_for_closed_layers():
    """GELU's output is rebuilt for `down`; its derivative, which is computed in any case, has an `erf` as well."""
    found = []
    for model in both(Gelu):
        x = torch.randn(3, 17, WIDTH)
        run(model, {"x": x})
        for names in ([], ["head.weight"], ["down.weight"]):
            slimfit_fx.gates(model).set(names)
            loss = model(x).square().sum()
            with Elements() as elements:
                loss.backward()
            found.append(elements.count // x[..., 0].numel() // HIDDEN)
    assert found == [1, 1, 2, 2, 2, 2]


def test_a_copy_must_take_less_than_it_spares():
    assert counted(started(FirstToken, preset="balanced")) == 0
    assert counted(started(Gelu, preset="exact")) == 0


def started(form: type[Forms], **options) -> nn.Module:
    model = transformed(form(), freeze_rate=0.5, **options)
    run(model, {"x": torch.randn(3, 17, WIDTH)})
    return model
