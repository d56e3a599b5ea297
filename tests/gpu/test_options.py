"""Inductor's options on a device, and what would record CUDA graphs."""

from __future__ import annotations

import pytest
import torch
from device_runs import faults, model_on, one_step, slim
from helpers import no_recompile, reference
from torch._inductor import config as inductor_config
from torch._inductor import list_mode_options

import slimfit_fx
from slimfit_fx import ConfigError


@pytest.mark.parametrize("options", [list_mode_options("max-autotune-no-cudagraphs"), {"shape_padding": True}], ids=str)
def test_options_reach_the_code_generator(options, device):
    model, inputs = model_on(device, "llama")
    _, expected = one_step(reference(model, "inductor"), inputs)
    ours = slim(model, preset="exact", freeze_rate=0.5, compile_options=options)
    _, found = one_step(ours, inputs)
    assert not faults(ours, found, expected, "exact", torch.float32)


def test_cuda_graphs_are_refused_by_name(device):
    model, inputs = model_on(device, "timm vit")
    with pytest.raises(ConfigError, match=r"triton\.cudagraphs"):
        slim(model, compile_options=list_mode_options("reduce-overhead"))
    ours = slim(model, freeze_rate=0.5)
    with inductor_config.patch({"triton.cudagraphs": True}), pytest.raises(ConfigError, match=r"triton\.cudagraphs"):
        ours(**inputs)
    one_step(ours, inputs)


@pytest.mark.xfail(reason="refused: nobody has seen it run. If it passes, the refusal can go", strict=False)
def test_cuda_graphs_past_the_refusal(cuda, monkeypatch):
    """A recorded graph must not freeze gates."""
    monkeypatch.setattr("slimfit_fx.compiler.backend.check_no_cuda_graphs", lambda *_: None)
    model, inputs = model_on(cuda, "timm vit")
    _, expected = one_step(reference(model, "inductor"), inputs)
    with inductor_config.patch({"triton.cudagraphs": True}):
        ours = slim(model, preset="exact", freeze_rate=0.5)
        gates = slimfit_fx.gates(ours)
        one_step(ours, inputs)
        with no_recompile():
            for step in range(6):
                gates.set(gates.names[step % 3 :: 2])
                torch.compiler.cudagraph_mark_step_begin()
                _, found = one_step(ours, inputs)
                assert not faults(ours, found, expected, "exact", torch.float32)
