"""`compile_options`: Inductor gets them, for both graphs; what cannot work is refused before anything is compiled."""

from __future__ import annotations

import pytest
import torch
from helpers import transformed
from torch import nn
from torch._inductor import config as inductor_config
from torch._inductor import list_mode_options

import slimfit_fx
from slimfit_fx import Config, ConfigError
from slimfit_fx.compiler import backend
from slimfit_fx.compiler.compile_options import check_no_cuda_graphs


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(36, 100), nn.GELU(), nn.Linear(100, 3))


@pytest.mark.inductor
@pytest.mark.parametrize("regions", ["model", "blocks"])
def test_both_graphs_are_compiled_with_them(regions, monkeypatch):
    seen = []
    inner = backend.compile_fx_inner

    def look(gm, inputs, **options):
        seen.append((inductor_config.max_autotune_gemm, inductor_config.cpp.threads))
        return inner(gm, inputs, **options)

    monkeypatch.setattr("slimfit_fx.compiler.backend.compile_fx_inner", look)
    options = {"max_autotune_gemm": True, "cpp.threads": 1}
    before = inductor_config.max_autotune_gemm
    model = transformed(net(), mode="inductor", regions=regions, compile_options=options, freeze_rate=0.5)
    model(torch.randn(7, 36)).sum().backward()
    assert len(seen) >= 2 and set(seen) == {(True, 1)}
    assert inductor_config.max_autotune_gemm is before


@pytest.mark.inductor
def test_a_model_with_options_can_be_asked(monkeypatch):
    """The probe runs the interpreter, which has none; `verify` compares with torch.compile under the same options."""
    plain, compile_with = [], torch.compile

    def compiled(*arguments, **named):
        plain.append(named.get("options"))
        return compile_with(*arguments, **named)

    model = slimfit_fx.transform(net(), compile_options={"cpp.threads": 1}, freeze_rate=0.5)
    x = torch.randn(7, 36)
    model(x).sum().backward()
    errors = slimfit_fx.report(model, sample=x, loss=lambda y: y.square().sum()).gradient_errors
    assert 0 < errors["all"].relative < 0.05
    monkeypatch.setattr(torch, "compile", compiled)
    found = slimfit_fx.verify(model, x, loss=lambda y: y.square().sum())
    assert found.ok, str(found)
    assert {"cpp.threads": 1} in plain


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"max_autotun": True}, "Did you mean 'max_autotune'"),
        ({"max_autotune": "yes"}, "is of type bool, for example False; got 'yes'"),
        ({"custom_partitioner_fn": print}, "our passes are Inductor's custom partitioner"),
        ({"triton.cudagraphs": True}, "cannot be captured"),
        (list_mode_options("reduce-overhead"), "cannot be captured"),
        (list_mode_options("max-autotune"), "cannot be captured"),
        (["max_autotune"], "is a mapping"),
        ({3: True}, "is a mapping"),
    ],
)
def test_what_is_refused(options, match):
    model = net()
    with pytest.raises(ConfigError, match=match):
        slimfit_fx.transform(model, compile_options=options)
    slimfit_fx.transform(model, mode="eager")  # nothing is left behind


def test_the_interpreter_has_none():
    with pytest.raises(ConfigError, match="mode='eager' does without it"):
        Config(mode="eager", compile_options={"max_autotune": True})


def test_json():
    config = Config(compile_options={"max_autotune": True, "cpp.threads": 2})
    assert Config.from_json(config.to_json()) == config


@pytest.mark.parametrize("mode", ["default", "max-autotune-no-cudagraphs", "lite"])
def test_options_of_torch_compiles_other_modes_are_taken(mode):
    options = list_mode_options(mode)
    assert Config(compile_options=options).compile_options == options
    slimfit_fx.undo(slimfit_fx.transform(net(), compile_options=options))


def test_cuda_graphs_that_the_environment_switches_on_are_refused_in_the_first_call():
    model, x = transformed(net(), mode="inductor", freeze_rate=0.5), torch.randn(7, 36)
    named = torch.compile(net(), backend="slimfit_fx")
    with inductor_config.patch({"triton.cudagraphs": True}):
        for each in (model, named):
            with pytest.raises(ConfigError, match="TORCHINDUCTOR_CUDAGRAPHS"):
                each(x)


def test_cuda_graphs_that_the_environment_switches_on_can_be_left_out():
    with inductor_config.patch({"triton.cudagraphs": True}):
        check_no_cuda_graphs({"triton.cudagraphs": False})
        with pytest.raises(ConfigError):
            check_no_cuda_graphs({})
    check_no_cuda_graphs({})
