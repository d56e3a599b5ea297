from __future__ import annotations

import copy
import io
import subprocess
import sys
import warnings

import pytest
import torch
from helpers import handed_over, replace_pass, run
from torch import nn

import slimfit_fx
from slimfit_fx import BackendError, BackwardError, ConfigError, ModelError, SlimFitError, StateError, VersionError
from slimfit_fx.api import check_version
from slimfit_fx.runtime.registry import session_of


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4), nn.Linear(4, 2))


def step(model):
    return model(torch.ones(3, 4)).sum()


def test_same_object_and_undo(model):
    keys = list(model.state_dict())
    assert slimfit_fx.transform(model, mode="eager") is model
    step(model).backward()
    assert list(model.state_dict()) == keys
    assert slimfit_fx.undo(model) is model
    assert model._compiled_call_impl is None
    model.zero_grad()
    step(model).backward()
    assert all(p.grad is not None for p in model.parameters())
    slimfit_fx.transform(model, mode="eager")


def test_eval_and_no_grad_run_untouched(model):
    expected = model(torch.ones(3, 4))
    slimfit_fx.transform(model, mode="eager")
    with torch.no_grad():
        assert torch.equal(model(torch.ones(3, 4)), expected)
    assert torch.equal(model.eval()(torch.ones(3, 4)), expected)
    with pytest.raises(StateError, match="nothing is captured yet"):
        slimfit_fx.report(model)


def test_hooks_still_run(model):
    calls = []
    model.register_forward_hook(lambda *_: calls.append("forward"))
    slimfit_fx.transform(model, mode="eager")
    step(model)
    assert calls == ["forward"]


def test_twice(model):
    slimfit_fx.transform(model)
    with pytest.raises(StateError, match=r"transformed already; slimfit_fx\.undo"):
        slimfit_fx.transform(model)


def test_a_compiled_model_is_refused(model):
    with pytest.raises(StateError, match="compiled already"):
        slimfit_fx.transform(torch.compile(model))
    model.compile()
    with pytest.raises(StateError, match="compiled already"):
        slimfit_fx.transform(model)


@pytest.mark.parametrize("ask", [slimfit_fx.gates, slimfit_fx.scheduler, slimfit_fx.report, slimfit_fx.undo])
def test_not_transformed(model, ask):
    with pytest.raises(StateError, match="this Sequential is not transformed; call slimfit_fx.transform"):
        ask(model)


def test_not_a_module():
    with pytest.raises(ModelError, match=r"takes a torch\.nn\.Module, got function"):
        slimfit_fx.transform(lambda x: x)


def test_errors_leave_the_model_alone(model):
    for overrides in (
        {"freeze_rate": 2},
        {"polcy": "random"},
        {"never_gate": ["nothing"]},
        {"never_gate": [""]},
    ):
        with pytest.raises(SlimFitError):
            slimfit_fx.transform(model, **overrides)
    slimfit_fx.transform(model)


def test_config_and_overrides(model):
    config = slimfit_fx.Config(mode="eager", freeze_rate=0.1)
    slimfit_fx.transform(model, config, freeze_rate=0.7)
    assert config.freeze_rate == 0.1
    with pytest.raises(ConfigError, match="Did you mean 'freeze_rate'"):
        slimfit_fx.transform(nn.Linear(2, 2), freze_rate=0.7)


def test_a_failing_backend_is_an_error_not_an_eager_run(model, monkeypatch):
    def broken(*_, **__):
        raise torch._subclasses.fake_tensor.DynamicOutputShapeException("test")

    replace_pass(monkeypatch, "make_plan", broken)
    slimfit_fx.transform(model, mode="eager")
    with pytest.raises(BackendError, match="slimfit_fx could not compile a graph of .* nodes in the pass make_plan"):
        step(model)


def test_a_model_that_dynamo_gives_up_on_is_an_error(model):
    slimfit_fx.transform(model, mode="eager")
    with (
        warnings.catch_warnings(),
        torch._dynamo.config.patch(recompile_limit=2, automatic_dynamic_shapes=False, assume_static_by_default=True),
    ):
        warnings.simplefilter("ignore")
        for batch in (2, 3):
            model(torch.ones(batch, 4))
        with pytest.raises(BackendError, match="recompile limit"):
            model(torch.ones(4, 4))


def test_many_models_of_one_class_in_one_process():
    """Dynamo counts recompiles by code object, which models of a class share: each gets its own."""
    for _ in range(12):
        model = slimfit_fx.transform(nn.Sequential(nn.Linear(4, 2)), mode="eager", always_open=())
        step(model).backward()


def test_double_backward(model):
    slimfit_fx.transform(model, mode="eager")
    x = torch.ones(3, 4, requires_grad=True)
    with pytest.raises(BackwardError, match="create_graph=True"):
        torch.autograd.grad(model(x).sum(), x, create_graph=True)


def test_retain_graph_works_in_the_interpreter(model):
    slimfit_fx.transform(model, mode="eager", freeze_rate=0.0)
    loss = step(model)
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in model.parameters()]
    loss.backward()
    assert all(torch.equal(p.grad, 2 * g) for p, g in zip(model.parameters(), once, strict=True))


