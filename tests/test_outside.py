"""What torch.compile leaves out of its graphs: closed layers do not train there either, and are named."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers import gradients, loss_of, run, transformed
from torch import nn

import slimfit_fx
from slimfit_fx import BackendError, SlimFitWarning
from slimfit_fx.runtime.registry import session_of


class Experts(nn.Module):
    """A graph break in a loop: Dynamo skips this frame."""

    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(8, 8), nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x):
        flat = F.gelu(self.gate(x)).flatten(0, 1)
        out, chosen = torch.zeros_like(flat), (flat[:, 0] > 0).long()
        for number, expert in enumerate(self.experts):
            rows = torch.where(chosen == number)[0]
            out.index_add_(0, rows, expert(flat[rows]))
        return out.view(x.shape)


class Reversible(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, function):
        ctx.function, ctx.x = function, x
        return x + function(x)

    @staticmethod
    def backward(ctx, gradient):
        with torch.enable_grad():
            x = ctx.x.detach().requires_grad_()
            y = ctx.function(x)
        torch.autograd.backward(y, gradient)
        return gradient + x.grad, None


class Reverse(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x):
        return Reversible.apply(x, self.inner)


class Uncompiled(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)

    @torch.compiler.disable
    def forward(self, x):
        return self.inner(x).tanh()


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.GRU(8, 8, batch_first=True)

    def forward(self, x):
        return self.inner(x)[0]


class Checks(nn.Module):
    """A hook that nobody can trace."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.inner.register_forward_hook(torch.compiler.disable(lambda module, _, out: out + module.weight.sum()))

    def forward(self, x):
        return self.inner(x)


class Around(nn.Module):
    """`part` between what can be compiled. The graph break keeps Dynamo from skipping it all."""

    def __init__(self, part):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.part, self.head = nn.Linear(8, 8), part(), nn.Linear(8, 3)

    def forward(self, x):
        hidden = torch.tanh(self.first(x))
        torch._dynamo.graph_break()
        hidden = self.part(hidden)
        torch._dynamo.graph_break()
        return self.head(hidden)


X = torch.linspace(-1, 1, 120).view(3, 5, 8)
PARTS = [Experts, Reverse, Uncompiled, Recurrent, Checks]


@pytest.mark.parametrize("regions", ["model", "blocks"])
@pytest.mark.parametrize("part", PARTS)
def test_closed_layers_do_not_train_and_open_ones_do(part, regions):
    plain = Around(part).train()
    slim = transformed(plain, regions=regions, always_open=())
    gates = slimfit_fx.gates(slim)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", SlimFitWarning)
        for open_names in ([], gates.names[::2], gates.names[1::2], gates.names):
            gates.set(open_names)
            check(slim, plain)
    (message,) = [str(warning.message) for warning in told if warning.category is SlimFitWarning]
    outside = slimfit_fx.report(slim).outside
    assert outside == [name for name in gates if name.startswith("part.")]
    assert all(name in message for name in outside)
    assert f"Outside of the graphs, where nothing is compressed ({len(outside)}): part." in str(slimfit_fx.report(slim))


