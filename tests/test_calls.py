"""Calls of a transformed model: after exceptions, past the model, compiled over, changed since `transform`."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers import gradients, no_recompile, run, transformed
from torch import nn

import slimfit_fx
from slimfit_fx import SlimFitWarning, StateError
from slimfit_fx.transform import session_of


class Net(nn.Module):
    """Blocks of one kind, and a head; `fault` is called behind the first."""

    def __init__(self, depth: int = 3, broken: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(depth))
        self.head = nn.Linear(8, 3)
        self.broken = broken  # by a graph break
        self.fault = lambda x: None

    def features(self, x):
        x = self.body[0](x)
        if self.broken:
            torch._dynamo.graph_break()
        self.fault(x)
        for block in self.body[1:]:
            x = block(x)
        return x

    def forward(self, x, y=None):
        if y is not None and x is not None:
            raise ValueError("give x or y, not both")
        return self.head(self.features(x if y is None else y))


X = torch.linspace(-1, 1, 32).view(4, 8)


def weights(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.dim() > 1]


def check_gates(slim: nn.Module, plain: nn.Module, x: torch.Tensor = X) -> None:
    """Open layers have the untransformed model's gradients, closed ones none."""
    gates = slimfit_fx.gates(slim)
    gates.set(gates.names[::2])
    _, expected = run(plain, {"x": x})
    _, found = run(slim, {"x": x})
    for name, gradient in found.items():
        if name in gates.closed:
            assert gradient is None, name
        else:
            assert (gradient - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


class Stop(BaseException):
    """As KeyboardInterrupt, which pytest would take for itself."""


def raising(error: type[BaseException], compiled: bool):
    def fault(x):
        raise error("out of luck")

    return fault if compiled else torch.compiler.disable(fault)


@pytest.mark.parametrize("regions", ["model", "blocks"])
@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("when", ["first", "later"])
def test_a_batch_that_the_model_refuses(regions, broken, when):
    plain = Net(broken=broken)
    slim = transformed(plain, regions=regions)
    if when == "later":
        run(slim, {"x": X})
    for _ in range(3):
        with pytest.raises(ValueError, match="give x or y"):
            slim(X, X)
    check_gates(slim, plain)
    with pytest.raises(ValueError, match="give x or y"):
        slim(X, X)
    with no_recompile():
        check_gates(slim, plain)


@pytest.mark.parametrize("regions", ["model", "blocks"])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("error", [ValueError, torch.OutOfMemoryError, Stop])
def test_an_exception_in_the_middle_of_a_forward(regions, compiled, error):
    """Graphs ran before it: they belong to no forward, and the last whole one stays the last."""
    plain = Net(broken=not compiled)
    slim = transformed(plain, regions=regions)
    run(slim, {"x": X})
    report, active = slimfit_fx.report(slim), session_of(slim).active
    calm, slim.fault = slim.fault, raising(error, compiled)
    for _ in range(2):
        with pytest.raises(error, match="out of luck"):
            slim(X)
    assert session_of(slim).active == active
    assert slimfit_fx.report(slim).to_json() == report.to_json()
    slim.fault = calm
    check_gates(slim, plain)
    assert len(session_of(slim).active) == len(active)


@pytest.mark.parametrize("broken", [False, True])
def test_a_batch_of_a_wrong_width(broken):
    plain = Net(broken=broken)
    slim = transformed(plain)
    run(slim, {"x": X})
    with pytest.raises(RuntimeError):
        slim(torch.ones(4, 7))
    check_gates(slim, plain)


def test_an_exception_in_a_backward():
    plain = Net()
    slim = transformed(plain)
    x = X.clone().requires_grad_()

    def stop(_):
        raise ValueError("no backward today")

    handle = x.register_hook(stop)
    with pytest.raises(ValueError, match="no backward today"):
        slim(x).sum().backward()
    handle.remove()
    check_gates(slim, plain)


def test_a_budget_is_spent_by_the_last_whole_forward():
    slim = transformed(Net(broken=True), memory_budget="1MiB")
    slim(X).sum().backward()
    planned = slimfit_fx.scheduler(slim).plan
    assert planned.nbytes == slimfit_fx.report(slim).saved_bytes_before > 0
    slim.fault = raising(ValueError, compiled=False)
    with pytest.raises(ValueError):
        slim(X)
    session_of(slim).begin_forward()  # as the next call, which chooses the gates right then
    assert slimfit_fx.scheduler(slim).plan is planned


def test_a_report_after_an_evaluation_is_of_the_last_training_forward():
    model = Net()
    compiled = torch.compile(model, backend="slimfit_fx", mode="eager")
    for asked, call in ((model, compiled), (transformed(Net()),) * 2):
        call(X).sum().backward()
        before = slimfit_fx.report(asked).to_json()
        for _ in range(2):
            with torch.no_grad():
                call.eval()(X)
            call(X[:2].clone())  # and with gradients
            with torch.no_grad():
                call.train()(X)
        if call is not compiled:  # torch.compile compiles evaluation with gradients as it does training
            assert slimfit_fx.report(asked).to_json() == before
        assert slimfit_fx.report(asked).saved_bytes_before


BYPASSES = {
    "forward": lambda model, x: model.forward(x),
    "parts": lambda model, x: model.head(model.features(x)),
    "call": lambda model, x: type(model).forward(model, x),
}


@pytest.mark.parametrize("way", BYPASSES)
@pytest.mark.parametrize("freeze_rate", [0.0, 0.9])
def test_training_past_the_model_is_named_once_and_frozen_all_the_same(way, freeze_rate):
    slim = transformed(Net(), freeze_rate=freeze_rate)
    optimizer = torch.optim.SGD(slim.parameters(), lr=0.1)
    with pytest.warns(SlimFitWarning, match=r"4 of 4 layers .*call it as model\(\.\.\.\)") as told:
        for _ in range(3):
            closed = slimfit_fx.gates(slim).closed
            before = {name: slim.get_parameter(name).clone() for name in closed}
            BYPASSES[way](slim, X).sum().backward()
            assert all(slim.get_parameter(name).grad is None for name in closed)
            optimizer.step()
            optimizer.zero_grad()
            assert all(torch.equal(slim.get_parameter(name), value) for name, value in before.items())
    assert len(told) == 1


def test_training_in_eval_mode_is_named_at_the_first_step():
    """Its gradients are those of the untouched model, for whoever wants no more than these."""
    slim = transformed(Net()).eval()
    optimizer = torch.optim.SGD(slim.parameters(), lr=0.1)
    slim(X).sum().backward()
    assert all(gradient is not None for gradient in gradients(slim).values())
    with pytest.warns(SlimFitWarning, match="in training mode"):
        optimizer.step()
    slim(X).sum().backward()
    optimizer.step()


def test_blocks_that_are_called_past_the_model_keep_their_gates():
    plain = Net()
    slim = transformed(plain, regions="blocks")
    slimfit_fx.gates(slim).set(["body.1.0.weight"])
    for _ in range(3):
        slim.zero_grad()
        slim.head(slim.features(X)).sum().backward()
        assert {n for n in weights(slim) if slim.get_parameter(n).grad is not None} == {"body.1.0.weight"}
        assert len(session_of(slim).active) == 4


def test_another_models_steps_are_no_matter():
    slim, other = transformed(Net()), nn.Linear(2, 2)
    other(torch.ones(2, 2)).sum().backward()
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    torch.optim.SGD([*slim.parameters(), *other.parameters()], lr=0.1).step()


def test_a_penalty_on_the_weights_does_not_reach_closed_layers():
    plain = Net()
    slim = transformed(plain)
    slimfit_fx.gates(slim).set(["head.weight"])
    loss = slim(X).sum() + sum(weight.square().sum() for weight in slim.parameters())
    with pytest.warns(SlimFitWarning, match="3 of 4 layers .*reads the weights"):
        loss.backward()
    (plain(X).sum() + sum(weight.square().sum() for weight in plain.parameters())).backward()
    assert {name for name in weights(slim) if slim.get_parameter(name).grad is not None} == {"head.weight"}
    torch.testing.assert_close(slim.head.weight.grad, plain.head.weight.grad)


def test_gradients_of_an_earlier_forward_arrive_whatever_the_gates_are_now():
    plain = Net()
    slim = transformed(plain)
    gates = slimfit_fx.gates(slim)
    gates.set(["body.0.0.weight"])
    first = slim(X)
    gates.set(["body.1.0.weight"])
    second = slim(X)
    gates.set([])
    first.sum().backward()
    second.sum().backward()
    assert {n for n in weights(slim) if slim.get_parameter(n).grad is not None} == {
        "body.0.0.weight",
        "body.1.0.weight",
    }


@pytest.mark.parametrize("regions", ["model", "blocks"])
def test_compiled_after_transform(regions):
    slim = transformed(Net(), regions=regions)
    if regions == "blocks":
        slim.body[1].compile(backend="eager")
    else:
        slim.compile(backend="eager")
    with pytest.raises(StateError, match=r"compiled after slimfit_fx.transform.*Leave model.compile\(\) out"):
        slim(X).sum().backward()
    plain = slimfit_fx.undo(slim)
    plain(X).sum().backward()


class Wrapper(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.out = inner, nn.Linear(3, 3)

    def forward(self, x):
        return self.out(self.inner(x))


@pytest.mark.parametrize("order", ["inner first", "outer first", "side by side", "named backend"])
def test_two_schedulers_for_one_layer(order):
    inner = Net()
    outer = Wrapper(inner)
    first, second = (outer, inner) if order == "outer first" else (inner, outer)
    if order == "side by side":
        first = Wrapper(inner)
    slimfit_fx.transform(first, mode="eager")
    with pytest.raises(StateError, match="transformed already.*two schedulers"):
        if order == "named backend":
            torch.compile(second, backend="slimfit_fx", mode="eager")(X)
        else:
            slimfit_fx.transform(second, mode="eager")
    slimfit_fx.undo(first)
    slimfit_fx.transform(second, mode="eager")
    second(X).sum().backward()


def test_a_copy_of_a_part_is_another_model():
    inner = transformed(Net())
    slimfit_fx.transform(Wrapper(copy.deepcopy(inner)), mode="eager")


@pytest.mark.parametrize("regions", ["model", "blocks"])
@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("change", ["same head", "wider head", "adapter", "block"])
def test_what_was_added_or_replaced_after_transform(regions, called, change):
    slim = transformed(Net(), regions=regions)
    if called:
        slim(X).sum().backward()
    if change == "block":
        slim.body[1] = copy.deepcopy(slim.body[1])
    elif change == "adapter":
        slim.body[1][0] = nn.Sequential(slim.body[1][0], nn.Linear(8, 8))
    else:
        slim.head = nn.Linear(8, 3 if change == "same head" else 5)
    for _ in range(2):
        with pytest.raises(StateError, match="replaced after slimfit_fx.transform.*undo"):
            slim(X).sum().backward()
    slimfit_fx.transform(slimfit_fx.undo(slim), mode="eager")
    slim(X).sum().backward()


def test_a_parameter_of_the_users_own_is_no_part_of_the_model():
    temperature = nn.Parameter(torch.ones(1))
    slim = transformed(Net())
    slim.fault = lambda x: x.mul_(temperature.exp())
    slim(X).sum().backward()
    assert temperature.grad is not None


USES = {
    "dropout": lambda h, t: F.dropout(h, t / 4, True),
    "power": lambda h, t: h.abs() ** t,
    "clamp": lambda h, t: h.clamp(max=t),
    "add": lambda h, t: torch.add(h, h, alpha=t),
    "fill": lambda h, t: h + torch.full_like(h, t),
    "layer norm": lambda h, t: F.layer_norm(h, (8,), eps=t * 1e-5),
    "attention": lambda h, t: F.scaled_dot_product_attention(h[None], h[None], h[None], scale=t)[0],
    "branch": lambda h, t: h if t < 9 else -h,
    "product": lambda h, t: h * t,
    "interpolation": lambda h, t: torch.lerp(h, h.tanh(), t / 2),
    "item": lambda h, t: h * torch.tensor(t).item(),
}


@pytest.mark.parametrize("use", USES)
def test_a_number_that_changes_from_call_to_call(use):
    """An annealed temperature, drop rate or weight of a loss: as many graphs as torch.compile makes."""

    class Annealed(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.last, self.t = nn.Linear(8, 8), nn.Linear(8, 3), 1.0

        def forward(self, x):
            return self.last(USES[use](torch.tanh(self.first(x)), self.t))

    found = []
    for kind in ("torch.compile", "slimfit_fx"):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model = Annealed()
        if kind == "slimfit_fx":
            slimfit_fx.transform(model, mode="eager", preset="exact", freeze_rate=0.0)
        else:
            model.compile(backend="aot_eager_decomp_partition")
        steps = []
        for step in range(4):
            model.t = 1.0 - 0.13 * step
            steps.append(run(model, {"x": X}, seed=step)[1])
        found.append((steps, torch._dynamo.utils.counters["stats"]["unique_graphs"]))
    (expected, least), (steps, graphs) = found
    assert graphs <= least
    for wanted, gradient in zip(expected, steps, strict=True):
        for name in wanted:
            assert (gradient[name] - wanted[name]).norm() <= 1e-5 * wanted[name].norm(), name


def test_nothing_is_said_of_a_model_that_is_captured_whole():
    slim = transformed(Net())
    optimizer = torch.optim.AdamW(slim.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error", SlimFitWarning)
        for _ in range(3):
            for _ in range(2):
                slim(X).sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
    assert not slimfit_fx.report(slim).outside


def test_training_past_the_model_first_leaves_no_trace_in_the_report():
    slim = transformed(Net())
    with pytest.warns(SlimFitWarning):
        slim.forward(X).sum().backward()
    slim(X).sum().backward()
    assert not slimfit_fx.report(slim).outside