def test_retain_graph_is_refused_where_the_backward_reuses_memory(model):
    slimfit_fx.transform(model, mode="eager")
    loss = step(model)
    session_of(model).captures[0].retainable = False
    with pytest.raises(BackwardError, match=r"donated_buffer = False"):
        loss.backward(retain_graph=True)


@pytest.mark.parametrize("version", ["2.10.1", "1.13.0+cu117", "2.9.0a0+git"])
def test_old_torch(version):
    with pytest.raises(VersionError, match=r"needs torch 2\.11 or newer"):
        check_version(version)


@pytest.mark.parametrize("version", ["2.11.0", "2.13.0+cpu", "3.0.0.dev1"])
def test_new_torch(version):
    check_version(version)


def test_graph_break(model):
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = copy.deepcopy(model), nn.Linear(2, 4)

        def forward(self, x):
            x = self.first(x).tanh()
            torch._dynamo.graph_break()
            return self.second(x.tanh())

    torch.manual_seed(1)
    plain = Broken()
    slim = slimfit_fx.transform(copy.deepcopy(plain), mode="eager", preset="exact", always_open=())
    gates = slimfit_fx.gates(slim)
    gates.set(["first.0.weight", "second.weight"])
    expected, wanted = run(plain, {"x": torch.ones(3, 4)})
    outputs, found = run(slim, {"x": torch.ones(3, 4)})
    torch.testing.assert_close(outputs, expected)
    assert len(slimfit_fx.graphs(slim)) == 2
    for name, gradient in wanted.items():
        if name in gates.closed:
            assert found[name] is None
        else:
            torch.testing.assert_close(found[name], gradient)
    inputs = {"x": torch.ones(3, 4)}
    assert handed_over(slim(**inputs), slim, inputs) == slimfit_fx.report(slim).saved_bytes_after


def test_entry_point(model):
    compiled = torch.compile(model, backend="slimfit_fx", options={"mode": "eager", "freeze_rate": 0.5})
    compiled(torch.ones(3, 4)).sum().backward()
    frozen = {name for name, p in model.named_parameters() if p.grad is None}
    assert frozen == set(slimfit_fx.gates(compiled).closed) == set(slimfit_fx.gates(model).closed)
    assert frozen
    slimfit_fx.gates(compiled).set([])
    assert slimfit_fx.report(compiled).saved_bytes_before > slimfit_fx.report(compiled).saved_bytes_after


def test_a_compiled_module_that_was_undone_says_so(model):
    compiled = torch.compile(model, backend="slimfit_fx", options={"mode": "eager"})
    compiled(torch.ones(3, 4)).sum().backward()
    assert slimfit_fx.undo(compiled) is model
    with pytest.raises(slimfit_fx.StateError, match="undo ended this"):
        compiled(torch.ones(3, 4))


def test_entry_point_takes_modules_only(model):
    compiled = torch.compile(lambda x: model(x), backend="slimfit_fx")
    with pytest.raises(Exception, match="backend='slimfit_fx' compiles modules"):
        compiled(torch.ones(3, 4))


def test_copies_and_pickles_are_plain_models(model):
    slimfit_fx.transform(model, mode="eager")
    step(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert list(other.state_dict()) == list(model.state_dict())
        slimfit_fx.transform(other, mode="eager")


def test_importing_needs_neither_transformers_nor_timm():
    code = (
        "import sys, slimfit_fx, slimfit_fx.integrations; "
        "assert not {'transformers', 'timm', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_blocks_that_dynamo_gives_one_graph_keep_their_own_gates():
    """After a graph break in a loop Dynamo compiles the block that is called there once, for all blocks like it."""

    class Looping(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.GELU()) for _ in range(3))

        def forward(self, x):
            for block in self.blocks:
                torch._dynamo.graph_break()
                x = self.call(block, x)
            return x

        def call(self, block, x):
            return block(x).tanh()

    plain = Looping()
    slim = slimfit_fx.transform(copy.deepcopy(plain), mode="eager", preset="exact", always_open=())
    _, wanted = run(plain, {"x": torch.ones(3, 4)})
    for name in slimfit_fx.gates(slim).names:
        slimfit_fx.gates(slim).set([name])
        _, found = run(slim, {"x": torch.ones(3, 4)})
        assert {weight for weight in slimfit_fx.gates(slim).names if found[weight] is not None} == {name}
        torch.testing.assert_close(found[name], wanted[name])
    assert len(session_of(slim).active) == 3
    assert len(session_of(slim).captures) < 3


def test_parameters_that_were_replaced_are_named(model):
    slim = slimfit_fx.transform(model, mode="eager", preset="exact")
    step(slim).backward()
    slim.load_state_dict({name: value.clone() for name, value in slim.state_dict().items()}, assign=True)
    with pytest.raises(slimfit_fx.StateError, match="replaced after slimfit_fx.transform"):
        step(slim).backward()
    slimfit_fx.transform(slimfit_fx.undo(slim), mode="eager")
    step(slim).backward()
