"""Generated code on small programs of awkward sizes, under every preset."""

from __future__ import annotations

import functools

import pytest
import torch
from differential import PRESETS, Subject, faults
from programs import Program

pytestmark = pytest.mark.inductor

F32, BF16 = torch.float32, torch.bfloat16


def program(
    steps: str, batch: int, length: int, width: int, dtype: torch.dtype = F32, embedded: bool = False
) -> Program:
    return Program(("linear", *steps.split()), batch, length, width, embedded, dtype, seed=0)


PROGRAMS = {
    "a row longer than any group": program("rms_norm gated_unit residual", 2, 17, 688),
    "a row longer than any group, bf16": program("layer_norm gelu linear", 3, 7, 688, BF16),
    "197 tokens, batch 1": program("layer_norm attention residual", 1, 197, 100),
    "one token": program("layer_norm linear gelu linear residual", 3, 1, 36),
    "one token in all": program("rms_norm branch tanh linear_no_bias", 1, 1, 144),
    "norms of 144": program("layer_norm relu layer_norm linear_2d rms_norm", 2, 8, 144),
    "convolution": program("conv leaky_relu conv layer_norm", 3, 17, 36),
    "bf16 branches": program("rms_norm branch silu linear", 1, 17, 172, BF16),
    "x @ w": program("layer_norm projection gelu projection residual", 3, 7, 100),
    "embedded and tied": program("tied layer_norm squared_relu linear", 2, 7, 144, embedded=True),
    "dropout": program("layer_norm dropout linear gelu dropout residual", 2, 17, 100),
    "attention by operators": program("math_attention residual layer_norm", 3, 8, 36),
    "attention by operators, bf16": program("rms_norm math_attention scaled", 1, 17, 36, BF16),
    "three activations": program("silu linear tanh linear relu scaled linear", 2, 7, 172),
}


@functools.cache
def subject(name: str) -> Subject:
    """Its two inputs differ in values; what generated code without the passes makes of them is shared by presets."""
    chosen = PROGRAMS[name]
    inputs = [chosen.inputs(0), chosen.inputs(1)]
    return Subject(chosen.model(), inputs, chosen.dtype, random="dropout" in chosen.steps)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", PROGRAMS)
def test_compiled_program(name, preset):
    assert not faults(subject(name), preset)
