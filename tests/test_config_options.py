"""The fields of `Config` as types, for editors and checkers: one place says what a field may be."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
from typing_extensions import Unpack

import slimfit_fx
from slimfit_fx import Config, config, config_options
from slimfit_fx.config_options import ConfigOptions
from slimfit_fx.presets import PRESETS

KNOWN = {
    "preset": tuple(PRESETS),
    "rate_schedule": config.RATE_SCHEDULES,
    "closed_state": config.CLOSED_STATES,
    "granularity": config.GRANULARITIES,
    "regions": config.REGIONS,
    "mode": config.MODES,
}


def test_options_and_fields_are_the_same():
    hints = get_type_hints(Config)
    assert get_type_hints(ConfigOptions) == {field.name: hints[field.name] for field in dataclasses.fields(Config)}
    assert not ConfigOptions.__required_keys__


@pytest.mark.parametrize(
    "function", [slimfit_fx.transform, slimfit_fx.verify, Config.replace], ids=lambda f: f.__name__
)
def test_overrides_are_typed(function):
    (rest,) = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.VAR_KEYWORD]
    assert get_type_hints(function)[rest] == Unpack[ConfigOptions]


@pytest.mark.parametrize("field", KNOWN)
def test_the_type_has_what_the_check_takes(field):
    """Each value is taken, another is not, and the type says the same."""
    hint = get_type_hints(Config)[field]
    assert get_origin(hint) is Literal
    assert get_args(hint) == KNOWN[field]
    for value in KNOWN[field]:
        more = {"rise_steps": 3} if field == "rate_schedule" and value != "constant" else {}
        assert getattr(Config(**{field: value, **more}), field) == value
    with pytest.raises(slimfit_fx.ConfigError, match=f"unknown {field} 'another'"):
        Config(**{field: "another"})


def test_policies_are_completed_and_can_be_added_to():
    named, other = get_args(config_options.PolicyName)
    assert get_args(named) == tuple(slimfit_fx.POLICIES)
    assert other is str


def test_patterns_may_be_lists():
    found = Config(always_open=["head"], never_gate="embed", disable_passes=["rebuild"], memory_budget="1GiB")
    assert (found.always_open, found.never_gate, found.disable_passes) == (("head",), ("embed",), ("rebuild",))
    assert found.budget == 2**30