def check(slim: nn.Module, plain: nn.Module) -> None:
    """Open layers have the untransformed model's gradients, closed ones none."""
    _, expected = run(plain, {"x": X})
    _, found = run(slim, {"x": X})
    for name, gradient in found.items():
        if name in slimfit_fx.gates(slim).closed:
            assert gradient is None, name
        else:
            assert (gradient - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


def test_one_weight_inside_and_outside():
    """Only what the graph computes of its gradient, or nothing, where it is closed; all of it where it is open."""
    plain = Around(Uncompiled)
    plain.part.inner.weight = plain.first.weight
    slim = transformed(plain, always_open=())
    with pytest.warns(SlimFitWarning, match=r"first\.weight"):
        slimfit_fx.gates(slim).set([])
        check(slim, plain)
    slimfit_fx.gates(slim).set(slimfit_fx.gates(slim).names)
    check(slim, plain)


def test_a_branch_that_is_not_taken_is_not_outside():
    class Dropped(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers, self.skipped = nn.ModuleList(nn.Linear(8, 8) for _ in range(3)), 0

        def forward(self, x):
            for number, layer in enumerate(self.layers):
                if number != self.skipped:
                    x = layer(x).tanh()
            return x

    plain = Dropped().train()
    slim = transformed(plain, always_open=())
    with warnings.catch_warnings():
        warnings.simplefilter("error", SlimFitWarning)
        for skipped in range(3):
            slim.skipped = plain.skipped = skipped
            slimfit_fx.gates(slim).set(["layers.1.weight"])
            _, expected = run(plain, {"x": X})
            _, found = run(slim, {"x": X})
            assert {n for n, g in found.items() if g is not None and g.dim() > 1} == (
                {"layers.1.weight"} if skipped != 1 else set()
            )
            assert all(torch.allclose(g, expected[n]) for n, g in found.items() if g is not None)
    assert not slimfit_fx.report(slim).outside


@pytest.mark.parametrize("policy", ["update", "gradient", "gain"])
def test_layers_outside_take_their_turns(policy):
    slim = transformed(Around(Uncompiled), freeze_rate=0.5, policy=policy, always_open=())
    optimizer, opened = torch.optim.AdamW(slim.parameters()), set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SlimFitWarning)
        for _ in range(6):
            before = {name: slim.get_parameter(name).clone() for name in slimfit_fx.gates(slim)}
            slim(X).square().sum().backward()
            opened.update(slimfit_fx.gates(slim).open)
            closed = slimfit_fx.gates(slim).closed
            optimizer.step()
            optimizer.zero_grad()
            moved = {name for name, value in before.items() if not torch.equal(slim.get_parameter(name), value)}
            assert not moved & set(closed)
    assert "part.inner.weight" in opened


class Whole(nn.Module):
    """All of it in a frame that Dynamo skips."""

    def __init__(self, part):
        super().__init__()
        self.first, self.part, self.head = nn.Linear(8, 8), part(), nn.Linear(8, 3)

    def forward(self, x):
        for part in (self.first, self.part.inner, self.head):
            x = part(x)
            x = x[0] if isinstance(x, tuple) else x
            torch._dynamo.graph_break()
        return x


@pytest.mark.parametrize("regions", ["model", "blocks"])
@pytest.mark.parametrize("part", [Recurrent, Uncompiled])
def test_a_model_of_which_nothing_is_compiled_says_the_true_reason(part, regions):
    slim = transformed(Whole(part), regions=regions)
    reason = "Dynamo does not support RNN, GRU, or LSTM.*allow_rnn" if part is Recurrent else "graph_break"
    for _ in range(2):
        with pytest.raises(BackendError, match=f"the model ran without its compiled graph.*{reason}.*parts") as error:
            slim(X)
        assert "recompile" not in str(error.value)


def test_recurrent_layers_are_captured_where_torch_is_told_to():
    with torch._dynamo.config.patch(allow_rnn=True):
        plain = Around(Recurrent).train()
        slim = transformed(plain, always_open=())
        with warnings.catch_warnings():
            warnings.simplefilter("error", SlimFitWarning)
            slimfit_fx.gates(slim).set(slimfit_fx.gates(slim).names[::2])
            check(slim, plain)


def test_a_frame_that_was_recompiled_too_often_is_noticed_behind_a_graph_break():
    """What torch runs without its graph from then on is part of a forward of which the rest is captured."""
    plain = Around(lambda: nn.Sequential(nn.Linear(8, 8), nn.Tanh())).train()
    slim = transformed(plain, always_open=())
    slimfit_fx.gates(slim).set([])
    with (
        warnings.catch_warnings(record=True) as told,
        torch._dynamo.config.patch(recompile_limit=2, automatic_dynamic_shapes=False, assume_static_by_default=True),
    ):
        warnings.simplefilter("always")
        for length in (2, 3, 4, 5):
            try:
                slim(X[:, :length]).sum().backward()
            except BackendError as error:
                assert "recompile limit" in str(error)
                return
            assert all(gradients(slim)[name] is None for name in slimfit_fx.gates(slim))
    assert any("limit" in str(warning.message) for warning in told if warning.category is SlimFitWarning)


def test_gradient_accumulation_keeps_what_came_before():
    """A layer that is opened for one micro-batch only keeps the gradient of that one."""
    plain = Around(Uncompiled).train()
    slim = transformed(plain, always_open=())
    _, expected = run(plain, {"x": X})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SlimFitWarning)
        for open_names in (["part.inner.weight"], []):
            slimfit_fx.gates(slim).set(open_names)
            torch.manual_seed(0)
            loss_of(slim(X)).backward()
    torch.testing.assert_close(slim.part.inner.weight.grad, expected["part.inner.weight"])


def test_moved_parameters_are_still_watched():
    slim = transformed(Around(Uncompiled), always_open=())
    slim.double()
    slimfit_fx.gates(slim).set([])
    with pytest.warns(SlimFitWarning, match="part"):
        slim(X.double()).sum().backward()
    assert slim.part.inner.weight.grad is None


def test_probing_a_model_is_no_training():
    slim = transformed(Around(Uncompiled), always_open=())
    slimfit_fx.gates(slim).set([])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SlimFitWarning)
        slim(X).sum().backward()
        report = slimfit_fx.report(slim, sample={"x": X}, loss=lambda y: y.sum())
    assert "part.inner.weight" in report.gradient_errors
    assert session_of(slim).outside.layers == {slimfit_fx.gates(slim).names.index("part.inner.weight")}
