"""Thousands of drawn programs of awkward sizes, for a machine that has the night: `SLIMFIT_NIGHTLY=1`."""

from __future__ import annotations

import os

import pytest
from differential import PRESETS, Subject, faults
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from programs import AWKWARD, Program, programs

pytestmark = [
    pytest.mark.inductor,
    pytest.mark.skipif(os.environ.get("SLIMFIT_NIGHTLY") != "1", reason="SLIMFIT_NIGHTLY=1 asks for it"),
]
EXAMPLES = int(os.environ.get("SLIMFIT_NIGHTLY_EXAMPLES", "3000"))


@settings(max_examples=EXAMPLES, deadline=None, print_blob=True, suppress_health_check=list(HealthCheck))
@given(programs(**AWKWARD), st.sampled_from(PRESETS), st.sampled_from(AWKWARD["lengths"]))
def test_drawn_program(program: Program, preset: str, other_length: int):
    """A second call of another length: dynamic shapes are generated code of their own."""
    inputs = [program.inputs(0), program.inputs(1), program.inputs(2, length=other_length)]
    subject = Subject(program.model(), inputs, program.dtype, random="dropout" in program.steps)
    assert not faults(subject, preset)
